"""Where furniture stands."""

import math

import numpy as np
import pytest

from earlyexit_ssd.data.synthetic.camera import Camera
from earlyexit_ssd.data.synthetic.chairs import SHARES
from earlyexit_ssd.data.synthetic.furniture import ALONG_WALLS, FREE
from earlyexit_ssd.data.synthetic.room import Room
from earlyexit_ssd.data.synthetic.solids import box
from earlyexit_ssd.data.synthetic.stage import Stage, compose

CUBE = [box((0, 0, 0.5), (1, 1, 1), (128.0, 128.0, 128.0))]


@pytest.fixture
def stage():
    return Stage(Room(4.0, 6.0, 2.5), Camera((2.0, 0.5, 1.4), 0.0, 0.1, 0.0, 1.0, 64))


def test_nothing_stands_in_walls_in_others_or_in_the_camera(stage):
    assert stage.add(CUBE, 2.0, 3.0, 0.0) is not None
    assert stage.add(CUBE, 3.8, 3.0, 0.0) is None  # in the right wall
    assert stage.add(CUBE, 2.5, 3.4, 0.0) is None  # in the first cube
    assert stage.add(CUBE, 2.0, 0.8, 0.0) is None  # around the camera
    assert stage.add(CUBE, 2.0, 4.1, 0.0) is not None
    # Turned by 45 degrees a cube reaches 0.71 m: it no longer fits where a straight one does.
    assert stage.add(CUBE, 0.9, 3.0, math.pi / 4) is None
    assert stage.add(CUBE, 0.9, 3.0, 0.0) is not None
    assert len(stage.things) == 3


def test_a_chair_may_stand_under_its_table(stage):
    table = stage.add(CUBE, 2.0, 3.0, 0.0)
    assert stage.add(CUBE, 2.4, 3.0, 0.0, is_chair=True, beside=table) is not None


@pytest.mark.parametrize("build", [*SHARES, *dict.fromkeys(FREE + ALONG_WALLS)], ids=lambda build: build.__name__)
def test_furniture_stands_on_the_floor_and_fits_a_room(build):
    for seed in range(5):
        vertices = np.concatenate([solid.vertices for solid in build(np.random.default_rng(seed))])
        low, high = vertices.min(axis=0), vertices.max(axis=0)
        assert -0.03 <= low[2] <= 0.07  # some stand on feet too low to draw
        assert 0.2 < high[2] < 2.3
        assert np.isfinite(vertices).all() and (high - low).max() < 2.4


@pytest.mark.parametrize("build", SHARES, ids=lambda build: build.__name__)
def test_chairs_have_a_back_above_the_seat(build):
    for seed in range(5):
        vertices = np.concatenate([solid.vertices for solid in build(np.random.default_rng(seed))])
        top = vertices[:, 2].max()
        assert 0.7 < top < 1.25
        # The top of a chair is at the back (+y), or for a folding chair at one side of it.
        highest = vertices[vertices[:, 2] > top - 0.05]
        assert abs(highest[:, 1].mean()) > 0.1


def test_shares_of_chairs_sum_to_one():
    assert sum(SHARES.values()) == pytest.approx(1.0)


def test_no_chairs_when_none_are_wanted():
    for seed in range(20):
        assert not any(thing.is_chair for thing in compose(np.random.default_rng(seed), 64, 0).things)
