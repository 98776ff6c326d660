"""The benchmark, with detectors that only sleep."""

import os
import time

import numpy as np
import pytest
from PIL import Image

from earlyexit_ssd.deploy import benchmark as module
from earlyexit_ssd.deploy.benchmark import (
    EASY,
    HARD,
    MIXED,
    Comparison,
    ExportedFile,
    Ratio,
    Row,
    Times,
    benchmark,
    machine,
    ratio,
    table,
)
from earlyexit_ssd.errors import EarlyExitError
from tests.deploy.conftest import build_photos
from tests.deploy.fakes import Waiter


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Paths of two dark photos, a dim photo and four bright photos."""
    folder = tmp_path_factory.mktemp("photos")
    for place, level in enumerate([20, 200, 200, 20, 80, 200, 200]):
        Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(folder / f"{place}.png")
    return [str(path) for path in sorted(folder.iterdir())]


def test_each_stream_and_batch_is_timed_with_all_detectors(paths, caplog):
    contestants = [Waiter("routed", ms=2), Waiter("plain", "there", ms=20, routed=False), Waiter("last", ms=20)]
    rows = benchmark(contestants, paths, threads=[1], batches=[1, 2, 5], rounds=3)
    assert [row.stream for row in rows[::3]] == [*[MIXED, EASY, HARD] * 2, MIXED]
    expected = [(1, 7, 21), (1, 2, 6), (1, 4, 12), (2, 6, 9), (2, 2, 3), (2, 4, 6), (5, 5, 3)]
    assert [(row.batch, row.photos, row.calls) for row in rows[::3]] == expected
    assert f"batch 5 is not timed on {HARD} photos: there are 4" in caplog.text
    assert [row.name for row in rows[:3]] == ["routed", "plain", "last"]
    # the first detector of a runtime is compared with the first of all
    assert rows[0].against is None and rows[1].against.name == rows[2].against.name == "routed"
    for row in rows[1::3]:
        assert 20 <= row.wall.p50 < 38 and row.cpu.mean < 10  # per photo, not per call; sleeping takes no CPU time
        assert 2 < row.against.wall.value < 12  # time.sleep may take longer than its argument
    assert rows[0].peak_mb is None or 10 < rows[0].peak_mb < 400


def test_a_detector_without_exits_has_one_stream(paths):
    assert {row.stream for row in benchmark([Waiter("plain", routed=False)], paths)} == {MIXED}


def test_others_are_compared_with_the_first_of_their_runtime():
    runtimes = ["onnx", "openvino", "onnx", "openvino"]
    contestants = [Waiter(f"detector {place}", runtime) for place, runtime in enumerate(runtimes)]
    times = np.ones((4, 1, 8, 2)) * np.array([1, 2, 3, 5])[:, None, None, None]
    times[2, 0, 0] = 11  # one call of eight
    times[..., 1] *= [[[1]], [[2]], [[1]], [[1]]]  # the second detector uses two cores
    rows = list(module._rows(contestants, (1, 1, MIXED, 8), times, [None] * 4))
    assert [row.against and row.against.name for row in rows] == [None, "detector 0", "detector 0", "detector 1"]
    assert [row.against.wall.value for row in rows[1:]] == [2, 4, 2.5]
    assert rows[2].against.wall_p99.value == pytest.approx(3 + 0.93 * 8)
    assert [row.against.cpu_p99.value for row in rows[1:]] == pytest.approx([4, 3 + 0.93 * 8, 1.25])


def test_files_with_equal_names_are_named_by_their_paths():
    contestants = [ExportedFile(path) for path in ("a/detector.onnx", "b/detector.onnx", "b/full.onnx")]
    rows = list(module._rows(contestants, (1, 1, MIXED, 8), np.ones((3, 1, 8, 2)), [None] * 3))
    assert [row.name for row in rows] == ["a/detector.onnx", "b/detector.onnx", "full.onnx"]
    assert rows[2].against.name == "a/detector.onnx"


def test_ratio_draws_calls_with_all_their_rounds():
    # eight calls, two of them three times as long; the rounds are equal, so they do not change the interval
    one, other = np.array([[1.0] * 6 + [3.0] * 2]), np.ones((1, 8))
    found = ratio(np.tile(one, (4, 1)), np.tile(other, (4, 1)))
    assert found == ratio(one, other)
    assert found.value == 1.5 and found.low == 1.0 and 2.0 <= found.high <= 2.25
    assert ratio(2 * one, one) == Ratio(2, 2, 2)  # in pairs
    assert ratio(one, other, 0.99).value == pytest.approx(3.0)
    assert ratio(one[:, :5], other[:, :5]) == Ratio(1, None, None)


def test_times_are_quantiles():
    assert Times.of(np.arange(101.0)) == Times(50, 50, 90, 99)


def test_table_names_the_detector_of_each_comparison():
    times, found = Times(1, 2, 3, 4), Ratio(1.5, 1.25, 1.75)
    setting = (1, 16, EASY, 40, 2)
    rows = [
        Row("a.onnx", "ONNX Runtime", *setting, times, times, None, 99.6),
        Row("b.onnx", "ONNX Runtime", *setting, times, times, Comparison("a.onnx", *[found] * 4), None),
        Row("a.onnx", "ONNX Runtime", 2, *setting[1:], times, times, None, None),
    ]
    lines = table(rows).splitlines()
    assert lines[0] == "threads 1, batch 16, 40 photos all easy, 2 calls; milliseconds for a photo"
    assert lines[4] == "| a.onnx | ONNX Runtime | 1.0 | 2.0 | 3.0 | 4.0 | 1.0 | 4.0 | 100 | - | - | - | - | - |"
    assert lines[5].endswith("| - | a.onnx" + " | 1.50 [1.25, 1.75]" * 4 + " |")
    assert lines[7].startswith("threads 2,") and len({line.count("|") for line in lines if line[:1] == "|"}) == 1


def test_decoding_is_not_timed(monkeypatch):
    monkeypatch.setattr(module, "read_image", lambda path: time.sleep(0.2) or path)
    monkeypatch.setattr(module, "_detect", lambda photos: photos, raising=False)
    wall, cpu, exits = module._run(["a.jpg", "b.jpg"])
    assert wall < 0.1 and cpu < 0.1 and exits == ["a.jpg", "b.jpg"]


def test_a_process_that_dies_is_named(paths):
    with pytest.raises(EarlyExitError, match="last: its process died"):
        benchmark([Waiter("first"), Waiter("last", dies=True)], paths)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threads": [0]}, r"threads \[0\]"),
        ({"batches": []}, r"batch \[\]"),
        ({"rounds": 0}, r"rounds \[0\]"),
        ({"score": 2}, "score 2"),
        ({"batches": [16]}, "7 photos"),
    ],
)
def test_numbers_out_of_range_are_errors_before_a_process_starts(paths, changes, message):
    with pytest.raises(EarlyExitError, match=message):
        benchmark([Waiter("first")], paths, **changes)


def test_machine_has_processor_and_versions():
    found = machine()
    assert found["processor"] and found["cores"] == os.cpu_count()
    assert {"python", "earlyexit_ssd", "numpy", "onnxruntime"} <= found["versions"].keys()


def test_an_exported_file_reports_the_exits_of_its_predictor(onnx_file):
    contestant = ExportedFile(str(onnx_file))
    assert (contestant.name, contestant.runtime) == ("detector.onnx", "ONNX Runtime")
    assert ExportedFile("folder/detector.XML").runtime == "OpenVINO"
    detect = contestant.open(1, 0.5)
    photos = build_photos(6)
    assert sorted(map(str, detect(photos))) == ["0", "0", "1", "1", "None", "None"]
