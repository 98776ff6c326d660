"""Reading of photos: colour modes, EXIF rotation and broken files."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from earlyexit_ssd.errors import DataError
from earlyexit_ssd.images import read_header, read_image, read_thumbnail

ORIENTATION = 0x0112


def test_rgb_is_unchanged(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    result = read_image(tmp_path / "a.png")
    assert result.dtype == np.uint8
    assert result.flags.writeable
    np.testing.assert_array_equal(result, pixels)
    assert read_header(tmp_path / "a.png").size == (6, 4)


def test_grey_is_repeated_in_three_channels(tmp_path):
    Image.fromarray(np.full((4, 6), 77, np.uint8)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.full((4, 6, 3), 77))


def test_black_and_white(tmp_path):
    Image.new("1", (6, 4), 1).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.full((4, 6, 3), 255))


@pytest.mark.parametrize(("alpha", "expected"), [(0, (255, 255, 255)), (255, (200, 100, 0)), (51, (244, 224, 204))])
def test_transparency_is_blended_with_white(tmp_path, alpha, expected):
    Image.new("RGBA", (6, 4), (200, 100, 0, alpha)).save(tmp_path / "a.png")
    result = read_image(tmp_path / "a.png")
    assert result.shape == (4, 6, 3)
    np.testing.assert_allclose(result[0, 0], expected, atol=1)


def test_grey_with_transparency(tmp_path):
    Image.new("LA", (6, 4), (0, 0)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.full((4, 6, 3), 255))


@pytest.mark.parametrize(("transparency", "expected"), [(None, (10, 20, 30)), (0, (255, 255, 255))])
def test_palettes(tmp_path, transparency, expected):
    image = Image.new("P", (6, 4), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    options = {} if transparency is None else {"transparency": transparency}
    image.save(tmp_path / "a.png", **options)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png")[0, 0], expected)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize(("value", "expected"), [(65535, 255), (65280, 254), (32896, 128), (257, 1), (0, 0)])
def test_16_bits_are_scaled_to_8(tmp_path, suffix, value, expected):
    Image.fromarray(np.full((4, 6), value, np.uint16)).save(tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(read_image(tmp_path / f"a.{suffix}"), np.full((4, 6, 3), expected))


@pytest.mark.parametrize(("value", "expected"), [(0.5, 128), (100.0, 100)])
def test_floats(tmp_path, value, expected):
    Image.fromarray(np.full((4, 6), value, np.float32)).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), np.full((4, 6, 3), expected))


def test_cmyk(tmp_path):
    """Full cyan ink is (0, 255, 255), no ink is white."""
    image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    image.paste((0, 0, 0, 0), (8, 0, 16, 16))
    image.save(tmp_path / "a.jpg", quality=95)
    result = read_image(tmp_path / "a.jpg")
    assert result.shape == (16, 16, 3)
    np.testing.assert_allclose(result[8, 2], (0, 255, 255), atol=12)
    np.testing.assert_allclose(result[8, 14], (255, 255, 255), atol=12)


def red_corner(width: int, height: int) -> Image.Image:
    """Return a grey image whose top left quarter is red."""
    image = Image.new("RGB", (width, height), (90, 90, 90))
    image.paste((250, 0, 0), (0, 0, width // 2, height // 2))
    return image


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


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", DISPLAYED)
def test_exif_rotation(tmp_path, orientation, suffix):
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    red_corner(64, 32).save(path, exif=exif)
    shown = (32, 64) if orientation >= 5 else (64, 32)

    result = read_image(path)
    assert result.shape == (shown[1], shown[0], 3)
    assert red_position(result) == DISPLAYED[orientation]
    assert read_header(path).size == shown


@pytest.mark.parametrize(
    ("annotated", "size"),
    [((64, 32), (64, 32)), ((32, 64), (32, 64)), ((100, 50), (32, 64)), (None, (32, 64))],
)
def test_annotated_size_decides_if_exif_rotation_is_applied(tmp_path, annotated, size):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    red_corner(64, 32).save(tmp_path / "a.jpg", exif=exif)
    result = read_image(tmp_path / "a.jpg", annotated)
    assert (result.shape[1], result.shape[0]) == size
    assert read_header(tmp_path / "a.jpg", annotated).size == size
    assert red_position(result) == ((True, True) if size == (64, 32) else (True, False))


def test_thumbnail_is_rotated_like_the_photo(tmp_path):
    photo = Image.new("RGB", (640, 320), "blue")
    photo.paste("red", (0, 0, 320, 320))
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # rotated by 90 degrees: the left half is displayed at the top
    photo.save(tmp_path / "a.jpg", exif=exif)
    small = read_thumbnail(tmp_path / "a.jpg", None, 64)
    assert small.size == (32, 64) and small.getpixel((16, 8))[0] > 200 and small.getpixel((16, 56))[2] > 200
    assert read_thumbnail(tmp_path / "a.jpg", (640, 320), 64).size == (64, 32)


def test_rotation_by_180_degrees_is_applied_with_any_annotated_size(tmp_path):
    """The size stays the same, so it does not show whether the boxes are for the rotated image. Viewers and labelling
    tools rotate it."""
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    red_corner(64, 32).save(tmp_path / "a.jpg", exif=exif)
    assert red_position(read_image(tmp_path / "a.jpg", (64, 32))) == DISPLAYED[3]


def test_tiff_is_rotated_once(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    red_corner(64, 32).save(tmp_path / "a.tif", exif=exif)
    result = read_image(tmp_path / "a.tif")
    assert result.shape == (64, 32, 3)
    assert read_header(tmp_path / "a.tif").size == (32, 64)
    assert red_position(result) == DISPLAYED[6]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp"])
@pytest.mark.parametrize("share", [0.3, 0.95])
def test_truncated_files_are_unreadable_for_both_functions(photo_file, suffix, share):
    path = photo_file(f"a.{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    for function in (read_image, read_header):
        with pytest.raises(DataError, match=f"a.{suffix}: not a readable photo") as error:
            function(path)
        assert "\n" not in str(error.value)


def test_damaged_png_is_unreadable(photo_file):
    path = photo_file("a.png")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))
    for function in (read_image, read_header):
        with pytest.raises(DataError, match="not a readable photo"):
            function(path)


def test_bytes_after_the_end_of_a_jpeg_are_ignored(photo_file):
    path = photo_file("a.jpg")
    path.write_bytes(path.read_bytes() + b"\0" * 9 + b"camera maker's note")
    assert read_header(path).size == (60, 40)


def test_missing_empty_and_text_files_are_errors(tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("hello")
    for function in (read_image, read_header):
        with pytest.raises(DataError, match=r"lost.jpg: no such photo"):
            function(tmp_path / "lost.jpg")
        with pytest.raises(DataError, match=r"empty.jpg: not a readable photo"):
            function(tmp_path / "empty.jpg")
        with pytest.raises(DataError, match=r"text.jpg: not a readable photo"):
            function(tmp_path / "text.jpg")


def test_header_of_a_png_is_read_without_decoding(photo_file, monkeypatch):
    path = photo_file("a.png")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", None)
    assert read_header(path).size == (60, 40)


@pytest.mark.parametrize("name", ["pipe.jpg", "folder.jpg"])
def test_pipes_and_folders_are_not_opened(tmp_path, name):
    """Reading a pipe would never end."""
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for function in (read_image, read_header):
        with pytest.raises(DataError, match=f"{name}: a folder, pipe or device, expected a photo"):
            function(tmp_path / name)


@pytest.mark.parametrize("name", ["nul\0.jpg", "x" * 5000, "\ud800.jpg"])
def test_impossible_file_names(tmp_path, name):
    for function in (read_image, read_header):
        with pytest.raises(DataError, match="no such photo"):
            function(tmp_path / name)


def test_photos_larger_than_the_limit_are_not_decoded(tmp_path, recwarn):
    Image.new("1", (9500, 9500)).save(tmp_path / "large.png")
    for function in (read_image, read_header):
        with pytest.raises(DataError, match="large.png: photo of 9500 x 9500 pixels, expected at most 89,478,485"):
            function(tmp_path / "large.png")
    assert not recwarn.list
