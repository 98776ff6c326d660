import itertools
import sys

import numpy as np
import pytest
from PIL import Image

from earlyexit_ssd.deploy import sources
from earlyexit_ssd.deploy.sources import Frame, Source, find_sources, read_frames
from earlyexit_ssd.errors import DataError, EarlyExitError
from tests.deploy.fakes import scene


@pytest.fixture
def folder(tmp_path):
    for name in ("b.PNG", "a.jpg", "deep/c.bmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 6), (10, 20, 30)).save(tmp_path / name)
    (tmp_path / "street.mp4").touch()
    (tmp_path / "notes.txt").touch()
    return tmp_path


def test_what_a_name_stands_for(folder, caplog):
    found = find_sources(["0", "rtsp://me:secret@cam/1", str(folder / "notes.txt"), str(folder / "no.mov"), folder])
    inside = [str(folder / name) for name in ("a.jpg", "b.PNG", "deep/c.bmp", "street.mp4")]
    assert [one.name for one in found[4:]] == inside
    assert [one.kind for one in found] == ["live", "live", "photo", "video", "photo", "photo", "photo", "video"]
    assert found[1].title == "rtsp://cam/1"
    assert f"{folder}: 1 files left out, which are no photos and no videos; the first: {folder / 'notes.txt'}" in (
        caplog.messages
    )


def test_patterns(folder):
    assert [one.name for one in find_sources([f"{folder}/*.[jJ]*"])] == [str(folder / "a.jpg")]
    assert [one.name for one in find_sources([f"{folder}/**/*.bmp"])] == [str(folder / "deep/c.bmp")]
    with pytest.raises(DataError, match=r"\*\.gif: no file fits this pattern"):
        find_sources([f"{folder}/*.gif"])
    (folder / "odd[1].jpg").touch()
    assert find_sources([str(folder / "odd[1].jpg")]) == [Source(str(folder / "odd[1].jpg"), "photo")]


def test_a_folder_without_a_picture(tmp_path):
    with pytest.raises(DataError, match="no picture in this folder; name photos"):
        find_sources([tmp_path])


def test_a_photo_is_a_frame_and_a_broken_one_is_named(folder):
    (frame,) = read_frames(Source(str(folder / "a.jpg"), "photo"), stride=5)
    assert frame.image.shape == (6, 8, 3) and frame.time is None
    (error,) = read_frames(Source(str(folder / "notes.txt"), "photo"))
    assert isinstance(error, DataError) and "notes.txt: not a readable photo" in str(error)


def video(folder) -> Source:
    return Source(str(folder / "street.mp4"), "video")


def test_frames_of_a_video(folder, fake_video):
    capture = fake_video([scene(x) for x in range(7)], total=7)
    frames = list(read_frames(video(folder), stride=3))
    assert [frame.index for frame in frames] == [0, 3, 6]
    assert [frame.time for frame in frames] == [0, 3 / 25, 6 / 25]
    np.testing.assert_array_equal(frames[1].image, scene(3))  # RGB
    assert frames[1].total == 7
    assert capture.released == 1


def test_a_broken_frame_is_named_and_the_others_come(folder, fake_video):
    fake_video([scene(), "broken", scene()], total=3)
    first, error, last = read_frames(video(folder))
    assert (first.index, last.index) == (0, 2)
    assert str(error).endswith("street.mp4 frame 1: cannot be decoded")


@pytest.mark.parametrize(("count", "told"), [(10, False), (8, False), (7, True)])
def test_a_video_that_is_cut_is_said(folder, fake_video, count, told):
    fake_video([scene()] * count, total=10)
    *frames, last = read_frames(video(folder))
    assert isinstance(last, DataError) is told and len(frames) == count - 1 + told
    if told:
        assert "street.mp4: ends after 7 of 10 frames; it is cut or damaged" in str(last)


def test_what_cannot_be_opened(folder, fake_video):
    fake_video([], opens=False)
    (error,) = read_frames(video(folder))
    assert "street.mp4: video cannot be opened; convert it" in str(error)
    (error,) = read_frames(Source("rtsp://me:secret@cam/1", "live"))
    assert str(error).startswith("rtsp://cam/1: camera or stream cannot be opened; check the address")
    (error,) = read_frames(Source(str(folder / "none.mp4"), "video"))
    assert str(error).endswith("none.mp4: no such video")


def test_a_camera_that_goes_away_is_tried_again_and_said(fake_video, monkeypatch, caplog):
    waits = []
    monkeypatch.setattr(sources.time, "sleep", waits.append)
    capture = fake_video([scene(1), *[None] * 7, scene(2), scene(3), None, scene(4)])
    frames = list(itertools.islice(read_frames(Source("0", "live")), 4))
    assert [int(np.nonzero(frame.image[20, :, 1] == 30)[0][0]) for frame in frames] == [1, 2, 3, 4]
    assert [frame.index for frame in frames] == [0, 1, 2, 3] and frames[0].total is None
    assert waits == [1, 2, 4, 8, 16, 30, 30, 1]  # afresh once it was back
    assert capture.reopened == 8
    said = [message for message in caplog.messages if message.startswith("0: ")]
    assert said[0] == "0: no frame comes; trying again in 1 s" and said.count("0: back again") == 2


def test_the_address_of_a_file_has_an_end(fake_video):
    fake_video([scene()] * 3, total=3)
    assert len(list(read_frames(Source("https://x/street.mp4", "live")))) == 3


def test_without_opencv_photos_still_work(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    (frame,) = read_frames(Source(str(folder / "a.jpg"), "photo"))
    assert isinstance(frame, Frame)
    with pytest.raises(EarlyExitError, match="not installed; pip install opencv-python-headless"):
        next(read_frames(video(folder)))


def test_a_stride_below_one(folder):
    with pytest.raises(EarlyExitError, match="stride is 0, expected 1"):
        next(read_frames(video(folder), 0))
