"""Read photos as 8-bit RGB arrays, in the rotation that the boxes refer to, and draw boxes on photos."""

import contextlib
import functools
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.Image import Transpose

from earlyexit_ssd.errors import DataError

_ORIENTATION_TAG = 0x0112
# The transpositions that turn a picture of EXIF orientation 2, 3, ... 8 upright.
_UPRIGHT = (
    *(Transpose.FLIP_LEFT_RIGHT, Transpose.ROTATE_180, Transpose.FLIP_TOP_BOTTOM),
    *(Transpose.TRANSPOSE, Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90),
)

Size = tuple[int, int]
PathLike = str | os.PathLike[str]

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".avif")
LARGEST_PHOTO = 89_478_485  # pixels; Pillow's limit. Without a limit, a file of half a megabyte could fill the memory


class PhotoHeader(NamedTuple):
    size: Size  # (width, height) that read_image will return
    peculiarities: dict[str, str]  # what read_image will convert, such as {"EXIF-rotated photo": "EXIF orientation 6"}


def read_image(path: PathLike, annotated_size: Size | None = None) -> np.ndarray:
    """Return the photo as uint8 RGB [H, W, 3].

    Grey, palette, CMYK and 16-bit photos are converted, and transparency is blended with white. Of an animation only
    the first frame is read. EXIF rotation is applied unless ``annotated_size`` (width, height) shows that the boxes
    refer to the stored picture (see :func:`read_header`). Raise DataError if the file is missing, not an image or
    truncated, or has more than ``LARGEST_PHOTO`` pixels.
    """
    with open_photo(path) as image:
        orientation = orientation_of(image, annotated_size)
        return np.array(turned(to_rgb(image), orientation))


def read_thumbnail(path: PathLike, annotated_size: Size | None, side: int) -> Image.Image:
    """Return the photo as :func:`read_image` does, shrunk so that its longer side has at most ``side`` pixels."""
    with open_photo(path) as image:
        orientation = orientation_of(image, annotated_size)
        image.draft("RGB", (side, side))  # a large JPEG is decoded at a fraction of its size
        small = to_rgb(image)
        small.thumbnail((side, side))
        return turned(small, orientation)


def read_header(path: PathLike, annotated_size: Size | None = None) -> PhotoHeader:
    """Return the size that :func:`read_image` will return, and what it will convert, without decoding.

    Some tools annotate the stored picture, others the upright picture. If ``annotated_size`` equals the stored size and
    not the upright size, the picture stays as stored. In every other case (half turns, mirrored, square, sizes that
    match neither) the EXIF rotation is applied. Errors are those of :func:`read_image`. Truncation is detected by the
    end marker of JPEG, the checksums of PNG, and by decoding other formats.
    """
    with open_photo(path) as image:
        header = PhotoHeader(_upright_size(image, orientation_of(image, annotated_size)), _peculiarities(image))
        if image.format == "PNG":
            image.verify()
        elif image.format not in ("JPEG", "MPO") or not _ends_as_jpeg(path):
            read_image(path)
    return header


@contextlib.contextmanager
def open_photo(path: PathLike) -> Iterator[Image.Image]:
    """Open a photo without decoding it. Every exception inside the context becomes a DataError too."""
    if not os.path.isfile(path):  # reading a pipe or a device might never end
        problem = "a folder, pipe or device, expected a photo" if os.path.exists(path) else "no such photo"
        raise DataError(f"{path}: {problem}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
        image.filename = ""  # with a name Pillow maps some TIFFs into memory, and then scrambles rotated ones
        with image:
            if image.width * image.height > LARGEST_PHOTO:
                size = f"{image.width} x {image.height} pixels"
                raise DataError(f"{path}: photo of {size}, expected at most {LARGEST_PHOTO:,} in total; shrink it")
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
        by_mode = {"1": "grey photo", "L": "grey photo", "P": "palette photo", "CMYK": "CMYK photo"}
        kinds.append(by_mode.get(image.mode, "photo of other colours"))
    peculiarities = dict.fromkeys(kinds, f"Pillow mode {image.mode}")
    if (orientation := orientation_of(image)) > 1:
        peculiarities["EXIF-rotated photo"] = f"EXIF orientation {orientation}"
    return peculiarities


def orientation_of(image: Image.Image, annotated_size: Size | None = None) -> int:
    """Return the EXIF orientation, 5 to 8 for a quarter turn, or 1 if the picture has to stay as it is stored."""
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1  # Pillow turns TIFF itself, and would decode a whole PNG to find EXIF data after its pixels
    orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    stays = orientation not in range(2, 9) or image.size == annotated_size != _upright_size(image, orientation)
    return 1 if stays else orientation


def _upright_size(image: Image.Image, orientation: int) -> Size:
    return image.size[::-1] if orientation >= 5 else image.size


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """Return the picture of this EXIF orientation turned upright."""
    return image if orientation == 1 else image.transpose(_UPRIGHT[orientation - 2])


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture of any mode to 8-bit RGB, see :func:`read_image`."""
    if image.mode[0] in "IF":
        values = np.asarray(image).astype(np.float64)  # integers are 0..65535, floats 0..1 or 0..255
        scale = 255 / 65535 if image.mode != "F" else (255.0 if values.max(initial=0) <= 1 else 1.0)
        image = Image.fromarray(np.rint(values * scale).clip(0, 255).astype(np.uint8))
    elif image.mode.endswith(("A", "a")) or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _ends_as_jpeg(path: PathLike) -> bool:
    with open(path, "rb") as file:  # zeros may follow the end marker
        file.seek(max(0, os.path.getsize(path) - 64))
        return file.read().rstrip(b"\0").endswith(b"\xff\xd9")


def find_files(folder: Path, suffixes: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Return the files in and below ``folder`` that have one of the ``suffixes`` in any case, and all other files, both
    sorted. Hidden files and folders are left out. Symbolic links to folders are followed, each folder once. Raise
    DataError if a folder cannot be read."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}); make the folder readable") from None

    matching, others = [], []
    visited: set[str] = set()
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        if (real_path := os.path.realpath(parent)) in visited:
            folders.clear()
            continue
        visited.add(real_path)
        folders[:] = sorted(name for name in folders if name[0] != ".")  # of several links, the first by name is used
        for path in (Path(parent, name) for name in files if name[0] != "."):
            # a broken link is reported when it is read
            matches = path.suffix.lower() in suffixes and (os.path.isfile(path) or not os.path.exists(path))
            (matching if matches else others).append(path)
    return sorted(matching), sorted(others)


def natural_order(path: Path) -> tuple[str, list[tuple[int, str]]]:
    """Return a key that sorts files by folder and name, with numbers in names as numbers: frame 9 before frame 10."""
    parts = re.split(r"(\d+)", path.name)
    return str(path.parent), [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


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
    """Draw ``boxes`` (N, xyxy in pixels of the image, most important first) into ``image``, and return it.

    The text of a box is above it, or inside it at the upper edge of the image. A text that would cover another text is
    left out, so that texts do not hide a crowd. ``banner`` is drawn last, in the upper left corner.
    """
    draw, font, boxes = ImageDraw.Draw(image), font_of(text_size), [tuple(box) for box in boxes]
    for (x1, y1, x2, y2), color in reversed(list(zip(boxes, colors, strict=True))):
        draw.rectangle((x1, y1, max(x2, x1), max(y2, y1)), outline=color, width=max(2, text_size // 6))
    height = sum(font.getmetrics())
    drawn: list[tuple[float, float, float]] = []
    for (x1, y1, *_), text, color in zip(boxes, texts, colors, strict=True):
        width = draw.textlength(text, font) + 6
        x = min(max(x1, 0), max(image.width - width, 0))
        y = y1 - height if y1 >= height else max(y1, 0)
        if any(x < end and start < x + width and abs(y - other) < height for start, end, other in drawn):
            continue
        drawn.append((x, x + width, y))
        draw.rectangle((x, y, x + width, y + height), fill=color)
        draw.text((x + 3, y), text, "white", font)
    if banner:
        draw.rectangle((0, 0, draw.textlength(banner, font) + 6, height), fill=BANNER)
        draw.text((3, 0), banner, "white", font)
    return image


def color_of(label: int) -> str:
    """Return the colour of a class. Labels start at 1."""
    return PALETTE[(label - 1) % len(PALETTE)]


@functools.lru_cache(maxsize=8)
def font_of(size: int) -> ImageFont.FreeTypeFont:
    """Return Pillow's default font, which needs no font file."""
    return ImageFont.load_default(size)
