"""Pictures and boxes."""

import numpy as np
import pytest

from earlyexit_ssd.data.synthetic.camera import Camera
from earlyexit_ssd.data.synthetic.room import Room
from earlyexit_ssd.data.synthetic.scene import MIN_SIDE, render_scene, render_stage, visible_box
from earlyexit_ssd.data.synthetic.solids import box
from earlyexit_ssd.data.synthetic.stage import Stage, Thing

GREY = (128.0, 128.0, 128.0)


def thing(solid, is_chair):
    return Thing([solid], np.zeros((4, 2)), is_chair)


def slab(x, y, width, height, base=0.0):
    """An upright slab whose near side is at depth ``y``."""
    return box((x, y + 0.01, base + height / 2), (width, 0.02, height), GREY)


def stage_of(*things):
    camera = Camera((2.0, 0.0, 1.0), 0.0, 0.0, 0.0, 1.0, 120)
    return Stage(Room(4.0, 6.0, 2.5), camera, list(things))


def test_box_is_the_projection_of_the_chair():
    # Pixels: 60 + 120 * x / depth, and 60 - 120 * (z - 1) / depth.
    _, boxes = render_stage(stage_of(thing(slab(2.0, 2.0, 0.5, 1.0), True)), np.random.default_rng(0))
    assert boxes == [pytest.approx((45, 60, 75, 120), abs=1.0)]


def test_box_is_cut_by_the_frame():
    _, boxes = render_stage(stage_of(thing(slab(3.0, 2.0, 0.5, 1.5), True)), np.random.default_rng(0))
    assert boxes == [pytest.approx((105, 30, 120, 120), abs=1.0)]


def test_box_holds_only_what_is_visible():
    chair, table = thing(slab(2.0, 4.0, 1.0, 1.0), True), thing(slab(1.0, 2.0, 2.0, 1.5), False)
    # The table hides everything left of x = 2, that is of column 60.
    for things in ((chair, table), (table, chair)):
        _, boxes = render_stage(stage_of(*things), np.random.default_rng(0))
        assert boxes == [pytest.approx((60, 60, 75, 90), abs=1.0)]


def test_hidden_chairs_are_taken_out():
    # 80 % of the chair's 60 columns are behind the table.
    chair, table = thing(slab(2.0, 4.0, 2.0, 1.0), True), thing(slab(1.3, 2.0, 2.0, 1.5), False)
    stage = stage_of(chair, table)
    _, boxes = render_stage(stage, np.random.default_rng(0))
    assert boxes == [] and stage.things == [table]


def test_chairs_of_a_few_pixels_are_taken_out():
    _, boxes = render_stage(stage_of(thing(slab(2.0, 4.0, 0.2, 1.0), True)), np.random.default_rng(0))
    assert boxes == []


def test_each_chair_has_its_own_box():
    first, second = thing(slab(1.4, 3.0, 0.5, 1.0), True), thing(slab(2.6, 3.0, 0.5, 1.0), True)
    _, boxes = render_stage(stage_of(first, second), np.random.default_rng(0))
    assert [b[0] for b in boxes] == pytest.approx([26, 74], abs=1.0)


def test_visible_box_covers_the_pixels_of_its_label():
    owners = np.zeros((20, 20), np.uint8)
    owners[4:9, 6:7] = 3
    owners[0, 0] = 1
    assert visible_box(owners, 3) == (3.0, 2.0, 3.5, 4.5)
    assert visible_box(owners, 2) is None


def test_same_generator_same_picture():
    first, second = (render_scene(np.random.default_rng((1, 0, 5)), 96) for _ in range(2))
    assert first[0].tobytes() == second[0].tobytes() and first[1] == second[1]
    other = render_scene(np.random.default_rng((1, 1, 5)), 96)
    assert other[0].tobytes() != first[0].tobytes()


def test_scenes_are_half_empty_and_their_boxes_are_sound():
    scenes = [render_scene(np.random.default_rng((0, 0, index)), 64) for index in range(160)]
    empty = np.mean([not boxes for _, boxes in scenes])
    assert 0.4 <= empty <= 0.6
    for image, boxes in scenes:
        assert image.mode == "RGB" and image.size == (64, 64)
        assert len(boxes) <= 4
        for x1, y1, x2, y2 in boxes:
            assert x1 >= 0 and x2 <= 64 and y1 >= 0 and y2 <= 64
            assert x2 - x1 >= MIN_SIDE and MIN_SIDE <= y2 - y1 <= 0.75 * 64


@pytest.mark.parametrize("chairs", [0, 1, 4])
def test_number_of_chairs_can_be_asked_for(chairs):
    for seed in range(8):
        _, boxes = render_scene(np.random.default_rng(seed), 96, chairs)
        assert min(chairs, 1) <= len(boxes) <= chairs
