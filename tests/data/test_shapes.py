"""The rendered scenes, and the data set made of them."""

import json
import multiprocessing
import os

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from earlyexit_ssd.data import shapes
from earlyexit_ssd.data.shapes import FOLDER, MIN_SIDE, SPLITS, Camera, Furniture, ensure_synthetic, part, render_scene
from earlyexit_ssd.errors import CannotWrite

GREY = np.full(3, 0.5)
LIGHT = (np.array([2.0, 0.0, 2.5]), 0.6)
SIZES = (8, 0, 4)


def slab(x, y, width, height, chair=True):
    """Return an upright slab whose near side is at depth ``y``."""
    return Furniture([part(0, 0, 0, (width, 0.02, height), GREY)], x, y + 0.01, chair=chair)


def boxes_of(*things):
    """Return the boxes of the chairs in ``things``. The camera is at x = 2, z = 1. It shows a point (x, z) in column
    60 + 120 * (x - 2) / depth and row 60 - 120 * (z - 1) / depth."""
    return shapes.paint(list(things), Camera((2, 0, 1), 0, 0, 1, 120), np.zeros((240, 240, 4), np.uint8), LIGHT)


def first_hits(boxes, camera):
    """Return for each pixel of the supersampled image the number (1, 2, ...) of the first of ``boxes`` [N, 8, 3] on its
    ray, or 0. A box is the intersection of the half-spaces of its faces."""
    side = camera.size * shapes.SCALE
    grid = ((np.arange(side) + 0.5) / side - 0.5) / camera.focal
    right, down, forward = camera.axes.astype(float)
    rays = grid[None, :, None] * right + grid[:, None, None] * down + forward
    nearest, hits = np.full((side, side), np.inf), np.zeros((side, side), int)
    for number, corners in enumerate(boxes, 1):
        enter, leave = np.zeros((side, side)), np.full((side, side), np.inf)
        for a, b, c in ((0, 1, 5), (1, 2, 6), (2, 3, 7), (3, 0, 4), (4, 5, 6), (0, 3, 2)):
            normal = np.cross(corners[b] - corners[a], corners[c] - corners[a])
            normal = normal * -np.sign(normal @ (corners.mean(axis=0) - corners[a]))
            slope, away = rays @ normal, (corners[a] - camera.eye) @ normal
            meets = away / np.where(slope == 0, 1e-12, slope)
            enter = np.where(slope < 0, np.maximum(enter, meets), enter)
            leave = np.where(slope > 0, np.minimum(leave, meets), leave)
        front = (enter < leave) & (enter < nearest)
        nearest[front], hits[front] = enter[front], number
    return hits


def share_different(expected, picture):
    """Return the share of pixels of ``picture`` that equal none of the 3 x 3 pixels around them in ``expected``. Edges
    may be off by a pixel."""
    near = [np.roll(expected, (dy, dx), (0, 1)) == picture for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return (~np.any(near, axis=0)).mean()


@pytest.mark.parametrize(
    ("things", "boxes"),
    [
        ([slab(2.0, 2.0, 0.5, 1.0)], [(45, 60, 75, 120)]),
        ([slab(3.0, 2.0, 0.5, 1.5)], [(105, 30, 120, 120)]),  # cut by the frame
        ([slab(1.4, 3.0, 0.5, 1.0), slab(2.6, 3.0, 0.5, 1.0)], [(26, 60, 46, 100), (74, 60, 94, 100)]),
        # A table hides everything left of column 60 (x = 2). The order of the list does not matter.
        ([slab(2.0, 4.0, 1.0, 1.0), slab(1.25, 2.0, 1.5, 1.5, chair=False)], [(60, 60, 75, 90)]),
        ([slab(1.25, 2.0, 1.5, 1.5, chair=False), slab(2.0, 4.0, 1.0, 1.0)], [(60, 60, 75, 90)]),
        # The table's centre is farther away than the chair. Its left end hides the chair's right end.
        ([slab(1.9, 2.08, 0.3, 1.0), slab(3.97, 1.5, 4.0, 1.5, chair=False)], [(45.5, 60, 57.6, 117.7)]),
        # 80 % of the first chair's columns are behind the table; the second chair is five pixels wide.
        ([slab(2.0, 4.0, 2.0, 1.0), slab(1.7, 2.0, 1.2, 1.5, chair=False), slab(3.6, 5.0, 0.2, 1.0)], [None, None]),
    ],
)
def test_box_covers_the_visible_part_of_its_chair(things, boxes):
    assert boxes_of(*things) == [box and pytest.approx(box, abs=1.0) for box in boxes]


def test_parts_hide_parts_behind_and_below():
    camera = Camera((2, 0, 1.4), 0, 0.3, 1, 64)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        build = (shapes.chair, shapes._other, lambda rng: shapes._at_wall(rng, False))[seed % 3]
        parts = np.array(build(rng))
        parts[:, 7:] = (np.arange(len(parts))[:, None] + 1.0) / 255 / 1.2  # the red of a part is its number
        canvas, yaw = np.zeros((128, 128, 4), np.uint8), rng.uniform(0, 6.3) if seed % 3 < 2 else rng.uniform(-0.5, 0.5)
        thing = Furniture(parts, 2, 2.5, yaw)
        shapes.paint([thing], camera, canvas, (LIGHT[0], 1.2))
        assert share_different(first_hits(thing.corners, camera), canvas[..., 0]) < 0.004, build


def test_boxes_are_tight_around_the_pixels_of_ray_casting(monkeypatch):
    painted, paint, wrong = [], shapes.paint, []

    def paint_and_record(things, camera, canvas, light):
        painted.append((list(things), camera, canvas, paint(things, camera, canvas, light)))
        return painted[-1][-1]

    monkeypatch.setattr(shapes, "paint", paint_and_record)
    for seed in range(12):
        render_scene(np.random.default_rng(seed), 64)
    for things, camera, canvas, boxes in painted:
        labels = [sum(t.chair for t in things[: place + 1]) * thing.chair for place, thing in enumerate(things)]
        labels = [0, *(label for thing, label in zip(things, labels, strict=True) for _ in thing.parts)]
        owners = np.array(labels)[first_hits(np.concatenate([thing.corners for thing in things]), camera)]
        wrong.append(share_different(owners, canvas[..., 3]))
        for label, box in enumerate(boxes, 1):
            if box:
                rows, columns = np.nonzero(owners == label)
                expected = columns.min() / 2, rows.min() / 2, (columns.max() + 1) / 2, (rows.max() + 1) / 2
                assert box == pytest.approx(expected, abs=1.0)
    assert sum(len(boxes) for *_, boxes in painted) >= 8
    assert max(wrong) < 0.005 and np.mean(wrong) < 0.001


def test_brightness_depends_on_the_lamp():
    canvas = np.zeros((240, 240, 4), np.uint8)
    cube = Furniture([part(0, 0, 0, (0.5, 0.5, 0.5), GREY)], 2.0, 3.0)
    shapes.paint([cube], Camera((2, 0, 1), 0, 0, 1, 120), canvas, (np.array([2.0, 3.0, 2.5]), 0.5))
    # The top is 1.2 times, the front 0.5 times as bright as the colour, 0.5 * 255.
    assert canvas[160, 120, 0] == 153 and canvas[190, 120].tolist() == [64, 64, 64, 0]


def test_chairs_have_back_and_seat_and_all_furniture_stands_on_the_floor():
    for seed in range(60):
        rng = np.random.default_rng(seed)
        chair, others = np.array(shapes.chair(rng)), [shapes._other(rng), shapes._at_wall(rng, False)]
        top = chair[:, 2] + chair[:, 5]
        assert 0.7 < top.max() < 1.3 and (chair[top > top.max() - 0.01, 1] > 0.1).all()  # behind the sitter
        assert (chair[(top > 0.4) & (top < 0.75), 3] > 0.35).any()  # the seat
        for parts in (chair, *map(np.array, others)):
            assert 0 <= parts[:, 2].min() <= 0.05 and (parts[:, 2] + parts[:, 5]).max() < 2.3
            assert np.isfinite(parts).all() and (parts[:, 3:6] > 0).all() and (parts[:, 7:] >= 0).all()


def test_scene_depends_on_its_seed_only():
    first, second = (render_scene(np.random.default_rng((1, 0, 5)), 96) for _ in range(2))
    assert first[0].tobytes() == second[0].tobytes() and first[1] == second[1]
    for other in ((2, 0, 5), (1, 1, 5), (1, 0, 6)):
        assert render_scene(np.random.default_rng(other), 96)[0].tobytes() != first[0].tobytes()


def test_half_of_the_scenes_are_empty_and_differ_by_chairs_only(monkeypatch):
    counts, furnish = [], shapes._furnish

    def count(*arguments):
        things = furnish(*arguments)
        counts.append((arguments[-1], len(things)))
        assert arguments[-1] or not any(thing.chair for thing in things)
        assert all((t.corners[..., :2] > 0).all() and (t.corners < (*arguments[1][:2], 9)).all() for t in things)
        return things

    monkeypatch.setattr(shapes, "_furnish", count)
    scenes = [render_scene(np.random.default_rng((0, 0, index)), 64) for index in range(200)]
    empty = np.array([not boxes for _, boxes in scenes])
    assert 0.42 <= empty.mean() <= 0.58
    things = [np.mean([number for kind, number in counts if kind == chairs]) for chairs in (False, True)]
    assert things[0] == pytest.approx(things[1], rel=0.12)
    bright = np.array([np.asarray(photo).mean() for photo, _ in scenes])
    assert bright[empty].mean() == pytest.approx(bright[~empty].mean(), abs=0.3 * bright.std())
    for photo, boxes in scenes:
        assert photo.mode == "RGB" and photo.size == (64, 64) and len(boxes) <= 4
        for x1, y1, x2, y2 in boxes:
            assert x1 >= 0 and x1 + MIN_SIDE <= x2 <= 64 and y1 >= 0 and y1 + MIN_SIDE <= y2 <= 64
    sides = np.sqrt([(x2 - x1) * (y2 - y1) for _, boxes in scenes for x1, y1, x2, y2 in boxes])
    assert np.quantile(sides, 0.9) > 1.8 * np.quantile(sides, 0.1)


# ---- the data set on disk ---------------------------------------------------------------------------------


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    return ensure_synthetic(tmp_path_factory.mktemp("datasets"), SIZES, 96, seed=0)


def test_pycocotools_reads_every_split(rendered):
    assert rendered.parent.name == FOLDER
    seen = []
    for split, size in zip(SPLITS, SIZES, strict=True):
        coco = COCO(rendered / "annotations" / f"instances_{split}.json")
        assert len(coco.imgs) == size and len(coco.anns) == len(coco.dataset["annotations"])  # no id twice
        assert coco.dataset["categories"] == [{"id": 62, "name": "chair", "supercategory": "furniture"}]
        for image in coco.imgs.values():
            with Image.open(rendered / split / image["file_name"]) as picture:
                assert picture.format == "JPEG" and picture.size == (image["width"], image["height"]) == (96, 96)
        for annotation in coco.anns.values():
            x, y, width, height = annotation["bbox"]
            assert x >= 0 and y >= 0 and x + width <= 96 and y + height <= 96
            assert annotation["area"] == width * height and annotation["iscrowd"] == 0
            assert annotation["image_id"] in coco.imgs
        seen += list(coco.imgs)
    assert sorted(seen) == list(range(1, sum(SIZES) + 1))


def test_files_are_the_scenes_of_their_index(rendered, tmp_path):
    photo, boxes = render_scene(np.random.default_rng((0, 2, 1)), 96)
    coco = json.loads((rendered / "annotations" / "instances_test.json").read_text())
    image_id = SIZES[0] + SIZES[1] + 2
    stored = [record["bbox"] for record in coco["annotations"] if record["image_id"] == image_id]
    assert stored == [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in boxes]
    photo.save(tmp_path / "again.jpg", quality=90)
    assert (tmp_path / "again.jpg").read_bytes() == (rendered / "test" / f"{image_id:06d}.jpg").read_bytes()


def test_each_choice_of_settings_is_rendered_once_into_its_own_folder(tmp_path, monkeypatch):
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "mine.txt").write_text("precious")
    folder = ensure_synthetic(tmp_path, (2, 1, 1), 64, seed=0)
    first = contents(folder)
    other = ensure_synthetic(tmp_path, (1, 1, 1), 64, seed=1)
    second = contents(other)
    assert len(second) == len(first) - 1 and all(first.get(path) != content for path, content in second.items())
    monkeypatch.setattr(shapes, "_render", lambda *_: pytest.fail("rendered again"))
    assert ensure_synthetic(tmp_path, (2, 1, 1), 64, seed=0) == folder and contents(folder) == first
    assert {path.name for path in (tmp_path / FOLDER).iterdir()} == {folder.name, other.name, "mine.txt"}
    monkeypatch.setattr(shapes, "VERSION", shapes.VERSION + 1)
    with pytest.raises(pytest.fail.Exception, match="rendered again"):
        ensure_synthetic(tmp_path, (2, 1, 1), 64, seed=0)


def test_nothing_is_left_of_an_interrupted_and_of_a_killed_run(tmp_path, monkeypatch):
    render, calls = render_scene, iter(range(100))

    def interrupted(rng, size):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return render(rng, size)

    (tmp_path / FOLDER / "killed.partial" / "train").mkdir(parents=True)
    monkeypatch.setattr(shapes, "render_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure_synthetic(tmp_path, (20, 1, 1), 64, seed=5)
    assert list((tmp_path / FOLDER).iterdir()) == []


def test_folder_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / FOLDER).write_text("precious")
    with pytest.raises(CannotWrite, match="File exists"):
        ensure_synthetic(tmp_path, (1, 1, 1), 64, seed=0)
    assert (tmp_path / FOLDER).read_text() == "precious"


def test_two_processes_render_once(rendered, tmp_path, monkeypatch):
    render = shapes._render

    def render_and_record(*arguments):
        (tmp_path / f"rendered_by_{os.getpid()}").touch()
        render(*arguments)

    monkeypatch.setattr(shapes, "_render", render_and_record)
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=ensure_synthetic, args=(tmp_path, SIZES, 96, 0)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert len(list(tmp_path.glob("rendered_by_*"))) == 1
    assert contents(tmp_path / FOLDER) == contents(rendered.parent)


def test_rays_may_be_parallel_to_walls():
    """With an odd number of pixels and no yaw, the rays of the middle column are parallel to the side walls."""
    rng, room, camera = np.random.default_rng(0), np.float32((4, 5, 2.5)), Camera((2, 0.5, 1.5), 0, 0.1, 1, 33)
    assert (camera.axes[1:, 0] == 0).all()
    with np.errstate(all="raise"):
        canvas = shapes._empty_room(rng, room, camera, LIGHT, [])
    assert (canvas[..., :3] > 0).all()
