"""A rendered data set of rooms with and without chairs, for a first run without a download.

Furniture is made of cuboids. A chair is a seat with supports below it and a back above it. Stools, tables, sofas,
cabinets, boards on legs, plants, lamps and crates have similar parts and colours. Coordinates are in metres: x to the
right, y away from the camera, z up.
"""

import math
import os
import shutil
import tempfile
from pathlib import Path

import cv2
import numpy as np
from numpy.random import Generator
from PIL import Image, ImageFilter

from earlyexit_ssd.console import progress
from earlyexit_ssd.files import lock, make_folder, write_image, write_json, writing

FOLDER = "synthetic_chairs"
SPLITS = ("train", "calib", "test")
CATEGORY = {"id": 62, "name": "chair", "supercategory": "furniture"}  # COCO's own id
VERSION = 2  # increase it when the same settings render other pictures
SCALE = 2  # supersampling factor of each side
MIN_VISIBLE = 0.45  # share of a chair's pixels that must be visible; otherwise the chair is removed from the scene
MIN_SIDE = 8.0  # pixels, the shortest side of a chair's box
EMPTY_SHARE = 0.5  # probability of a scene without chairs
CHAIRS_PER_SCENE = (0.46, 0.3, 0.15, 0.09)  # probabilities of 1, 2, 3 and 4
Box = tuple[float, float, float, float]  # x1, y1, x2, y2, absolute pixels
Light = tuple[np.ndarray, float]  # position of the lamp, and brightness of surfaces that it does not reach
_CORNERS = np.array([(x, y, z) for z in (0.0, 1.0) for x, y in ((-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5))])
_FACES = np.array([(0, 1, 5, 4), (1, 2, 6, 5), (2, 3, 7, 6), (3, 0, 4, 7), (4, 5, 6, 7), (3, 2, 1, 0)])


class Camera:
    """A pinhole camera at ``eye`` with a picture of ``size`` x ``size`` pixels and a focal length of ``focal`` times
    ``size``. ``yaw`` turns it to the left of the y axis, ``pitch`` downwards (radians)."""

    def __init__(self, eye: tuple[float, float, float], yaw: float, pitch: float, focal: float, size: int) -> None:
        self.eye, self.focal, self.size = np.array(eye, np.float32), focal, size
        s, c, sp, cp = math.sin(yaw), math.cos(yaw), math.sin(pitch), math.cos(pitch)
        # rows: unit vectors to the right, down and forward
        self.axes = np.array([(c, s, 0), (s * sp, -c * sp, -cp), (-s * cp, c * cp, -sp)], np.float32)

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Project ``points`` [..., 3] to pixels [..., 2] and depths [...] in metres."""
        viewed = (points - self.eye) @ self.axes.T
        depth = viewed[..., 2:]
        return viewed[..., :2] * (self.focal * self.size / np.maximum(depth, 0.05)) + self.size / 2, depth[..., 0]


def part(x: float, y: float, z: float, size: tuple, colour: np.ndarray, narrow: float = 1.0) -> list[float]:
    """Return a cuboid of ``size`` with the centre of its bottom at (x, y, z). ``colour`` is RGB in [0, 1]. The top is
    ``narrow`` times as wide as the bottom."""
    return [x, y, z, *size, narrow, *colour]


class Furniture:
    """A piece of furniture of ``parts`` at (x, y), rotated by ``yaw`` (radians). ``flat`` pieces hang on a wall, behind
    everything else."""

    def __init__(self, parts: list, x: float, y: float, yaw: float = 0.0, chair: bool = False, flat: bool = False):
        self.parts, self.x, self.y, self.chair, self.flat = np.array(parts), x, y, chair, flat
        rows, (right, ahead, up) = self.parts[:, :, None], _CORNERS.T
        narrowed, c, s = 1 - (1 - rows[:, 6]) * up, math.cos(yaw), math.sin(yaw)
        u, v = rows[:, 0] + right * rows[:, 3] * narrowed, rows[:, 1] + ahead * rows[:, 4] * narrowed
        self.corners = np.stack((x + c * u - s * v, y + s * u + c * v, rows[:, 2] + rows[:, 5] * up), axis=-1)
        self.radius = math.sqrt((u * u + v * v).max())  # of its bounding circle around (x, y)


def paint(things: list[Furniture], camera: Camera, canvas: np.ndarray, light: Light) -> list[Box | None]:
    """Paint furniture on ``canvas`` (uint8 [H, W, 4], ``SCALE`` times the camera's size), in place.

    The fourth channel becomes a mask: i for visible pixels of the i-th chair of ``things`` (from 1), otherwise 0.
    Return for each chair the tight box around its visible pixels (xyxy, pixels of the camera), or None if too little of
    the chair is visible.
    """
    (lamp, ambient), chairs = light, [thing.chair for thing in things]
    # Pieces are painted from far to near. For circles that do not meet, distance**2 - radius**2 gives a correct order.
    order = np.argsort([t.radius**2 - math.dist((t.x, t.y), camera.eye[:2]) ** 2 - 1e6 * t.flat for t in things])
    labels = (np.cumsum(chairs) * chairs).tolist()
    position = np.repeat(np.arange(len(things)), [len(things[index].parts) for index in order])
    parts, corners = (np.concatenate([getattr(things[k], name) for k in order]) for name in ("parts", "corners"))
    faces, middles = corners[:, _FACES], corners.mean(axis=1)
    normals = np.cross(faces[:, :, 1] - faces[:, :, 0], faces[:, :, 3] - faces[:, :, 0])
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True) + 1e-9
    to_lamp = (lamp - middles) / np.linalg.norm(lamp - middles, axis=1, keepdims=True)
    brightness = np.maximum((normals * to_lamp[:, None]).sum(axis=-1), 0) * (1.2 - ambient) + ambient
    facing = ((camera.eye - faces[:, :, 0]) * normals).sum(axis=-1) > 0  # the camera
    # Within a piece paint from low to high: the camera is above all seats and boards, so objects on them hide them.
    by_height = np.lexsort((-np.linalg.norm(middles - camera.eye, axis=1), parts[:, 2], position))
    row, face = np.nonzero(facing[by_height])
    row = by_height[row]
    outlines = (camera.project(faces[row, face])[0] * (SCALE * 16) - 8).astype(np.int32)  # in 1/16 pixels
    tones = np.clip(parts[row, 7:] * brightness[row, face][:, None] * 255, 0, 255).tolist()
    ends, full_area = np.searchsorted(position[row], np.arange(len(things) + 1)), [0] * (max(labels) + 1)
    for index, start, end in zip(order, ends, ends[1:], strict=False):
        for outline, tone in zip(outlines[start:end], tones[start:end], strict=True):
            cv2.fillConvexPoly(canvas, outline, (*tone, labels[index]), shift=4)
        if chairs[index]:
            full_area[labels[index]] = np.count_nonzero(canvas[..., 3] == labels[index])
    boxes: list[Box | None] = []
    for label, pixels in enumerate(full_area[1:], 1):
        mask = (canvas[..., 3] == label).astype(np.uint8)
        x, y, w, h = (side / SCALE for side in cv2.boundingRect(mask))
        hidden = np.count_nonzero(mask) < MIN_VISIBLE * pixels or min(w, h) < MIN_SIDE
        boxes.append(None if hidden else (x, y, x + w, y + h))
    return boxes


def _colour(rng: Generator) -> np.ndarray:
    """Return a random colour, RGB in [0, 1]: wood, grey or paint."""
    kind, level = rng.random(), rng.uniform(0.2, 1.0)
    wood = np.clip(np.array((0.86, 0.6, 0.36)) * level + rng.normal(0, 0.03, 3), 0, 1)
    return wood if kind < 0.4 else np.full(3, level) if kind < 0.6 else rng.uniform(0.1, 1.0, 3) * level


def _board(rng: Generator, w: float, d: float, h: float) -> tuple[list, np.ndarray]:
    """Return the parts of a seat or table at height ``h`` with legs of width t, and the colour of the board."""
    t, thick, frame, cover = rng.uniform(0.025, 0.05) * (1 + w / 3), rng.uniform(0.03, 0.08), _colour(rng), _colour(rng)
    cover, h, rung = frame if rng.random() < 0.4 else cover, h - thick, rng.uniform(0.2, 0.7) * h
    if rng.random() < 0.2:  # a column on a cross
        sizes = (0.7 * w, 1.4 * t, t), (1.4 * t, 0.7 * d, t), (1.5 * t, 1.5 * t, h)
        legs = [part(0, 0, z, size, frame) for z, size in zip((0, 0, 0.01), sizes, strict=True)]
    else:
        legs = [part(x * (w - t) / 2, y * (d - t) / 2, 0, (t, t, h), frame) for x in (-1, 1) for y in (-1, 1)]
        legs += [part(x * (w - t) / 2, 0, rung, (t / 2, d - t, t / 2), frame) for x in (-1, 1) if rung < 0.4 * h]
    return [*legs, part(0, 0, h, (w, d, thick), cover)], cover


def _sofa(rng: Generator, w: float, d: float, h: float, back: float) -> list:
    """Return the parts of a sofa with arms, closed from the floor to the seat at height ``h``."""
    t, colour = rng.uniform(0.1, 0.16), _colour(rng)
    parts = [part(0, 0, 0.05, (w, d, h - 0.05), colour), part(0, (d - t) / 2, h, (w, t, back), colour)]
    return parts + [part(x * (w - t) / 2, -t / 2, h, (t, d - t, 0.2), colour) for x in (-1, 1)]


def chair(rng: Generator) -> list:
    """Return the parts of a random dining, office, bar or arm chair. Its front is at -y."""
    (w, d, h, back), kind = rng.uniform((0.38, 0.38, 0.41, 0.36), (0.52, 0.5, 0.5, 0.6)), rng.random()
    if kind < 0.12:
        return _sofa(rng, w + 0.25, d + 0.2, h, 0.8 * back)
    h += 0.2 * (kind < 0.18)
    parts, cover = _board(rng, w, d, h)
    t, rail, gap, count = *rng.uniform((0.02, 0.04, 0.0), (0.035, 0.09, 0.2)), int(rng.integers(2, 5))
    pieces = [(x * (w - t) / 2, 0, t, back) for x in (-1, 1)]  # x, z, width and height
    if kind < 0.6:  # a panel
        pieces += [(0, gap, w - 2 * t, back - gap)]
    elif kind < 0.8:  # rails from post to post
        pieces += [(0, back * (i + 0.8) / count - rail, w - 2 * t, rail) for i in range(count)]
    else:  # upright slats
        slats = [(w * ((i + 1) / (count + 1) - 0.5), 0, 0.7 * t, back - rail) for i in range(count)]
        pieces += [*slats, (0, back - rail, w - 2 * t, rail)]
    return parts + [part(x, (d - t) / 2, h + z, (width, t, height), cover) for x, z, width, height in pieces]


def _other(rng: Generator) -> list:
    """Return the parts of a random stool, table (with or without objects on it), plant, lamp, crates, pouf, or board on
    two legs."""
    kind, colour, (w, d, h, high) = rng.random(), _colour(rng), rng.uniform((0.3, 0.3, 0.4, 0.2), (0.5, 0.5, 0.7, 0.5))
    if kind < 0.3:
        return _board(rng, w, d, h)[0]
    if kind < 0.65:
        w, d, h = 2.6 * w, 1.6 * d, 0.43 if kind < 0.4 else 0.75
        sizes = rng.uniform((-0.3, -0.3, 0.06, 0.03, 0.06), (0.3, 0.3, 0.35, 0.15, 0.3), (rng.integers(0, 3), 5))
        return _board(rng, w, d, h)[0] + [part(x * w, y * d, h, size, _colour(rng)) for x, y, *size in sizes]
    if kind < 0.75:
        green, tops = rng.uniform(0.2, 0.7), rng.uniform((-0.18, -0.18, 0.3), (0.18, 0.18, 0.9), (8, 3))
        leaves = [part(x, y, 0.25, (0.1, 0.04, z), np.array((z / 3, green, z / 3)), 0.2) for x, y, z in tops]
        return [part(0, 0, 0, (0.28, 0.28, 0.25), colour), *leaves]
    if kind < 0.83:
        stand = [part(0, 0, 0, (d, d, 0.03), colour), part(0, 0, 0.01, (0.03, 0.03, 2 * h + 0.1), colour)]
        return [*stand, part(0, 0, 2 * h + 0.1, (w, w, high), _colour(rng), 0.7)]
    if kind < 0.91:
        count = rng.integers(1, 4)
        return [part(0, 0, i * high, (w - 0.1 * i, d, high), colour * (1 - 0.15 * i)) for i in range(count)]
    legs = [part(x * w / 2, 0, 0, (0.03, 0.03, h), colour) for x in (-1, 1)]
    return [*legs, part(0, 0, h, (w + 0.1, 0.03, high), _colour(rng))]


def _at_wall(rng: Generator, flat: bool) -> list:
    """Return the parts of a sofa or a cabinet or, if ``flat``, of a picture, a window or a door. The front is at -y."""
    front, colour, kind, (rows, columns) = _colour(rng), _colour(rng), rng.random(), rng.integers(1, 6, 2)
    if flat:
        w, h, z = rng.uniform((0.3, 0.4, 1.0), (1.2, 1.2, 1.4)) if kind < 0.7 else (0.85, 2.0, 0.0)
        inner = part(0, -0.03, z + 0.04, (w - 0.1, 0.02, h - 0.08), front if kind > 0.3 else np.full(3, 0.9))
        return [part(0, 0, z, (w, 0.04, h), colour), inner]
    if kind < 0.35:
        return _sofa(rng, rng.uniform(1.2, 2.0), 0.8, 0.43, 0.4)
    w, d, h = rng.uniform((0.5, 0.3, 0.5), (1.3, 0.5, 1.9))
    spots = [(w * ((i + 0.5) / columns - 0.5), h * (j + 0.08) / rows) for i in range(columns) for j in range(rows)]
    size = (0.9 * w / columns, 0.02, 0.85 * h / rows)
    return [part(0, 0, 0, (w, d, h), colour), *(part(x, -d / 2, z, size, front) for x, z in spots)]


def _pattern(rng: Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return brightness factors around 1 at (u, v) of a surface with planks, stripes, tiles or patches."""
    (a, b), k, strength = rng.uniform(0.08, 0.5, 2).tolist(), (0, 0, 1, 7)[rng.integers(4)], rng.uniform(0.0, 0.25)
    tones = rng.uniform(1 - strength, 1 + strength, rng.choice((2, 61))).astype(np.float32)
    return tones[(np.floor(u / a) + k * np.floor(v / b)).astype(np.int32) % len(tones)]


def _empty_room(rng: Generator, room: np.ndarray, camera: Camera, light: Light, things: list[Furniture]) -> np.ndarray:
    """Render floor, walls and ceiling with the shadows of ``things``, as a canvas for ``paint``."""
    size, (lamp, ambient) = camera.size, light
    grid = ((np.arange(size, dtype=np.float32) + 0.5) / size - 0.5) / camera.focal
    rays = [right * grid + (down * grid)[:, None] + forward for right, down, forward in camera.axes.T]
    rays = [np.where(ray == 0, np.float32(1e-30), ray) for ray in rays]  # parallel to a wall
    steps = [(np.where(ray >= 0, end, 0) - at) / ray for ray, end, at in zip(rays, room, camera.eye, strict=True)]
    step = np.minimum(np.minimum(steps[0], steps[1]), steps[2])
    x, y, z = (at + ray * step for at, ray in zip(camera.eye, rays, strict=True))
    floor, ceiling = (step == steps[2]) & (rays[2] < 0), (step == steps[2]) & (rays[2] > 0)
    shadow, turn = np.zeros((size, size), np.uint8), np.linspace(0, 2 * math.pi, 12, endpoint=False)
    for thing in [thing for thing in things if not thing.flat]:
        middle = np.array((thing.x, thing.y, 0)) * 1.1 - (*lamp[:2] * 0.1, 0)
        ring = np.stack((np.cos(turn), np.sin(turn), 0 * turn), axis=1) * (0.8 * thing.radius)
        cv2.fillConvexPoly(shadow, camera.project(ring + middle)[0].astype(np.int32), 255)
    shadow = np.asarray(Image.fromarray(shadow).filter(ImageFilter.BoxBlur(size / 40)))
    tone = ambient + (1.2 - ambient) / (1 + ((x - lamp[0]) ** 2 + (y - lamp[1]) ** 2 + (z - lamp[2]) ** 2) / 6)
    tone *= 255 - floor * shadow * np.float32(rng.uniform(0.3, 0.6))
    tone *= np.where(floor, _pattern(rng, x, y), np.where(ceiling, 1, _pattern(rng, x + y, z)))
    paints, canvas = np.full((3, 3), 0.9, np.float32), np.zeros((size, size, 4), np.uint8)
    paints[:2] = 0.15 + 0.85 * _colour(rng), 0.15 + 0.85 * _colour(rng)
    canvas[..., :3] = np.minimum(paints[np.where(floor, 0, np.where(ceiling, 2, 1))] * tone[..., None], 255)
    return canvas.repeat(SCALE, axis=0).repeat(SCALE, axis=1)


def _furnish(rng: Generator, room: np.ndarray, camera: Camera, count: int, chairs: bool) -> list[Furniture]:
    """Return up to ``count`` chairs (other pieces if not ``chairs``) and the other furniture of the room."""
    things: list[Furniture] = []

    def add(thing: Furniture, whole: bool = False) -> None:
        """Add a piece if it is in the room, in front of the camera and touches no other piece. If ``whole``, at least
        75 % of its box must be inside the picture."""
        free = all(math.hypot(other.x - thing.x, other.y - thing.y) > other.radius + thing.radius for other in things)
        ground, (pixels, depth) = thing.corners[..., :2], camera.project(thing.corners)
        if (free or thing.flat) and depth.min() > 0.4 and (ground > 0).all() and (ground < room[:2]).all():
            low, high = pixels.min(axis=(0, 1)) / camera.size, pixels.max(axis=(0, 1)) / camera.size
            inside = np.clip(high, 0, 1) - np.clip(low, 0, 1)
            if not whole or inside.prod() > 0.75 * (high - low).prod():
                things.append(thing)

    def spot(ahead: float, column: float) -> tuple[float, float, float]:
        """Return x, y and a random yaw, ``ahead`` metres from the camera, at ``column`` in [0, 1] of the picture."""
        x, y = camera.eye[:2] + ahead * (camera.axes[2, :2] + (column - 0.5) / camera.focal * camera.axes[0, :2])
        return x, y, rng.uniform(0, 2 * math.pi)

    for _ in range(8 * count):
        if len(things) < count:
            ahead = 0.9 * camera.focal / math.exp(rng.uniform(math.log(0.2), math.log(0.65)))
            parts = chair(rng) if chairs else _other(rng)
            add(Furniture(parts, *spot(ahead, rng.uniform(0.1, 0.9)), chair=chairs), whole=True)
    for flat in (False, False, True, True, True):
        parts, share, wall = _at_wall(rng, flat), rng.uniform(0.1, 0.9), rng.integers(3)
        back = max(row[4] for row in parts) / 2 + 0.01
        x = (share * room[0], back, room[0] - back)[wall]
        add(Furniture(parts, x, share * room[1] if wall else room[1] - back, (0, 1, -1)[wall] * math.pi / 2, flat=flat))
    for _ in range(int(rng.integers(1, 6))):
        add(Furniture(_other(rng), *spot(rng.uniform(1.2, 4.5), rng.uniform(0, 1))))
    return things


def render_scene(rng: Generator, size: int) -> tuple[Image.Image, list[Box]]:
    """Render a random room. Return an RGB image, ``size`` x ``size``, and the boxes of its chairs (xyxy, pixels)."""
    chairs, count, boxes = rng.random() >= EMPTY_SHARE, 1 + int(rng.choice(4, p=CHAIRS_PER_SCENE)), []
    while not boxes:
        room = rng.uniform((3.0, 4.0, 2.4), (6.5, 7.5, 2.9)).astype(np.float32)
        eye = (room[0] * rng.uniform(0.25, 0.75), rng.uniform(0.1, 1.0), rng.uniform(1.1, 1.7))
        yaw = math.atan2(eye[0] - room[0] / 2, 0.7 * room[1]) + rng.normal(0, 0.2)
        camera = Camera(eye, yaw, 0.25 * (eye[2] - 0.6) + rng.normal(0, 0.05), rng.uniform(0.75, 1.15), size)
        light = rng.uniform((0, 0, 2.2), room).astype(np.float32), rng.uniform(0.5, 0.8)
        things, boxes = _furnish(rng, room, camera, count, chairs), [None]
        empty = _empty_room(rng, room, camera, light, things)
        while None in boxes:  # render again without chairs that are hardly visible
            canvas = empty.copy()
            boxes = paint(things, camera, canvas, light) if things else []
            remaining = iter(boxes)
            things = [thing for thing in things if not thing.chair or next(remaining)]
        if not chairs:
            break
    # camera effects: blur, tint, exposure and noise
    photo = Image.frombuffer("RGBX", canvas.shape[:2], canvas, "raw", "RGBX", 0, 1).reduce(SCALE).convert("RGB")
    if rng.random() < 0.4:
        photo = photo.filter(ImageFilter.BoxBlur(rng.uniform(0.3, 0.9) * size / 160))
    gain = (rng.normal(1, 0.05, 3) * rng.uniform(0.75, 1.2)).astype(np.float32)
    noise = rng.standard_normal((size, size, 1), np.float32) * np.float32(rng.uniform(0.5, 4))
    return Image.fromarray(np.clip(np.asarray(photo) * gain + noise, 0, 255).astype(np.uint8)), boxes


def ensure_synthetic(root: Path, sizes: tuple[int, int, int], image_size: int, seed: int) -> Path:
    """Return the folder of the data set (COCO JSON and JPEG) in ``root``. Render the data set if it does not exist.

    ``sizes`` are the numbers of photos in the splits train, calib and test. A picture depends on its width and height
    ``image_size`` (pixels), ``seed``, its split and its index only. The data set is rendered in a temporary folder and
    renamed, so it is complete if it exists. A lock makes a second process wait for the first. Raise CannotWrite if the
    disk is full or the folder is read-only.
    """
    folder, name = Path(root) / FOLDER, f"{image_size}px_{'_'.join(map(str, sizes))}_seed{seed}_v{VERSION}"
    if not (folder / name).exists():
        make_folder(folder)
        with lock(folder / ".lock", f"{folder} (it is being rendered)", wait=True), writing(folder / name):
            for leftover in folder.glob("*.partial"):  # of a process that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            if not (folder / name).exists():  # another process may have rendered it meanwhile
                with tempfile.TemporaryDirectory(".partial", dir=folder, ignore_cleanup_errors=True) as temporary:
                    _render(Path(temporary) / name, sizes, image_size, seed)
                    os.replace(Path(temporary) / name, folder / name)
    return folder / name


def _render(folder: Path, sizes: tuple[int, int, int], image_size: int, seed: int) -> None:
    jobs = [(split, index) for split, size in enumerate(sizes) for index in range(size)]
    trees = [{"images": [], "annotations": [], "categories": [CATEGORY]} for _ in SPLITS]
    for number, (split, index) in enumerate(progress(jobs, desc="rendering scenes"), 1):
        photo, boxes = render_scene(np.random.default_rng((seed, split, index)), image_size)
        record = {"id": number, "file_name": f"{number:06d}.jpg", "width": image_size, "height": image_size}
        write_image(folder / SPLITS[split] / record["file_name"], photo, quality=90)
        trees[split]["images"].append(record)
        for i, (x1, y1, x2, y2) in enumerate(boxes):
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
            record = {"id": 10 * number + i, "image_id": number, "category_id": CATEGORY["id"], **box}
            trees[split]["annotations"].append(record)
    for split, tree in zip(SPLITS, trees, strict=True):
        write_json(folder / "annotations" / f"instances_{split}.json", tree)
