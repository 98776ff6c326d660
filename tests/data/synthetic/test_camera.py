"""The pinhole projection."""

import numpy as np
import pytest

from earlyexit_ssd.data.synthetic.camera import NEAR, Camera

LEVEL = Camera(eye=(0.0, 0.0, 1.0), yaw=0.0, pitch=0.0, roll=0.0, focal=1.0, image_size=100)


def project(camera, point):
    return camera.screen(camera.view(np.array([point], float)))[0]


@pytest.mark.parametrize(
    ("point", "pixel"),
    [
        ((0, 2, 1), (50, 50)),  # straight ahead
        ((1, 2, 1), (100, 50)),  # half the distance to the right: half a picture
        ((0, 2, 0), (50, 100)),  # below: further down
        ((-0.5, 1, 1.25), (0, 25)),
    ],
)
def test_level_camera(point, pixel):
    assert project(LEVEL, point) == pytest.approx(pixel)


def test_yaw_turns_left_and_pitch_looks_down():
    left = Camera((0.0, 0.0, 1.0), np.pi / 2, 0.0, 0.0, 1.0, 100)
    assert project(left, (-2, 0, 1)) == pytest.approx((50, 50))
    down = Camera((0.0, 0.0, 1.0), 0.0, np.pi / 4, 0.0, 1.0, 100)
    assert project(down, (0, 1, 0)) == pytest.approx((50, 50))


def test_axes_are_orthonormal_whatever_the_angles():
    axes = Camera((0.0, 0.0, 0.0), 0.7, 0.3, -0.2, 1.0, 100).axes
    assert axes @ axes.T == pytest.approx(np.eye(3), abs=1e-12)


def test_floor_point_comes_out_in_its_column():
    camera = Camera((1.0, 2.0, 1.5), 0.4, 0.0, 0.0, 0.9, 100)
    x, y = camera.floor_point(3.0, 0.2)
    assert project(camera, (x, y, 1.5)) == pytest.approx((20, 50))
    assert camera.view(np.array([[x, y, 0.0]]))[0, 2] == pytest.approx(3.0)


def test_polygons_are_cut_at_the_near_plane():
    behind = np.array([(-1, -3, 0), (1, -3, 0), (1, -1, 0)], float)
    assert LEVEL.polygon(behind) == []
    floor = np.array([(-1, -3, 0), (1, -3, 0), (1, 3, 0), (-1, 3, 0)], float)
    outline = np.array(LEVEL.polygon(floor))
    assert len(outline) == 4
    assert outline[:, 1].max() == pytest.approx(50 + 100 / NEAR)
    assert outline[:, 1].min() == pytest.approx(50 + 100 / 3)
