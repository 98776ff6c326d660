"""The loop over sources and its outputs."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
from PIL import Image

from earlyexit_ssd.config import load_config
from earlyexit_ssd.data import load_dataset
from earlyexit_ssd.deploy import Predictor
from earlyexit_ssd.deploy.predict import SAVES, annotate, images_of, is_exported, open_predictor, output_paths, predict
from earlyexit_ssd.deploy.sources import Source, find_sources
from earlyexit_ssd.deploy.stream import StreamRule
from earlyexit_ssd.drift import Drift
from earlyexit_ssd.errors import CannotWrite, DataError, EarlyExitError
from tests.deploy.fakes import RED, RedBox, scene

OUTPUTS = [name for name in SAVES if name != "labels"]  # labels are for photos only
RULE = StreamRule(threshold=2.0, score=0.5, most_repeats=100, classes=RedBox.classes)


@pytest.fixture
def video(tmp_path) -> Source:
    (tmp_path / "street.mp4").touch()
    return Source(str(tmp_path / "street.mp4"), "video")


def photo(path: Path, x: float | None = 30) -> Source:
    Image.fromarray(scene(x)).save(path)
    return Source(str(path), "photo")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_photos_and_all_outputs(tmp_path):
    sources = [photo(tmp_path / "a.png"), photo(tmp_path / "b.png", None), Source(str(tmp_path / "none.png"), "photo")]
    out = tmp_path / "out"
    first, second, error = predict(RedBox(), sources, out, save=OUTPUTS)
    assert first.splitlines() == [
        f"{tmp_path}/a.png: full, confidence 0.75, 4 ms, 1 found -> {out}/a.png",
        "  ball 0.90 at 30, 20, 46, 36",
    ]
    assert second == f"{tmp_path}/b.png: exit8, confidence 0.75, 4 ms, 0 found -> {out}/b.png"
    assert isinstance(error, DataError) and "none.png: no such photo" in str(error)
    assert sorted(os.listdir(out)) == ["a.png", "b.png", "counts.csv", "detections.csv", "detections.json"]
    assert Image.open(out / "a.png").size == (96, 64)
    (found,) = json.loads((out / "detections.json").read_text())
    assert (found["image_id"], found["category_id"], found["bbox"]) == (1, 2, [30, 20, 16, 16])
    assert found["score"] == pytest.approx(0.9) and found["source"].endswith("a.png")
    (row,) = rows(out / "detections.csv")
    assert [row[key] for key in ("image_id", "class", "x1", "y2")] == ["1", "ball", "30.00", "36.00"]
    counts = [[row[key] for key in ("exit", "found", "lamp", "ball")] for row in rows(out / "counts.csv")]
    assert counts == [["full", "1", "0", "1"], ["exit8", "0", "0", "0"]]
    coco = pytest.importorskip("pycocotools.coco").COCO()
    coco.dataset = {"images": [{"id": 1}], "annotations": [], "categories": [{"id": 2}]}
    coco.createIndex()
    assert coco.loadRes(str(out / "detections.json")).anns[1]["bbox"] == [30, 20, 16, 16]


def test_labels_are_a_data_set(tmp_path):
    """The relative names of the photos are below the folder that the last line names."""
    (tmp_path / "night").mkdir()
    sources = [photo(tmp_path / "a.png"), photo(tmp_path / "night" / "b.png", None)]
    *_, entry = predict(RedBox(), sources, tmp_path / "out", save=["labels"])
    assert entry == f'an entry of DATA.DATASETS: ["NAME", "{tmp_path}/out/labels.json", "{tmp_path}"]'
    keys = ["DATA.DATASETS", f"[[mine, {tmp_path}/out/labels.json, {tmp_path}]]", "DATA.CLASSES", "[lamp, ball]"]
    dataset = load_dataset(load_config(None, keys), "mine")
    assert [record.path.name for record in dataset.records] == ["a.png", "b.png"]
    (found,) = dataset.records[0].annotations
    assert (found.label, found.box, dataset.records[1].annotations) == (2, (30, 20, 46, 36), ())


def test_without_photos_the_tables_are_empty(tmp_path):
    list(predict(RedBox(), [], tmp_path, save=["labels", "json"]))
    assert json.loads((tmp_path / "labels.json").read_text())["images"] == []
    assert json.loads((tmp_path / "detections.json").read_text()) == []


def test_labels_of_a_video_are_refused(tmp_path, video):
    with pytest.raises(EarlyExitError, match=r"--save labels takes photos, but .*street.mp4 is a video"):
        next(predict(RedBox(), [video], tmp_path, save=["labels"]))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_name_that_is_not_utf_8_is_escaped(tmp_path):
    source = photo(tmp_path / os.fsdecode(b"a\xff.png"))
    list(predict(RedBox(), [source], tmp_path / "out", save=OUTPUTS))
    for name in ("detections.csv", "counts.csv"):
        assert rows(tmp_path / "out" / name)[0]["source"].endswith("a\\udcff.png")


def test_lower_scores_are_dropped(tmp_path):
    source = photo(tmp_path / "a.png")
    assert "0 found" in next(predict(RedBox(0.4), [source], tmp_path, save=["none"]))
    assert "1 found" in next(predict(RedBox(0.4), [source], tmp_path, save=[], score=0.4 - 1e-6))
    with pytest.raises(EarlyExitError, match=r"score 1.5: expected a number in \[0, 1\]"):
        next(predict(RedBox(), [source], tmp_path, score=1.5))
    with pytest.raises(EarlyExitError, match=r"--save 'count': expected some of .*\(did you mean 'counts'\?\)"):
        next(predict(RedBox(), [source], tmp_path, save=["count"]))


def test_a_video_and_its_summary(tmp_path, video, fake_video):
    fake_video([scene(x) for x in range(10)], total=10)
    (line,) = predict(RedBox(), [video], tmp_path / "out", save=OUTPUTS)
    assert line.startswith(f"{video.name}: 10 frames, ") and line.endswith(f" -> {tmp_path}/out/street.mp4")
    assert "4.0 ms per computed frame, exits: full 50%, exit8 50%" in line
    counts = rows(tmp_path / "out" / "counts.csv")
    assert [row["frame"] for row in counts] == list("0123456789") and counts[5]["seconds"] == "0.200"
    cv2 = pytest.importorskip("cv2")
    written = cv2.VideoCapture(str(tmp_path / "out" / "street.mp4"))
    assert (written.get(cv2.CAP_PROP_FRAME_COUNT), written.get(cv2.CAP_PROP_FPS)) == (10, 25)
    taken, image = written.read()
    assert taken and image.shape == (64, 96, 3)


def test_a_video_with_a_stride_keeps_its_duration(tmp_path, video, fake_video, monkeypatch):
    bar = MagicMock()
    monkeypatch.setattr("earlyexit_ssd.deploy.predict.progress", lambda **_: bar)
    fake_video([scene(x) for x in range(10)], total=10)
    list(predict(RedBox(), [video], tmp_path / "out", stride=5, most_frames=8))
    cv2 = pytest.importorskip("cv2")
    written = cv2.VideoCapture(str(tmp_path / "out" / "street.mp4"))
    assert (written.get(cv2.CAP_PROP_FRAME_COUNT), written.get(cv2.CAP_PROP_FPS)) == (2, 5)
    assert bar.__enter__().total == 2


def test_a_rule_of_another_stride_is_an_error(tmp_path, video, fake_video):
    fake_video([scene(1)] * 4, total=4)
    with pytest.raises(EarlyExitError, match="the stream rule is for stride 1, not 2; calibrate a rule for it"):
        list(predict(RedBox(), [video], tmp_path / "out", save=[], rule=RULE, stride=2))
    rule = dataclasses.replace(RULE, stride=2)
    (line,) = predict(RedBox(), [video], tmp_path / "out", save=[], rule=rule, stride=2)
    assert ": 2 frames, " in line


@pytest.mark.parametrize(("drifted", "rule", "warnings"), [(True, None, 1), (False, None, 0), (True, RULE, 0)])
def test_drift_is_reported_once_at_the_end(tmp_path, drifted, rule, warnings):
    class Drifting(RedBox):
        def drift(self):
            return Drift(self.calls, {}, {}, 0.5, 1e-5, drifted, f"drift after {self.calls}")

    sources = [photo(tmp_path / "a.png"), photo(tmp_path / "b.png")]
    lines = list(predict(Drifting(), sources, tmp_path / "out", save=[], rule=rule))
    assert lines[2:] == ["warning: drift after 2"] * warnings


def test_a_temporal_exit_is_reset_before_each_video_and_before_photos(tmp_path, video, fake_video):
    detector, photos = RedBox(), [photo(tmp_path / "a.png"), photo(tmp_path / "b.png")]
    fake_video([scene(30)] * 20, total=10)
    settings = {"save": ["counts"], "rule": RULE, "most_frames": 10}
    lines = list(predict(detector, [video, video, *photos], tmp_path / "out", **settings))
    assert detector.calls == 3 and all("repeated 90%" in line for line in lines[:2])  # the second photo is a repeat
    assert {row["ball"] for row in rows(tmp_path / "out" / "counts.csv")} == {"1"}


def interrupted():
    yield from [scene(x) for x in range(5)]
    raise KeyboardInterrupt


def test_ctrl_c_ends_a_camera_and_keeps_its_output(tmp_path, fake_video):
    fake_video(interrupted(), fps=0)
    sources = [Source("0", "live"), photo(tmp_path / "a.png")]
    (line,) = predict(RedBox(), sources, tmp_path / "out", save=OUTPUTS)
    assert line.startswith("0: 5 frames, ") and line.endswith("camera_0.mp4")
    assert len(rows(tmp_path / "out" / "counts.csv")) == 5
    assert len(json.loads((tmp_path / "out" / "detections.json").read_text())) == 5


def test_ctrl_c_in_a_video_keeps_the_output_so_far(tmp_path, video, fake_video):
    fake_video(interrupted(), total=9)
    lines = []
    with pytest.raises(KeyboardInterrupt):
        lines.extend(predict(RedBox(), [video, video], tmp_path / "out", save=OUTPUTS))
    assert len(rows(tmp_path / "out" / "counts.csv")) == 5
    assert len(json.loads((tmp_path / "out" / "detections.json").read_text())) == 5
    assert sorted(os.listdir(tmp_path / "out")) == ["counts.csv", "detections.csv", "detections.json", "street.mp4"]


def test_ctrl_c_before_the_first_frame_keeps_the_tables_of_an_earlier_run(tmp_path):
    def stopped(image):
        raise KeyboardInterrupt

    stopped.classes = RedBox().classes
    (tmp_path / "counts.csv").write_text("of an earlier run")
    with pytest.raises(KeyboardInterrupt):
        list(predict(stopped, [photo(tmp_path / "a.png")], tmp_path, save=["counts"]))
    assert (tmp_path / "counts.csv").read_text() == "of an earlier run"


def test_a_caller_that_stops_keeps_the_tables(tmp_path):
    answers = predict(
        RedBox(), [photo(tmp_path / name) for name in ("a.png", "b.png")], tmp_path / "out", save=["counts"]
    )
    next(answers)
    answers.close()
    assert len(rows(tmp_path / "out" / "counts.csv")) == 1


def test_tables_of_an_earlier_run_are_replaced_with_a_warning(tmp_path, caplog):
    for save in (["json", "csv"], ["csv"], ["pictures"]):
        list(predict(RedBox(), [photo(tmp_path / "a.png")], tmp_path / "out", save=save))
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path / 'out'}: detections.json, detections.csv of an earlier run; ")


@pytest.mark.parametrize(
    ("save", "size", "kept"),
    [
        ("pictures,counts", 5000, ["counts.csv"]),
        ("counts,json", 1500, []),
        *((save, size, []) for save, size in (("pictures", 5000), ("counts", 1000), ("json", 1000))),
    ],
)
def test_a_full_disk_keeps_what_was_written(tmp_path, video, fake_video, small_files, save, size, kept):
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    noise[:50, :50] = RED
    fake_video([noise] * 40, total=40)
    with small_files(size), pytest.raises(CannotWrite, match="make room"):
        list(predict(RedBox(), [video], tmp_path / "out", save=save.split(",")))
    assert os.listdir(tmp_path / "out") == kept


LONG_VIDEO = """
import gc, os, sys
from pathlib import Path
import pytest
from earlyexit_ssd.deploy import sources
from earlyexit_ssd.deploy.predict import predict
from earlyexit_ssd.deploy.sources import Source
from earlyexit_ssd.deploy.stream import StreamRule
from tests.deploy.fakes import RedBox, play_instead, scene

class Watched(RedBox):
    def __call__(self, image):
        if self.calls in (1000, 9990):
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            print(pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")))
        return super().__call__(image)

play_instead(pytest.MonkeyPatch(), (scene(x % 16, 2, 8, size=(48, 64)) for x in range(10_000)), total=10_000)
rule = StreamRule(threshold=0.0, score=0.5, most_repeats=100, classes=RedBox.classes)
outputs = ["pictures", "json", "csv", "counts"]
list(predict(Watched(), [Source(sys.argv[1], "video")], sys.argv[2], save=outputs, rule=rule))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux's /proc")
def test_memory_and_open_files_are_flat_over_10000_frames(tmp_path, video):
    """A frame has 9 kB, so keeping one frame in ten would take 8 MB.

    The test runs in its own process, since the heap of a process with many tests changes by more.
    """
    command = [sys.executable, "-c", LONG_VIDEO, video.name, str(tmp_path / "out")]
    printed = subprocess.run(command, cwd=Path(__file__).parents[2], check=True, capture_output=True, text=True).stdout
    (early, files), (late, files_late) = (map(int, line.split()) for line in printed.splitlines())
    assert files_late == files
    assert late - early < 4e6  # bytes
    assert len(rows(tmp_path / "out" / "counts.csv")) == 10_000


def test_no_output_replaces_another_or_a_source(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "clip.mp4").touch()
    (tmp_path / "clip.mp4").symlink_to(tmp_path / "out" / "clip.mp4")
    expected = {
        "x/dog.jpg": "dog.png",
        "y/dog.png": "dog_2.png",
        "y/Dog.jpg": "Dog_3.png",
        "out/cat.png": "cat_2.png",
        "out/cow.PNG": "cow_2.png",  # the same file as cow.png if the file system ignores case
        "clip.mp4": "clip_2.mp4",  # the source is a link to a file in the folder
        "out/a.mp4": "a_2.mp4",
        "x/a.avi": "a_3.mp4",
    }
    sources = [Source(str(tmp_path / name), "video" if name[-3] in "ma" else "photo") for name in expected]
    sources += [Source("1", "live"), Source("rtsp://me:secret@cam/entrance/", "live")]
    paths = output_paths(sources, tmp_path / "out")
    assert [path.name for path in paths] == [*expected.values(), "camera_1.mp4", "entrance.mp4"]
    assert all(path.parent == tmp_path / "out" for path in paths)


def test_annotations_are_drawn():
    plain = scene(30)
    found = RedBox()(plain)
    picture = np.asarray(annotate(plain, found, 0.5))
    assert (picture[20, 32] != plain[20, 32]).any()  # the box
    assert (picture[2, 2] != plain[2, 2]).any()  # the exit
    assert (picture[28, 38] == RED).all()
    assert (np.asarray(annotate(plain, found, 0.95))[30:] == plain[30:]).all()


def test_unused_ids_of_coco_are_not_counted(tmp_path):
    detector = RedBox()
    detector.classes = ("N/A", *detector.classes[1:])
    list(predict(detector, [photo(tmp_path / "a.png")], tmp_path / "out", save=["counts"]))
    (row,) = rows(tmp_path / "out" / "counts.csv")
    assert "N/A" not in row and row["ball"] == "1"


def test_a_broken_frame_is_reported_and_skipped(tmp_path, video, fake_video, caplog):
    frames = [scene(1), "broken", scene(2)]
    fake_video(frames, total=3)
    error, line = predict(RedBox(), [video], tmp_path / "out", save=["counts"])
    assert "street.mp4 frame 1: cannot be decoded" in str(error) and ": 2 frames, " in line
    assert [row["frame"] for row in rows(tmp_path / "out" / "counts.csv")] == ["0", "2"]
    fake_video(frames, total=3)
    assert len(list(images_of([video]))) == 2 and "street.mp4 frame 1: cannot be decoded" in caplog.text
    fake_video(frames, total=3)
    assert len(list(images_of([video], stride=2))) == 2
    with pytest.raises(DataError, match="no such photo"):
        list(images_of([Source(str(tmp_path / "none.png"), "photo")]))


def test_a_window_that_cannot_open_is_an_error_of_one_line(tmp_path, monkeypatch):
    cv2 = pytest.importorskip("cv2")

    def refuse(*_):
        raise cv2.error("The function is not implemented")

    monkeypatch.setattr(cv2, "imshow", refuse)
    with pytest.raises(EarlyExitError, match="remove --show, or replace it"):
        list(predict(RedBox(), [photo(tmp_path / "a.png")], tmp_path, save=[], show=True))


def test_an_exported_detector(tmp_path, onnx_file, photos):
    """Outputs have the detections of `Predictor` with at least the score. The temporal exit gets close calls too."""
    paths = [tmp_path / f"{number}.png" for number in range(len(photos))]
    for path, image in zip(paths, photos, strict=True):
        Image.fromarray(image).save(path)
    predictor = open_predictor(onnx_file, "onnxruntime", 1, 0.5)
    assert predictor.score_thresh.tolist() == pytest.approx([0.4, 0.4])
    assert open_predictor(onnx_file, "onnxruntime", 1, 0.1).score_thresh.tolist() == pytest.approx([0.3, 0.3])
    sources = find_sources(paths)
    lines = list(predict(predictor, sources, tmp_path / "out", save=["counts", "csv"], score=0.45))
    expected = [Predictor(onnx_file)(image) for image in photos]
    counts = rows(tmp_path / "out" / "counts.csv")
    assert [row["exit"] for row in counts] == [found.exit_name for found in expected]
    assert [int(row["found"]) for row in counts] == [int((found.scores >= 0.45).sum()) for found in expected]
    assert len(rows(tmp_path / "out" / "detections.csv")) == sum(int(row["found"]) for row in counts) > 0
    assert len(lines) == len(photos)


def test_is_exported(onnx_file, staged_folder, tmp_path):
    assert is_exported(onnx_file) and is_exported(staged_folder)
    assert not is_exported("voc_animals") and not is_exported("model.pth") and not is_exported(tmp_path)


TORCHLESS = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in "torch torchvision onnx scipy matplotlib fvcore cv2 yaml".split():
            raise ImportError(name)

sys.meta_path.insert(0, Missing())
import earlyexit_ssd.deploy.predict, earlyexit_ssd.deploy.stream, earlyexit_ssd.console
from earlyexit_command import main
sys.exit(main(sys.argv[1:]))
"""


def test_the_command_runs_without_the_packages_for_training(tmp_path, onnx_file):
    def run(*arguments):
        command = [sys.executable, "-c", TORCHLESS, "predict", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    dataclasses.replace(RULE, classes=("cat", "dog")).save(tmp_path / "rule.json")
    first, second = (photo(tmp_path / name).name for name in ("a.png", "b.png"))
    outputs = ["--out", tmp_path / "out", "--save", ",".join(SAVES)]
    result = run(first, second, "--weights", onnx_file, *outputs, "--stream", tmp_path / "rule.json")
    assert result.returncode == 0, result.stderr
    assert f"{second}: repeated, " in result.stdout  # the same photo under another name
    assert len(os.listdir(tmp_path / "out")) == 6
    result = run(first)
    assert result.returncode == 2 and "voc_animals runs in PyTorch, which is not installed" in result.stderr
