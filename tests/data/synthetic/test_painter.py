"""Which solid hides which, checked against rays."""

import numpy as np
from PIL import Image

from earlyexit_ssd.data.synthetic.camera import Camera
from earlyexit_ssd.data.synthetic.painter import Light, Mesh, paint, shadow, silhouette
from earlyexit_ssd.data.synthetic.solids import box
from earlyexit_ssd.data.synthetic.stage import compose

GREY = (128.0, 128.0, 128.0)
LIGHT = Light((0.0, 0.0, 1.0), 0.5, 0.4)
CAMERA = Camera((0.0, 0.0, 1.4), 0.0, 0.3, 0.0, 1.0, 64)


def label_picture(solids, camera, labels=None):
    canvas = Image.new("RGB", (camera.image_size * 2,) * 2)
    labels = labels or list(range(1, len(solids) + 1))
    return np.asarray(paint(Mesh(solids), camera, LIGHT, canvas, labels, 2))


def first_hit(mesh, camera, column, row):
    """Index of the solid that the ray through a pixel meets first, or None: an independent renderer."""
    half = camera.image_size / 2
    across = np.array([(column - half) / camera.image_size, (row - half) / camera.image_size])
    ray = np.append(across / camera.focal, 1.0) @ camera.axes
    towards, start = mesh.normals @ ray, mesh.normals @ np.array(camera.eye) - mesh.offsets
    best = (np.inf, None)
    ends = np.append(mesh.face_starts[1:], len(towards))
    for index, (a, b) in enumerate(zip(mesh.face_starts, ends, strict=True)):
        with np.errstate(divide="ignore", invalid="ignore"):
            meets = -start[a:b] / towards[a:b]
        enter = np.max(meets[towards[a:b] < 0], initial=0.0)
        leave = np.min(meets[towards[a:b] > 0], initial=np.inf)
        if enter < leave and not (start[a:b][towards[a:b] == 0] > 0).any():
            best = min(best, (enter, index), key=lambda pair: pair[0])
    return best[1]


def test_a_board_hides_its_legs_whatever_the_order_given():
    top = box((0, 3, 0.73), (1.2, 0.8, 0.04), GREY)
    legs = [box((x, y, 0.355), (0.06, 0.06, 0.71), GREY) for x in (-0.5, 0.5) for y in (2.7, 3.3)]
    below = box((0, 3, 0.2), (0.3, 0.3, 0.4), GREY)
    for solids in ([top, *legs, below], [below, *legs[::-1], top]):
        picture, mesh = label_picture(solids, CAMERA), Mesh(solids)
        for row in range(4, 124, 6):
            for column in range(4, 124, 6):
                hit = first_hit(mesh, CAMERA, (column + 0.5) / 2, (row + 0.5) / 2)
                near = picture[row - 1 : row + 2, column - 1 : column + 2]
                assert (0 if hit is None else hit + 1) in near


def test_furnished_rooms_agree_with_rays():
    wrong = total = 0
    for seed in range(4):
        stage = compose(np.random.default_rng(seed), 64, 3)
        solids = [solid for thing in stage.things for solid in thing.solids][:250]
        picture, mesh = label_picture(solids, stage.camera, [1 + i for i in range(len(solids))]), Mesh(solids)
        for row in range(3, 125, 5):
            for column in range(3, 125, 5):
                hit = first_hit(mesh, stage.camera, (column + 0.5) / 2, (row + 0.5) / 2)
                near = picture[row - 1 : row + 2, column - 1 : column + 2]
                wrong += (0 if hit is None else hit + 1) not in near
                total += 1
    assert wrong / total < 0.01  # parts of one piece that sink into one another have no right order


def test_silhouette_ignores_what_stands_before():
    front, back = box((0, 2, 1), (1, 0.2, 1), GREY), box((0, 4, 1), (0.5, 0.2, 0.5), GREY)
    assert not (label_picture([front, back], CAMERA) == 2).any()
    alone = np.asarray(silhouette(Mesh([front, back]), CAMERA, [1], (128, 128), 2))
    assert (alone > 0).sum() == (label_picture([back], CAMERA) == 1).sum() > 0


def test_shadow_falls_away_from_the_lamp():
    mesh = Mesh([box((0, 3, 0.5), (0.2, 0.2, 1.0), GREY)])
    lamp_right = np.array([0.6, 0.0, 0.8])
    columns = np.flatnonzero(np.asarray(shadow(mesh, CAMERA, tuple(lamp_right), 1.0)).any(axis=0))
    assert columns.min() < 20 and columns.max() <= 35


def test_faces_towards_the_lamp_are_brighter():
    mesh = Mesh([box((0, 3, 0.5), (1, 1, 1), GREY)])
    brightness = LIGHT.on(mesh.normals)
    up = mesh.normals[:, 2]
    assert brightness[up.argmax()] > brightness[np.abs(up).argmin()] > brightness[up.argmin()]
