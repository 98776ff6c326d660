"""Photos as arrays (every colour mode becomes 8-bit RGB, every rotation the one the boxes refer to); boxes on them."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.Image import Transpose

from earlyexit_ssd.errors import DataError

_ORIENTATION_TAG = 0x0112
# What turns a picture of EXIF orientation 2, 3, ... 8 upright.
_TURNS = (
    *(Transpose.FLIP_LEFT_RIGHT, Transpose.ROTATE_180, Transpose.FLIP_TOP_BOTTOM),
    *(Transpose.TRANSPOSE, Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90),
)

Size = tuple[int, int]
PathLike = str | os.PathLike[str]

# of photos that are looked for by name, in any case
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".avif")
LARGEST_PHOTO = 89_478_485  # pixels; Pillow's own mark. A file of half a megabyte can hold more than the memory does


class PhotoHeader(NamedTuple):
    size: Size  # (width, height) that read_image will return
    peculiarities: dict[str, str]  # kind -> what it has to convert: {"EXIF-rotated photo": "EXIF orientation 6"}


def read_image(path: PathLike, annotated_size: Size | None = None) -> np.ndarray:
    """The photo as uint8 RGB [H, W, 3].

    Grey is repeated, transparency is laid on white, palettes are looked up, 16 bits are scaled to 8, CMYK
    is converted, and the first frame of an animation is taken. EXIF rotation is applied unless ``annotated_size``
    (width, height) shows that the boxes refer to the stored picture (see :func:`read_header`).

    Raises:
        DataError: the file is missing, no image, truncated, or of more than ``LARGEST_PHOTO`` pixels.
    """
    with open_photo(path) as image:
        orientation = _orientation(image, annotated_size)
        return np.array(_turned(_to_rgb(image), orientation))


def read_thumbnail(path: PathLike, annotated_size: Size | None, side: int) -> Image.Image:
    """The photo as :func:`read_image` turns it, shrunk to a largest side of ``side`` pixels; same errors."""
    with open_photo(path) as image:
        orientation = _orientation(image, annotated_size)
        image.draft("RGB", (side, side))  # a large JPEG is decoded at a fraction of its size
        small = _to_rgb(image)
        small.thumbnail((side, side))
        return _turned(small, orientation)


def read_header(path: PathLike, annotated_size: Size | None = None) -> PhotoHeader:
    """The size that :func:`read_image` will return, and what it will have to convert, without decoding.

    Some tools annotate the stored picture, others the upright one. Where the annotated size equals the stored size and
    not the upright one, the picture stays as stored. In every other case (half turns, mirrored, square, sizes that
    match neither) the EXIF rotation is applied.

    Truncated files are found too: JPEG by its end marker, PNG by its checksums, other formats by decoding.

    Raises:
        DataError: as :func:`read_image`.
    """
    with open_photo(path) as image:
        header = PhotoHeader(_upright(image, _orientation(image, annotated_size)), _peculiarities(image))
        if image.format == "PNG":
            image.verify()
        elif image.format not in ("JPEG", "MPO") or not _ends_as_jpeg(path):
            read_image(path)
    return header


@contextlib.contextmanager
def open_photo(path: PathLike) -> Iterator[Image.Image]:
    """The photo, not decoded yet: a regular file, since a pipe or a device may have no end, of a size that memory
    holds. What goes wrong inside is a DataError too."""
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
    kinds = []
    if image.mode[0] in "IF" or any(";16" in str(tile) for tile in image.tile):
        kinds.append("photo of more than 8 bits")
    if "transparency" in image.info or image.mode.endswith(("A", "a")):
        kinds.append("photo with transparency")
    elif image.mode != "RGB" and image.mode[0] not in "IF":
        named = {"1": "grey photo", "L": "grey photo", "P": "palette photo", "CMYK": "CMYK photo"}
        kinds.append(named.get(image.mode, "photo of other colours"))
    found = dict.fromkeys(kinds, f"Pillow mode {image.mode}")
    if (orientation := _orientation(image)) > 1:
        found["EXIF-rotated photo"] = f"EXIF orientation {orientation}"
    return found


def _orientation(image: Image.Image, annotated_size: Size | None = None) -> int:
    """EXIF's number, 5 to 8 for a quarter turn; 1 where the picture is to stay as it is stored."""
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1  # Pillow turns TIFF itself, and would decode a whole PNG to look for EXIF behind its pixels
    found = image.getexif().get(_ORIENTATION_TAG, 1)
    stays = found not in range(2, 9) or image.size == annotated_size != _upright(image, found)
    return 1 if stays else found


def _upright(image: Image.Image, orientation: int) -> Size:
    return image.size[::-1] if orientation >= 5 else image.size


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    return image if orientation == 1 else image.transpose(_TURNS[orientation - 2])


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode[0] in "IF":
        values = np.asarray(image).astype(np.float64)  # integers hold 0..65535, floats 0..1 or, beyond 1, 0..255
        scale = 255 / 65535 if image.mode != "F" else (255.0 if values.max(initial=0) <= 1 else 1.0)
        image = Image.fromarray(np.rint(values * scale).clip(0, 255).astype(np.uint8))
    elif image.mode.endswith(("A", "a")) or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _ends_as_jpeg(path: PathLike) -> bool:
    """Padding of zeros aside."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 64))
        return file.read().rstrip(b"\0").endswith(b"\xff\xd9")


def find_files(folder: Path, suffixes: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Files of ``suffixes`` (in any case) in and below ``folder``, and all others, sorted; hidden ones are left out.

    Folders that are symbolic links are looked into, each once. One that cannot be read is a DataError.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}); make the folder readable") from None

    found: tuple[list[Path], list[Path]] = [], []
    seen: set[str] = set()
    for here, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        if (place := os.path.realpath(here)) in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = [name for name in folders if name[0] != "."]
        for path in (Path(here, name) for name in files if name[0] != "."):
            found[not (path.suffix.lower() in suffixes and os.path.isfile(path))].append(path)
    return sorted(found[0]), sorted(found[1])


PALETTE = ("#e53e3e", "#3182ce", "#38a169", "#d69e2e", "#805ad5", "#00a3c4", "#d53f8c", "#975a16")
BANNER = "#1a202c"
SMALLEST_TEXT = 12


def draw_boxes(
    image: Image.Image,
    boxes: Iterable[Sequence[float]],
    texts: Sequence[str],
    colors: Sequence[str],
    text_size: int = SMALLEST_TEXT,
    banner: str = "",
) -> Image.Image:
    """Draw xyxy ``boxes`` (N of them, in the image's pixels), the most important first, into ``image``, and return it.

    A box's text stands above it, or inside at the top edge; it is left out where it would cover another text, since
    in a crowd the texts would hide the photo. ``banner`` stands in the upper left corner, on everything.
    """
    draw, font, boxes = ImageDraw.Draw(image), font_of(text_size), [tuple(box) for box in boxes]
    for (x1, y1, x2, y2), color in reversed(list(zip(boxes, colors, strict=True))):
        draw.rectangle((x1, y1, max(x2, x1), max(y2, y1)), outline=color, width=max(2, text_size // 6))
    height = sum(font.getmetrics())
    taken: list[tuple[float, float, float]] = []
    for (x1, y1, *_), text, color in zip(boxes, texts, colors, strict=True):
        width = draw.textlength(text, font) + 6
        x = min(max(x1, 0), max(image.width - width, 0))
        y = y1 - height if y1 >= height else max(y1, 0)
        if any(x < end and start < x + width and abs(y - other) < height for start, end, other in taken):
            continue
        taken.append((x, x + width, y))
        draw.rectangle((x, y, x + width, y + height), fill=color)
        draw.text((x + 3, y), text, "white", font)
    if banner:
        draw.rectangle((0, 0, draw.textlength(banner, font) + 6, height), fill=BANNER)
        draw.text((3, 0), banner, "white", font)
    return image


def color_of(label: int) -> str:
    """Of a class; labels count from 1."""
    return PALETTE[(label - 1) % len(PALETTE)]


@functools.lru_cache(maxsize=8)
def font_of(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, so that no font file is needed."""
    return ImageFont.load_default(size)
