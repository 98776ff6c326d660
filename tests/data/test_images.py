"""Reading of photos: colour modes, EXIF rotation and broken files."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from earlyexit_ssd.errors import DataError
from earlyexit_ssd.images import read_header, read_image, read_thumbnail


def test_rgb_is_unchanged(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    result = read_image(tmp_path / "a.png")
    assert result.dtype == np.uint8
    assert result.flags.writeable
    np.testing.assert_array_equal(result, pixels)
    assert read_header(tmp_path / "a.png").size == (6, 4)


def float_image(value: float) -> Image.Image:
    return Image.fromarray(np.full((4, 6), value, np.float32))


def palette_image() -> Image.Image:
    image = Image.new("P", (6, 4), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    return image


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (Image.new("L", (6, 4), 77), {}, (77, 77, 77)),
        (Image.new("1", (6, 4), 1), {}, (255, 255, 255)),
        (Image.new("RGBA", (6, 4), (200, 100, 0, 0)), {}, (255, 255, 255)),  # transparent: white
        (Image.new("RGBA", (6, 4), (200, 100, 0, 255)), {}, (200, 100, 0)),
        (Image.new("RGBA", (6, 4), (200, 100, 0, 51)), {}, (244, 224, 204)),
        (Image.new("LA", (6, 4), (0, 0)), {}, (255, 255, 255)),
        (palette_image(), {}, (10, 20, 30)),
        (palette_image(), {"transparency": 0}, (255, 255, 255)),
        (float_image(0.5), {"format": "TIFF"}, (128, 128, 128)),
        (float_image(100.0), {"format": "TIFF"}, (100, 100, 100)),
    ],
)
def test_colour_modes_become_rgb(tmp_path, image, options, expected):
    image.save(tmp_path / "a", **{"format": "PNG", **options})
    result = read_image(tmp_path / "a")
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, np.full((4, 6, 3), expected))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_scaled_to_8(tmp_path, suffix):
    values = np.array([[65535, 65280, 32896, 257, 0]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    assert read_image(tmp_path / f"a.{suffix}")[0].tolist() == [[value] * 3 for value in (255, 254, 128, 1, 0)]


def test_cmyk(tmp_path):
    """Full cyan ink is (0, 255, 255), no ink is white."""
    image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    image.paste((0, 0, 0, 0), (8, 0, 16, 16))
    image.save(tmp_path / "a.jpg", quality=95)
    np.testing.assert_allclose(read_image(tmp_path / "a.jpg")[8, [2, 14]], [(0, 255, 255), (255, 255, 255)], atol=12)


def save_rotated(path: Path, orientation: int, mode: str = "RGB") -> None:
    """Save a grey image of 64 x 32 whose top left quarter is red, with an EXIF orientation."""
    image = Image.new("RGB", (64, 32), (90, 90, 90))
    image.paste((250, 0, 0), (0, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.convert(mode).save(path, exif=exif)


def red_position(pixels: np.ndarray) -> tuple[bool, bool]:
    """Return whether the red pixels are in the upper half, and whether they are in the left half."""
    height, width = pixels.shape[:2]
    rows, columns = np.nonzero(pixels[..., 0].astype(int) - pixels[..., 1] > 100)
    return rows.mean() < height / 2, columns.mean() < width / 2


# orientation -> whether the stored top left corner is displayed at the top, and at the left (EXIF 2.32, table 6)
DISPLAYED = {
    1: (True, True), 2: (True, False), 3: (False, False), 4: (False, True),
    5: (True, True), 6: (True, False), 7: (False, False), 8: (False, True),
}  # fmt: skip


# Pillow may map a TIFF of the mode RGBA into memory
@pytest.mark.parametrize(
    ("suffix", "mode"), [("jpg", "RGB"), ("png", "RGB"), ("webp", "RGB"), ("tif", "RGB"), ("tif", "RGBA")]
)
@pytest.mark.parametrize("orientation", DISPLAYED)
def test_exif_rotation(tmp_path, orientation, suffix, mode):
    path = tmp_path / f"a.{suffix}"
    save_rotated(path, orientation, mode)
    size = (32, 64) if orientation >= 5 else (64, 32)
    result = read_image(path)
    assert result.shape == (size[1], size[0], 3)
    assert red_position(result) == DISPLAYED[orientation]
    assert read_header(path).size == size


@pytest.mark.parametrize(
    ("orientation", "annotated", "size"),
    [(6, (64, 32), (64, 32)), (6, (32, 64), (32, 64)), (6, (100, 50), (32, 64)), (3, (64, 32), (64, 32))],
)
def test_annotated_size_decides_if_exif_rotation_is_applied(tmp_path, orientation, annotated, size):
    """A rotation by 180 degrees is always applied, as by viewers and labelling tools, because the size does not show
    whether the boxes are for the rotated image."""
    path = tmp_path / "a.jpg"
    save_rotated(path, orientation)
    result = read_image(path, annotated)
    assert (result.shape[1], result.shape[0]) == size == read_header(path, annotated).size
    stays = orientation == 6 and size == (64, 32)
    assert red_position(result) == DISPLAYED[1 if stays else orientation]


def test_thumbnail_is_rotated_like_the_photo(tmp_path):
    save_rotated(tmp_path / "a.jpg", 6)
    small = read_thumbnail(tmp_path / "a.jpg", None, 16)
    assert small.size == (8, 16) and red_position(np.asarray(small)) == DISPLAYED[6]
    assert read_thumbnail(tmp_path / "a.jpg", (64, 32), 16).size == (16, 8)


def require_unreadable(path: Path | str, message: str) -> None:
    """Check that both functions raise a one-line DataError."""
    for function in (read_image, read_header):
        with pytest.raises(DataError, match=message) as error:
            function(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp"])
@pytest.mark.parametrize("share", [0.3, 0.95])
def test_truncated_files_are_unreadable(photo_file, suffix, share):
    path = photo_file(f"a.{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    require_unreadable(path, f"a.{suffix}: not a readable photo")


def test_damaged_png_is_unreadable(photo_file):
    path = photo_file("a.png")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    require_unreadable(path, "not a readable photo")


def test_bytes_after_the_end_of_a_jpeg_are_ignored(photo_file):
    path = photo_file("a.jpg")
    path.write_bytes(path.read_bytes() + b"\0" * 9 + b"camera maker's note")
    assert read_header(path).size == (60, 40)


def test_header_of_a_png_is_read_without_decoding(photo_file, monkeypatch):
    path = photo_file("a.png")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", None)
    assert read_header(path).size == (60, 40)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, f"{name}: not a readable photo") for name in ("empty.jpg", "text.jpg")),
        *((name, f"{name}: a folder, pipe or device, expected a photo") for name in ("pipe.jpg", "folder.jpg")),
        *((name, "no such photo") for name in ("lost.jpg", "nul\0.jpg", "x" * 5000, "\ud800.jpg")),
    ],
)
def test_paths_that_are_no_photo(tmp_path, name, message):
    """Reading a pipe would never end."""
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("hello")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    require_unreadable(tmp_path / name, message)


def test_photos_larger_than_the_limit_are_not_decoded(tmp_path, recwarn):
    Image.new("1", (9500, 9500)).save(tmp_path / "large.png")
    require_unreadable(tmp_path / "large.png", "large.png: photo of 9500 x 9500 pixels, expected at most 89,478,485")
    assert not recwarn.list
