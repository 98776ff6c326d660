"""Photos as arrays: every colour mode becomes 8-bit RGB, every rotation the one the boxes refer to."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from earlyexit_ssd.errors import DataError

_ORIENTATION_TAG = 0x0112
# EXIF orientation -> how to turn the stored picture upright; 5 to 8 swap width and height.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_JPEG_END = b"\xff\xd9"
_WHITE = (255, 255, 255, 255)

# Pillow's modes that read_image has to convert, and what such a photo is called.
_PECULIAR_MODES = {
    "1": "grey photo",
    "L": "grey photo",
    "LA": "photo with transparency",
    "La": "photo with transparency",
    "PA": "photo with transparency",
    "RGBA": "photo with transparency",
    "RGBa": "photo with transparency",
    "P": "palette photo",
    "CMYK": "CMYK photo",
}

Size = tuple[int, int]
PathLike = str | os.PathLike[str]

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".avif")
"""Of photos that are looked for by name, in any case."""

LARGEST_PHOTO = 89_478_485
"""Pixels; Pillow's own mark. A file of half a megabyte can hold more than the memory does."""


class PhotoHeader(NamedTuple):
    """What is known of a photo without decoding it.

    Attributes:
        size: (width, height) that :func:`read_image` will return.
        peculiarities: kind -> value of what :func:`read_image` has to convert, such as
            ``{"EXIF-rotated photo": "EXIF orientation 6"}``; empty for 8-bit RGB that lies upright.
    """

    size: Size
    peculiarities: dict[str, str]


def read_image(path: PathLike, annotated_size: Size | None = None) -> np.ndarray:
    """The photo as uint8 RGB [H, W, 3].

    Grey is repeated, transparency is laid on white, palettes are looked up, 16 bits are scaled to 8, CMYK
    is converted, and the first frame of an animation is taken. EXIF rotation is applied unless
    ``annotated_size`` shows that the boxes refer to the stored picture (see :func:`read_header`).

    Args:
        annotated_size: (width, height) of the picture in its annotations, if there are any.

    Raises:
        DataError: the file is missing, no image, truncated, or of more than ``LARGEST_PHOTO`` pixels.
    """
    with _opened(path) as image:
        turn = _turn(image, annotated_size)
        rgb = _to_rgb(image)
        return np.array(rgb if turn is None else rgb.transpose(turn))


def read_header(path: PathLike, annotated_size: Size | None = None) -> PhotoHeader:
    """The size that :func:`read_image` will return, and what it will have to convert, without decoding.

    Some tools annotate the stored picture, others the upright one. The annotated size tells which, for
    rotations by a quarter: where it equals the stored size and not the upright one, the picture stays as
    stored. In every other case (half turns, mirrored, square, sizes that match neither) the EXIF rotation
    is applied.

    Truncated files are found here too: JPEG by its end marker, PNG by its checksums, other formats by
    decoding.

    Raises:
        DataError: as :func:`read_image`.
    """
    with _opened(path) as image:
        size = _upright(image.size, _turn(image, annotated_size))
        header = PhotoHeader(size, _peculiarities(image))
        if image.format == "PNG":
            image.verify()
        elif image.format not in ("JPEG", "MPO") or not _ends_with(path, _JPEG_END):
            read_image(path)
    return header


@contextlib.contextmanager
def _opened(path: PathLike) -> Iterator[Image.Image]:
    """A regular file, since a pipe or a device may have no end, of a size that memory holds.

    Raises:
        DataError: it is none, or what is done with it fails.
    """
    if not os.path.isfile(path):
        what = "no file but a folder, pipe or device, expected a photo" if os.path.exists(path) else "no such photo"
        raise DataError(f"{path}: {what}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
        with image:
            if image.width * image.height > LARGEST_PHOTO:
                sizes = f"{image.width} x {image.height} pixels, expected {LARGEST_PHOTO:,} in all at most"
                raise DataError(f"{path}: photo of {sizes}; save it smaller")
            yield image
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen types on broken files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: not a readable photo ({reason})") from None


def _peculiarities(image: Image.Image) -> dict[str, str]:
    found = {}
    deep = image.mode[0] in "IF" or any(";16" in str(tile) for tile in image.tile)
    if deep:
        found["photo of more than 8 bits"] = f"Pillow mode {image.mode}"
    if "transparency" in image.info:
        found["photo with transparency"] = f"Pillow mode {image.mode}"
    elif image.mode != "RGB" and image.mode[0] not in "IF":
        found[_PECULIAR_MODES.get(image.mode, "photo of other colours")] = f"Pillow mode {image.mode}"
    if _turn(image, None) is not None:
        found["EXIF-rotated photo"] = f"EXIF orientation {image.getexif()[_ORIENTATION_TAG]}"
    return found


def _turn(image: Image.Image, annotated_size: Size | None) -> Image.Transpose | None:
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return None  # Pillow turns TIFF itself, and would decode a whole PNG to look for EXIF behind its pixels
    turn = _TURNS.get(image.getexif().get(_ORIENTATION_TAG, 1))
    stored, upright = image.size, _upright(image.size, turn)
    return None if annotated_size == stored and annotated_size != upright else turn


def _upright(stored: Size, turn: Image.Transpose | None) -> Size:
    swaps = turn in (_TURNS[5], _TURNS[6], _TURNS[7], _TURNS[8])
    return (stored[1], stored[0]) if swaps else stored


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _to_8_bits(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, _WHITE), rgba).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Deep grey to 8 bits: integers hold 0..65535, floats 0..1 or, where they exceed 1, 0..255."""
    values = np.asarray(image).astype(np.float64)
    scale = 255 / 65535 if image.mode != "F" else (255.0 if values.max(initial=0) <= 1 else 1.0)
    return Image.fromarray(np.rint(values * scale).clip(0, 255).astype(np.uint8))


def _ends_with(path: PathLike, marker: bytes) -> bool:
    """Whether the file ends with ``marker``, padding of zeros aside."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 64))
        return file.read().rstrip(b"\0").endswith(marker)


def find_files(folder: Path, suffixes: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Files of ``suffixes`` (in any case) in and below ``folder``, and all others, sorted; hidden ones are left out.

    Folders that are symbolic links are looked into, each once.

    Raises:
        DataError: a folder cannot be read.
    """
    found: tuple[list[Path], list[Path]] = [], []
    for path in _files(folder):
        found[not (path.suffix.lower() in suffixes and os.path.isfile(path))].append(path)
    return sorted(found[0]), sorted(found[1])


def _files(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}); make the folder readable") from None

    seen: set[str] = set()
    for here, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        place = os.path.realpath(here)
        folders[:] = [] if place in seen else [name for name in folders if name[0] != "."]
        if place not in seen:
            yield from (Path(here, name) for name in files if name[0] != ".")
        seen.add(place)
