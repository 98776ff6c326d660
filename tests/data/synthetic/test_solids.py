"""Shapes and where they are put."""

import math

import numpy as np
import pytest

from earlyexit_ssd.data.synthetic.solids import box, cylinder, place, rod

RED = (255.0, 0.0, 0.0)


def test_box_fills_its_size_around_its_centre():
    solid = box((1, 2, 3), (0.2, 0.4, 0.6), RED)
    assert solid.vertices.min(axis=0) == pytest.approx([0.9, 1.8, 2.7])
    assert solid.vertices.max(axis=0) == pytest.approx([1.1, 2.2, 3.3])


def test_lean_and_taper_change_the_top_only():
    solid = box((0, 0, 0.5), (1, 1, 1), RED, lean=0.3, taper=(0.5, 1.0))
    bottom, top = solid.vertices[:4], solid.vertices[4:]
    assert np.abs(bottom[:, :2]).max() == pytest.approx(0.5)
    assert top[:, 0].max() == pytest.approx(0.25)
    assert (top[:, 1].min(), top[:, 1].max()) == pytest.approx((-0.2, 0.8))


@pytest.mark.parametrize("end", [(0, 0, 2), (2, 0, 0), (0, -2, 0), (1, 1, 1)])
def test_rod_has_its_thickness_across_its_axis(end):
    solid = rod((0, 0, 0), end, 0.1, RED, sides=4)
    axis = np.array(end) / np.linalg.norm(end)
    along = solid.vertices @ axis
    assert along[:4] == pytest.approx(np.zeros(4), abs=1e-9)
    assert along[4:] == pytest.approx(np.full(4, np.linalg.norm(end)))
    away = np.linalg.norm(solid.vertices - along[:, None] * axis, axis=1)
    assert away == pytest.approx(np.full(8, 0.1 * math.sqrt(2)))  # corners of a square 0.2 wide


def test_cylinder_stands_on_its_base_and_can_taper():
    solid = cylinder((0, 0, 1), 0.2, 0.5, RED, top_radius=0.1, sides=8)
    assert (solid.vertices[:, 2].min(), solid.vertices[:, 2].max()) == (1.0, 1.5)
    reach = np.linalg.norm(solid.vertices[:, :2], axis=1)
    assert reach[:8] == pytest.approx(2 * reach[8:])


def test_place_turns_anticlockwise_then_moves():
    (solid,) = place([box((1, 0, 0), (0.2, 0.2, 0.2), RED)], (5, 5, 0), math.pi / 2)
    assert solid.vertices.mean(axis=0) == pytest.approx([5, 6, 0])
