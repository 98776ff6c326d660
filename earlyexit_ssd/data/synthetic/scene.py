"""Take the picture of a furnished room and find what of its chairs can be seen."""

from __future__ import annotations

import math

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from earlyexit_ssd.data.synthetic.camera import Camera
from earlyexit_ssd.data.synthetic.finish import develop
from earlyexit_ssd.data.synthetic.painter import Light, Mesh, paint, shadow, silhouette
from earlyexit_ssd.data.synthetic.room import draw_room
from earlyexit_ssd.data.synthetic.stage import Stage, Thing, compose

Box = tuple[float, float, float, float]  # x1, y1, x2, y2, absolute pixels
SCALE = 2  # supersampling
MIN_VISIBLE = 0.45  # share of its own mask that a chair has to show; hidden ones are taken out of the scene
MIN_SIDE = 8.0  # pixels
EMPTY_SHARE = 0.5
CHAIRS_PER_SCENE = (0.46, 0.3, 0.15, 0.09)  # 1, 2, 3, 4


def visible_box(owners: np.ndarray, label: int) -> Box | None:
    """The tight extent of ``label`` in a supersampled label picture, in pixels of the final one."""
    mask = owners == label
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not len(columns):
        return None
    x1, x2, y1, y2 = int(columns[0]), int(columns[-1]) + 1, int(rows[0]), int(rows[-1]) + 1
    return (x1 / SCALE, y1 / SCALE, x2 / SCALE, y2 / SCALE)


def visible_chairs(stage: Stage, mesh: Mesh, owners: np.ndarray, labels: list[int]) -> list[Box | None]:
    """The visible extent of each chair of ``stage``, None for those that hardly show.

    ``owners`` is the label picture [H, W] of the painter; chair k of the stage has label k + 1.
    """
    boxes: list[Box | None] = []
    height, width = owners.shape
    for label in range(1, max(labels) + 1):
        parts = [index for index, own in enumerate(labels) if own == label]
        whole = np.count_nonzero(silhouette(mesh, stage.camera, parts, (width, height), SCALE))
        box = visible_box(owners, label)
        shown = np.count_nonzero(owners == label)
        if box is None or shown < MIN_VISIBLE * whole or min(box[2] - box[0], box[3] - box[1]) < MIN_SIDE:
            boxes.append(None)
        else:
            boxes.append(box)
    return boxes


def render_stage(stage: Stage, generator: Generator) -> tuple[Image.Image, list[Box]]:
    """Take the picture, after chairs that hardly show are taken out of ``stage``."""
    side = stage.camera.image_size * SCALE
    light = _random_light(generator)
    empty = Image.new("RGB", (side, side))
    draw_room(ImageDraw.Draw(empty), stage.room, stage.camera, generator, SCALE, light.ambient + 0.3)
    while stage.things:
        chairs = [thing for thing in stage.things if thing.is_chair]
        mesh = Mesh([solid for thing in stage.things for solid in thing.solids])
        labels = [_label(thing, chairs) for thing in stage.things for _ in thing.solids]
        canvas = _with_shadows(empty, mesh, stage.camera, light)
        owners = np.asarray(paint(mesh, stage.camera, light, canvas, labels, SCALE))
        boxes = visible_chairs(stage, mesh, owners, labels)
        hidden = [chair for chair, box in zip(chairs, boxes, strict=True) if box is None]
        if not hidden:
            return develop(canvas.reduce(SCALE), generator), boxes
        stage.things = [thing for thing in stage.things if not any(thing is other for other in hidden)]
    return develop(empty.reduce(SCALE), generator), []


def _label(thing: Thing, chairs: list[Thing]) -> int:
    """1, 2, ... for the chairs, 0 for everything else."""
    return next((number for number, chair in enumerate(chairs, 1) if chair is thing), 0)


def _random_light(generator: Generator) -> Light:
    angle, steep = generator.uniform(0, 2 * math.pi), generator.uniform(0.6, 1.2)
    direction = (math.cos(angle) * math.cos(steep), math.sin(angle) * math.cos(steep), math.sin(steep))
    return Light(direction, generator.uniform(0.45, 0.68), generator.uniform(0.3, 0.55))


def _with_shadows(empty: Image.Image, mesh: Mesh, camera: Camera, light: Light) -> Image.Image:
    """The empty room with the lamp's shadows and the soft ones that everything has right below it."""
    cast = shadow(mesh, camera, light.direction, 0.5).filter(ImageFilter.GaussianBlur(0.8))
    below = shadow(mesh, camera, (0.0, 0.0, 1.0), 0.5).filter(ImageFilter.GaussianBlur(1.8))
    cast = cast.point(lambda value: 255 - int(value * 0.6 * light.strength))
    below = below.point(lambda value: 255 - int(value * 0.4))
    both = ImageChops.multiply(cast, below).resize(empty.size, Image.Resampling.BILINEAR)
    return ImageChops.multiply(empty, Image.merge("RGB", (both, both, both)))


def render_scene(generator: Generator, image_size: int, chairs: int | None = None) -> tuple[Image.Image, list[Box]]:
    """One picture of an indoor scene (RGB, ``image_size`` squared) and the boxes of its chairs.

    Args:
        chairs: how many to try to place; by default none in half of the scenes, else one to four.

    Returns:
        The picture, and the tight visible extents of its chairs as xyxy in absolute pixels. The result
        depends on nothing but the state of ``generator`` and the arguments.
    """
    if chairs is None:
        chairs = 0 if generator.uniform() < EMPTY_SHARE else 1 + int(generator.choice(4, p=CHAIRS_PER_SCENE))
    while True:
        image, boxes = render_stage(compose(generator, image_size, chairs), generator)
        if boxes or not chairs:
            return image, boxes
