"""Paint convex solids back to front with flat shading, and their shadows on the floor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image, ImageDraw

from earlyexit_ssd.data.synthetic.camera import Camera
from earlyexit_ssd.data.synthetic.solids import Colour, Solid

TOUCHING = 0.004  # metres by which neighbours may sink into one another and still count as apart


@dataclass(frozen=True)
class Light:
    """Ambient share and one far lamp; ``direction`` is a unit vector towards the lamp."""

    direction: tuple[float, float, float]
    ambient: float
    strength: float

    def on(self, normals: np.ndarray) -> np.ndarray:
        """Brightness factors [F] of faces with outward unit ``normals`` [F, 3]."""
        # Faces turned up get a little more from the ceiling, those turned down less from the floor.
        sky = 0.12 * normals[:, 2]
        return self.ambient + sky + self.strength * np.maximum(normals @ np.array(self.direction), 0.0)


class Mesh:
    """The solids of a scene with all vertices and face planes in shared arrays.

    Attributes:
        vertices: float [V, 3], metres. ``starts`` int [S]: where each solid's vertices begin.
        face_starts: int [S], where each solid's faces begin; faces are in the order of the solids.
        normals: float [F, 3], unit vectors outwards; ``offsets`` [F] = normal . point on the face.
    """

    def __init__(self, solids: list[Solid]) -> None:
        self.solids = solids
        self.vertices = np.concatenate([solid.vertices for solid in solids])
        counts = np.array([len(solid.vertices) for solid in solids])
        self.starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        face_counts = np.array([len(solid.topology.faces) for solid in solids])
        self.face_starts = np.concatenate([[0], np.cumsum(face_counts)[:-1]])
        owner = np.repeat(np.arange(len(solids)), face_counts)
        corners = np.concatenate([solid.topology.corners for solid in solids]) + self.starts[owner, None]
        a, b, c = (self.vertices[corners[:, i]] for i in range(3))
        normals = np.cross(b - a, c - a)
        normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-12
        middles = np.add.reduceat(self.vertices, self.starts) / counts[:, None]
        inward = ((middles[owner] - a) * normals).sum(axis=1) > 0
        normals[inward] *= -1
        self.normals, self.middles = normals, middles
        self.offsets = (normals * a).sum(axis=1)

    def facing(self, eye: tuple[float, float, float]) -> np.ndarray:
        """Which faces [F] show their outside to ``eye``."""
        return self.normals @ np.array(eye) > self.offsets

    @cached_property
    def beyond(self) -> np.ndarray:
        """bool [F, S]: does solid s lie wholly on the outer side of face f's plane?"""
        normals, points = self.normals.astype(np.float32), self.vertices.T.astype(np.float32)
        # Written out, since a matrix product of this shape wakes all threads of the BLAS library for nothing.
        heights = normals[:, :1] * points[0]
        heights += normals[:, 1:2] * points[1]
        heights += normals[:, 2:] * points[2]
        return np.minimum.reduceat(heights, self.starts, axis=1) > self.offsets[:, None] - TOUCHING


def paint_order(mesh: Mesh, camera: Camera, pixels: np.ndarray) -> list[int]:
    """Indices of the solids, back to front.

    Of two convex solids that a face plane of either parts, the one on the camera's side of the plane is in
    front; pairs that no such plane parts, and the rare circles, go by distance.
    """
    facing = mesh.facing(camera.eye)
    beyond = mesh.beyond
    # What is beyond a face that we see cannot be hidden by that face's solid; what is beyond a face that we
    # do not see cannot hide that face's solid. never_hides[a, b]: a does not hide b.
    never_hides = np.logical_or.reduceat(beyond & facing[:, None], mesh.face_starts, axis=0)
    never_hides |= np.logical_or.reduceat(beyond & ~facing[:, None], mesh.face_starts, axis=0).T
    low = np.minimum.reduceat(pixels, mesh.starts)
    high = np.maximum.reduceat(pixels, mesh.starts)
    overlap = (low[:, None] < high[None]).all(axis=2)
    overlap &= overlap.T
    # before[a, b]: a has to be painted before b.
    before = overlap & never_hides & ~never_hides.T
    np.fill_diagonal(before, False)
    distance = np.linalg.norm(mesh.middles - camera.eye, axis=1)
    waiting = before.sum(axis=0)
    order = []
    for _ in range(len(distance)):
        # The farthest of those that wait for nothing; in a circle, of those that wait for the fewest.
        score = distance - 1e6 * np.maximum(waiting, 0)
        pick = int(score.argmax())
        order.append(pick)
        waiting = waiting - before[pick]
        distance[pick] = -np.inf
    return order


def paint(mesh: Mesh, camera: Camera, light: Light, canvas: Image.Image, labels: list[int], scale: int) -> Image.Image:
    """Paint the solids on ``canvas`` (RGB, ``scale`` times the camera's pixels), in place.

    Returns:
        A picture of mode L and the same size with ``labels[solid]`` in [0, 255] where a solid is the
        front-most, 0 elsewhere.
    """
    pixels = camera.screen(camera.view(mesh.vertices)) * scale
    order = paint_order(mesh, camera, pixels)
    shown = mesh.facing(camera.eye).tolist()
    brightness = light.on(mesh.normals).tolist()
    points = [(x, y) for x, y in pixels.tolist()]
    owners = Image.new("L", canvas.size)
    draw, mark = ImageDraw.Draw(canvas), ImageDraw.Draw(owners)
    for index in order:
        solid, start, first = mesh.solids[index], int(mesh.starts[index]), int(mesh.face_starts[index])
        for number, face in enumerate(solid.topology.faces, first):
            if shown[number]:
                outline = [points[start + corner] for corner in face]
                draw.polygon(outline, fill=_tone(solid.colour, brightness[number]))
                mark.polygon(outline, fill=labels[index])
                if solid.stripes > 1 and len(face) == 4:
                    _stripes(draw, outline, solid.stripes, _tone(solid.stripe_colour, brightness[number]))
    return owners


def silhouette(mesh: Mesh, camera: Camera, chosen: list[int], size: tuple[int, int], scale: int) -> Image.Image:
    """255 where any of the ``chosen`` solids would be seen if nothing stood before them, mode L."""
    pixels = camera.screen(camera.view(mesh.vertices)) * scale
    points = [(x, y) for x, y in pixels.tolist()]
    shown = mesh.facing(camera.eye)
    mask = Image.new("L", size)
    draw = ImageDraw.Draw(mask)
    for index in chosen:
        start, first = int(mesh.starts[index]), int(mesh.face_starts[index])
        for number, face in enumerate(mesh.solids[index].topology.faces, first):
            if shown[number]:
                draw.polygon([points[start + corner] for corner in face], fill=255)
    return mask


def shadow(mesh: Mesh, camera: Camera, direction: tuple[float, float, float], scale: float) -> Image.Image:
    """255 on the floor where the solids keep a lamp in ``direction`` from shining, mode L."""
    side = round(camera.image_size * scale)
    x, y, z = direction
    fallen = mesh.vertices.copy()
    fallen[:, 0] -= fallen[:, 2] * (x / z)
    fallen[:, 1] -= fallen[:, 2] * (y / z)
    fallen[:, 2] = 0.0
    viewed = camera.view(fallen)
    safe = (viewed[:, 2] > 0.3).tolist()
    viewed[:, 2] = np.maximum(viewed[:, 2], 0.3)
    points = [(u, v) for u, v in (camera.screen(viewed) * scale).tolist()]
    lit = (mesh.normals @ np.array(direction) > 0).tolist()
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    for solid, start, first in zip(mesh.solids, mesh.starts.tolist(), mesh.face_starts.tolist(), strict=True):
        for number, face in enumerate(solid.topology.faces, first):
            if lit[number] and all(safe[start + corner] for corner in face):
                draw.polygon([points[start + corner] for corner in face], fill=255)
    return mask


def _tone(colour: Colour, brightness: float) -> tuple[int, int, int]:
    return tuple(min(255, max(0, int(channel * brightness))) for channel in colour)


def _stripes(draw: ImageDraw.ImageDraw, outline: list[tuple[float, float]], bands: int, fill: tuple) -> None:
    """Every second of ``bands`` strips between the first and the opposite side of a quadrilateral."""
    (ax, ay), (bx, by), (cx, cy), (dx, dy) = outline
    for band in range(0, bands, 2):
        s, t = band / bands, (band + 1) / bands
        draw.polygon(
            [
                (ax + (bx - ax) * s, ay + (by - ay) * s),
                (ax + (bx - ax) * t, ay + (by - ay) * t),
                (dx + (cx - dx) * t, dy + (cy - dy) * t),
                (dx + (cx - dx) * s, dy + (cy - dy) * s),
            ],
            fill=fill,
        )
