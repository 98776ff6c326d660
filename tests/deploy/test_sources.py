import itertools
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from earlyexit_ssd.deploy import sources
from earlyexit_ssd.deploy.sources import Frame, Source, count_frames, find_sources, read_frames
from earlyexit_ssd.errors import DataError, EarlyExitError
from tests.deploy.fakes import scene


@pytest.fixture
def folder(tmp_path):
    for name in ("b.PNG", "a.jpg", "deep/down/c.bmp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (10, 20, 30)).save(tmp_path / name)
    (tmp_path / "street.mp4").touch()
    (tmp_path / "notes.txt").touch()
    return tmp_path


def test_kinds_of_sources(folder, caplog):
    arguments = ["0", "rtsp://me:sec@ret@cam/1", str(folder / "notes.txt"), str(folder / "no.mov"), folder]
    found = find_sources(arguments)
    inside = [str(folder / name) for name in ("a.jpg", "b.PNG", "street.mp4", "deep/down/c.bmp")]
    assert [source.name for source in found[4:]] == inside
    assert [source.kind for source in found] == ["live", "live", "photo", "video", "photo", "photo", "video", "photo"]
    assert found[1].title == "rtsp://cam/1"
    ignored = "1 files are ignored, since they are neither photos nor videos"
    assert f"{folder}: {ignored}; the first is {folder / 'notes.txt'}" in caplog.messages


def test_a_file_is_taken_once_and_a_broken_link_is_reported(folder):
    (folder / "link.jpg").symlink_to("missing.jpg")
    found = find_sources([folder, folder / "a.jpg"])
    assert [source.name for source in found].count(str(folder / "a.jpg")) == 1
    (error,) = read_frames(Source(str(folder / "link.jpg"), "photo"))
    assert str(folder / "link.jpg") in [source.name for source in found] and "no such photo" in str(error)


def test_patterns(folder):
    (folder / "odd[1].jpg").touch()
    for pattern, name in (("a.[jJ]*", "a.jpg"), ("**/*.bmp", "deep/down/c.bmp"), ("odd[1].jpg", "odd[1].jpg")):
        assert find_sources([f"{folder}/{pattern}"]) == [Source(str(folder / name), "photo")]


def test_frames_in_a_folder_are_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 9, 100):
        (tmp_path / f"f{number}.jpg").touch()
    for argument in (tmp_path, f"{tmp_path}/*.jpg"):
        assert [Path(source.name).name for source in find_sources([argument])] == ["f9.jpg", "f10.jpg", "f100.jpg"]


def test_no_source_is_an_error(folder):
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match=r"\*\.gif: no file matches this pattern"):
        find_sources([f"{folder}/*.gif"])
    with pytest.raises(DataError, match="the folder has no photos and no videos; name files"):
        find_sources([folder / "empty"])
    first, second, third = find_sources([f"{folder}/*.gif", folder / "a.jpg", folder / "empty"])
    assert [type(next(read_frames(source))) for source in (first, second, third)] == [DataError, Frame, DataError]


@pytest.mark.parametrize(("total", "most", "expected"), [(10, None, 5), (10, 2, 3), (0, None, None)])
def test_frames_are_counted_by_the_headers_of_videos(folder, fake_video, total, most, expected):
    fake_video([], total=total)
    assert count_frames(find_sources([folder / "street.mp4", folder / "a.jpg"]), 3, most) == expected
    assert count_frames([Source("0", "live")], 3, most) == most


def test_a_photo_is_a_frame_and_a_broken_photo_an_error(folder):
    (frame,) = read_frames(Source(str(folder / "a.jpg"), "photo"), stride=5)
    assert frame.image.shape == (6, 8, 3) and frame.time is None
    (error,) = read_frames(Source(str(folder / "notes.txt"), "photo"))
    assert isinstance(error, DataError) and "notes.txt: not a readable photo" in str(error)


def test_a_name_with_a_colon_is_a_file_and_no_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cv2 = pytest.importorskip("cv2")
    writer = cv2.VideoWriter(str(tmp_path / "street.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 10, (96, 64))
    writer.write(scene())
    writer.release()
    (tmp_path / "street.mp4").rename("01T12:30:00.mp4")
    (frame,) = read_frames(Source("01T12:30:00.mp4", "video"))
    assert frame.image.shape == (64, 96, 3)


def video(folder) -> Source:
    return Source(str(folder / "street.mp4"), "video")


def test_frames_of_a_video(folder, fake_video):
    capture = fake_video([*map(scene, range(6)), "broken", *map(scene, range(7, 10))], total=10)
    *frames, error, last = read_frames(video(folder), stride=3)
    found = [(frame.index, frame.time, frame.total) for frame in (*frames, last)]
    assert found == [(0, 0, 10), (3, 3 / 25, 10), (9, 9 / 25, 10)]
    np.testing.assert_array_equal(frames[1].image, scene(3))  # RGB
    assert isinstance(error, DataError) and str(error).endswith("street.mp4 frame 6: cannot be decoded")
    assert capture.released == 1


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_video_whose_name_is_not_utf_8_is_refused(tmp_path, fake_video):
    (tmp_path / os.fsdecode(b"a\xff.mp4")).touch()
    fake_video([scene()])
    (error,) = read_frames(*find_sources([tmp_path]))
    assert str(error).endswith("a\\udcff.mp4: OpenCV cannot read a name that is not UTF-8; rename the file")


@pytest.mark.parametrize("count", [10, 8, 7])
def test_a_truncated_video_is_reported(folder, fake_video, count):
    fake_video([scene()] * count, total=10)
    frames = list(read_frames(video(folder)))
    if count == 7:
        message = "street.mp4: ends after 7 of 10 frames; the file is truncated or damaged"
        assert message in str(frames.pop())
    assert [frame.index for frame in frames] == list(range(count))


def test_a_source_that_cannot_be_opened(folder, fake_video):
    fake_video([], opens=False)
    for source, message in (
        (video(folder), "street.mp4: video cannot be opened; copy it again, or"),
        (Source("rtsp://me:secret@cam/1", "live"), "rtsp://cam/1: camera or stream cannot be opened; check the"),
        (Source(str(folder / "none.mp4"), "video"), "none.mp4: no such video; check the path"),
    ):
        (error,) = read_frames(source)
        assert isinstance(error, DataError) and message in str(error)


def test_a_lost_camera_is_reopened_and_each_attempt_is_logged(fake_video, monkeypatch, caplog):
    cv2, waits = pytest.importorskip("cv2"), []
    monkeypatch.setattr(sources.time, "sleep", waits.append)
    capture = fake_video([scene(1), *[None] * 7, scene(2), scene(3), None, scene(4)])
    frames = list(itertools.islice(read_frames(Source("0", "live")), 4))
    assert [int(np.nonzero(frame.image[20, :, 1] == 30)[0][0]) for frame in frames] == [1, 2, 3, 4]
    assert [frame.index for frame in frames] == [0, 1, 2, 3] and frames[0].total is None
    assert waits == [1, 2, 4, 8, 16, 30, 30, 1]  # the wait starts at 1 s after each reconnection
    assert capture.reopened == 8 and capture.settings == {cv2.CAP_PROP_BUFFERSIZE: 1}
    logged = [message for message in caplog.messages if message.startswith("0: ")]
    assert logged[0] == "0: no frame received; reconnecting in 1 s" and logged.count("0: connected again") == 2


def test_the_url_of_a_file_ends_without_reconnecting(fake_video):
    fake_video([scene()] * 3, total=3)
    assert len(list(read_frames(Source("https://x/street.mp4", "live")))) == 3


def test_without_opencv_photos_still_work(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    (frame,) = read_frames(Source(str(folder / "a.jpg"), "photo"))
    assert isinstance(frame, Frame)
    with pytest.raises(EarlyExitError, match="not installed: pip install opencv-python-headless"):
        next(read_frames(video(folder)))
    with pytest.raises(EarlyExitError, match="stride is 0, expected 1"):
        next(read_frames(video(folder), 0))
