"""The predictor: inputs, outputs and errors."""

import itertools
import json
import shutil
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import numpy as np
import pytest
import torch

from earlyexit_ssd.data.dataset import as_tensor
from earlyexit_ssd.deploy import Detections, Predictor
from earlyexit_ssd.deploy.predictor import as_photo
from earlyexit_ssd.drift import DriftReference
from earlyexit_ssd.errors import EarlyExitError


@pytest.fixture(scope="module")
def predictor(onnx_file):
    return Predictor(onnx_file)


def equal(first: Detections, second: Detections) -> bool:
    same = all(np.array_equal(getattr(first, key), getattr(second, key)) for key in ("boxes", "labels", "scores"))
    return same and (first.exit_name, first.exit_confidence) == (second.exit_name, second.exit_confidence)


def assert_same(expected: dict, found: Detections) -> None:
    """Match the detections one to one. Equal scores may come in any order."""
    left, right = (
        np.column_stack(
            [10 * np.asarray(each["boxes"]), 1e3 * np.asarray(each["scores"]), 1e6 * np.asarray(each["labels"])]
        )
        for each in (expected, vars(found))
    )
    assert len(left) == len(right) > 0
    assert (np.diff(found.scores) <= 0).all()
    distances = np.abs(left[:, None] - right[None]).max(-1)
    assert distances.min(0).max() <= 1 and distances.min(1).max() <= 1
    assert len(set(distances.argmin(1))) == len(left)


def expected_of(model, photo) -> dict:
    with torch.no_grad():
        return model([as_tensor(photo)])[0]


def test_every_photo_has_the_model_s_exit_and_detections(model, photos, predictor):
    taken = set()
    for photo in photos:
        expected, found = expected_of(model, photo), predictor(photo)
        taken.add(found.exit_name)
        assert model.exit_names[expected["exit_index"]] == found.exit_name
        assert found.exit_confidence == pytest.approx(float(expected["exit_confidence"]), abs=1e-5)
        assert found.boxes.shape == (len(found), 4) and found.boxes.dtype == np.float32
        assert found.labels.dtype == np.int64
        assert_same(expected, found)
        assert found.class_names == [model.classes[label - 1] for label in found.labels]
        assert found.ms > 0
    assert taken == {"exit8", "exit12", "full"}
    assert predictor.classes == ("cat", "dog") and predictor.exit_names == ("exit8", "exit12", "full")
    assert list(predictor.thresholds.values()) == pytest.approx(model.router.thresholds.tolist())
    assert predictor.certificate is None and predictor.versions["torch"] in torch.__version__


def test_staged_files_give_the_same_as_one_file(predictor, staged_folder, photos):
    staged = Predictor(staged_folder)
    for photo in photos:
        expected, found = predictor(photo), staged(photo)
        assert_same(vars(expected), found)
        assert (expected.exit_name, expected.exit_confidence) == (found.exit_name, pytest.approx(found.exit_confidence))


def test_batches_threads_and_the_warm_up_change_no_detections(predictor, photos):
    alone = [predictor(photo) for photo in photos]
    predictor.warm_up()
    assert all(map(equal, alone, predictor.predict(photos)))
    with ThreadPoolExecutor(2) as pool:
        assert all(map(equal, alone * 4, pool.map(predictor, photos * 4)))
    assert predictor.predict([]) == []
    assert len(predictor.predict(np.zeros((2, 8, 8, 3), np.uint8))) == 2


@pytest.fixture
def certified(staged_folder, tmp_path):
    """Function that writes a folder of staged files whose certificate has these exits, and confidence 0.5 at each."""

    def write(exit_index, block=None, names=("exit8", "exit12", "full")):
        reference = DriftReference.from_decisions(names, exit_index, [np.full(len(exit_index), 0.5)] * (len(names) - 1))
        folder = shutil.copytree(staged_folder, tmp_path / "certified", dirs_exist_ok=True)
        manifest = json.loads((folder / "manifest.json").read_text())
        certificate = {"drift": asdict(reference), "target": {"kind": "risk", "block": block}}
        manifest["metadata"]["certificate"] = json.dumps(certificate)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    return write


def test_digest_is_of_files_and_thresholds(onnx_file, staged_folder, tmp_path, predictor):
    copied = shutil.copy(onnx_file, tmp_path / "other.onnx")
    assert Predictor(copied).digest == predictor.digest != Predictor(copied, thresholds={"exit8": 0.0}).digest
    folder = shutil.copytree(staged_folder, tmp_path / "staged")
    assert Predictor(folder).digest == Predictor(staged_folder).digest
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text() + " ")
    assert Predictor(folder).digest != Predictor(staged_folder).digest


def test_drift_from_the_certificate(certified, photos, predictor):
    full = next(photo for photo in photos if predictor(photo).exit_name == "full")
    folder = certified([2] * 50)
    alike = Predictor(folder)
    assert alike.drift() is None
    alike.warm_up()
    assert alike.drift() is None  # blank photos do not count
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(alike, [full] * 10))
    alike.predict([full] * 2)
    found = alike.drift()
    assert (found.photos, found.drifted, found.shares["full"], found.p_value) == (12, False, 1.0, 1.0)
    assert found.text == "no drift in 12 photos (p = 1)"

    shifted = Predictor(certified([0] * 50))
    shifted.predict([full] * 12)
    found = shifted.drift()
    assert found.drifted and found.statistic == 1.0
    assert "% of the last 12 photos, " in found.text  # exit8 and the full path have changed equally
    assert found.text.startswith(("drift: exit8 took 0 %", "drift: full took 100 %"))

    blocks = Predictor(certified([0] * 50, block=5))  # 3 draws against 10
    blocks.predict([full] * 12)
    assert (blocks.drift().photos, blocks.drift().drifted) == (3, False)


def test_drift_needs_a_certificate_and_the_files_own_thresholds(certified, photos, predictor):
    predictor(photos[0])
    assert predictor.drift() is None
    moved = Predictor(certified([0] * 50), thresholds={"exit8": 2.0})
    moved(photos[0])
    assert moved.drift() is None
    message = "the certificate is for the exits exit6, exit12, the detector has exit8, "
    with pytest.raises(EarlyExitError, match=message):
        Predictor(certified([0] * 50, names=("exit6", "exit12", "full")))


def test_thresholds_can_be_set(onnx_file, photos, predictor):
    first = Predictor(onnx_file, thresholds={"exit8": 0.0})
    last = Predictor(onnx_file, thresholds=[2.0, 2.0])
    assert {first(photo).exit_name for photo in photos} == {"exit8"}
    assert {last(photo).exit_name for photo in photos} == {"full"}
    middle = Predictor(onnx_file, thresholds={"exit8": 2.0})
    assert middle.thresholds == {"exit8": 2.0, "exit12": predictor.thresholds["exit12"]}


def test_thresholds_and_score_thresholds_can_be_set_later(onnx_file, photos):
    detector = Predictor(onnx_file)
    detector.thresholds = {"exit8": 2.0, "exit12": 2.0}
    assert {detector(photo).exit_name for photo in photos} == {"full"}
    detector.score_thresh = 1.0
    assert not any(len(detector(photo).boxes) for photo in photos)
    with pytest.raises(TypeError):
        detector.thresholds["exit8"] = 0.0  # would have no effect
    with pytest.raises(ValueError, match="read-only"):
        detector.score_thresh[0] = 0.1
    with pytest.raises(EarlyExitError, match=r"score_thresh is -1, expected a number in \[0, 1\]"):
        detector.score_thresh = -1
    with pytest.raises(EarlyExitError, match="'exit13', which is not an early exit"):
        detector.thresholds = {"exit8": 0.0, "exit13": 0.0}
    assert detector.thresholds == {"exit8": 2.0, "exit12": 2.0}  # all are set or none
    detector.classes = ("N/A", "N/A")  # as ids that COCO does not use
    detector.score_thresh = {"N/A": 0.25}
    assert detector.score_thresh.tolist() == [0.25, 0.25]


def test_score_thresholds_can_be_set(model, onnx_file, staged_folder, photos, monkeypatch):
    for score_thresh, by_class in ((0.35, 0.35), ({"dog": 0.4}, {"cat": model.score_thresh, "dog": 0.4})):
        monkeypatch.setattr(model, "score_thresh", by_class)
        for path, photo in itertools.product((onnx_file, staged_folder), photos):
            expected, found = expected_of(model, photo), Predictor(path, score_thresh=score_thresh)(photo)
            assert sorted(found.labels) == sorted(expected["labels"].tolist())
            assert np.allclose(found.scores, expected["scores"], atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"runtime": "tensorrt"}, "runtime 'tensorrt': expected one of onnxruntime, openvino"),
        ({"threads": 0}, "threads 0: expected a whole number from 1 to 1024"),
        ({"score_thresh": 1.5}, r"score_thresh is 1.5, expected a number in \[0, 1\]"),
        ({"score_thresh": float("nan")}, "score_thresh is nan"),
        ({"score_thresh": {"dgo": 0.1}}, r"'dgo', which is not a class of the file \(did you mean 'dog'\?\)"),
        ({"thresholds": {"exit7": 0.1}}, "'exit7', which is not an early exit of the file"),
        ({"thresholds": {"exit8": -0.1}}, "threshold of exit8 is -0.1"),
        ({"thresholds": [0.1]}, "expected a number for each of exit8, exit12, or exit name -> number"),
        ({"thresholds": 0.5}, "expected a number for each of exit8, exit12"),
    ],
)
def test_an_invalid_setting_is_an_error(onnx_file, settings, message):
    with pytest.raises(EarlyExitError, match=message):
        Predictor(onnx_file, **settings)


def test_arrays_of_other_kinds_become_photos():
    grey = np.array([[0, 100], [200, 255]], np.uint8)
    rgb = np.stack([grey, grey, grey], -1)
    assert np.array_equal(as_photo(grey), rgb) and np.array_equal(as_photo(grey[..., None]), rgb)
    assert np.array_equal(as_photo(rgb / 255), rgb) and np.array_equal(as_photo(rgb.astype(np.int64)), rgb)
    assert np.array_equal(as_photo(np.full((2, 2), 0.5, np.float16)), np.full((2, 2, 3), 128))
    clear = np.concatenate([rgb, np.full((2, 2, 1), 51, np.uint8)], -1)  # alpha 0.2
    assert as_photo(clear)[..., 0].tolist() == [[204, 224], [244, 255]]
    turned = np.arange(24, dtype=np.uint8).reshape(4, 2, 3).transpose(1, 0, 2)[:, ::-1]
    assert as_photo(turned).flags["C_CONTIGUOUS"] and np.array_equal(as_photo(turned), turned)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ([[1, 2]], r"image: a list, expected a numpy array uint8 \[H, W, 3\] RGB"),
        (np.zeros((3, 8, 9), np.uint8), r"\[3, 8, 9\].*channels must come last: image.transpose\(1, 2, 0\)"),
        (np.zeros((1, 8, 9, 3), np.uint8), r"uint8 \[1, 8, 9, 3\], expected uint8 \[H, W, 3\]"),
        (np.zeros((0, 9, 3), np.uint8), r"shape \[0, 9, 3\] has no pixels"),
        (np.full((8, 9, 3), np.nan), "float64 values from nan to nan, expected uint8, or floats in .* without NaN"),
        (np.full((8, 9, 3), 200.0, np.float32), "float32 values from 200 to 200"),
        (np.full((8, 9), 300, np.uint16), "uint16 values from 300 to 300"),
        (np.zeros((8, 9), bool), "values of type bool"),
        (np.array([["a"]]), "values of type <U1"),
    ],
)
def test_an_invalid_photo_is_an_error_of_one_line(predictor, image, message):
    with pytest.raises(EarlyExitError, match=message):
        predictor(image)
    with pytest.raises(EarlyExitError, match="image 1: "):
        predictor.predict([np.zeros((8, 8), np.uint8), image])
    with pytest.raises(EarlyExitError, match=r"images \[8, 8, 3\]: expected a list"):
        predictor.predict(np.zeros((8, 8, 3), np.uint8))


@pytest.mark.parametrize("size", [(1, 1), (1000, 4), (1300, 1100)])
def test_photos_of_any_size(model, predictor, size):
    photo = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    expected, found = expected_of(model, photo), predictor(photo)
    assert found.exit_index == expected["exit_index"]
    assert_same(expected, found)


def test_an_unusable_file_is_an_error_of_one_line(onnx_file, staged_folder, tmp_path):
    content = onnx_file.read_bytes()
    for name, bad, message in (
        ("cut.onnx", content[: len(content) // 2], "ONNX Runtime cannot load it"),
        ("empty.onnx", b"", "ONNX Runtime cannot load it"),
        ("text.onnx", b"no graph", "ONNX Runtime cannot load it"),
        ("foreign.onnx", (staged_folder / "detections.onnx").read_bytes(), "not a file of earlyexit export"),
        ("detector.xml", b"<net/>", "add --runtime openvino to the command, or runtime='openvino' in Python"),
    ):
        (tmp_path / name).write_bytes(bad)
        with pytest.raises(EarlyExitError, match=f"{name}: .*{message}"):
            Predictor(tmp_path / name)
    with pytest.raises(EarlyExitError, match="none.onnx: no such file"):
        Predictor(tmp_path / "none.onnx")
    with pytest.raises(EarlyExitError, match="manifest.json cannot be used"):
        Predictor(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"detections": "../detections.onnx"}, "a file outside the folder"),
        ({"detections": "other.onnx"}, "other.onnx: ONNX Runtime cannot load it"),
        ({"segments": 3}, "manifest.json cannot be used"),
        ({"segments": []}, r"manifest.json cannot be used \(ValueError: segments is empty\)"),
        ({"metadata": []}, "manifest.json cannot be used"),
        ({"metadata": {"exit_names": '["full"]'}}, r"exit_index \[0, 1, 2\] does not fit exit_names"),
        (
            {"metadata": {"format": "earlyexit_ssd detector/9", "exit_names": '["exit8", "exit12", "full"]'}},
            "the format is 'earlyexit_ssd detector/9'",
        ),
        (
            {"metadata": {"format": "earlyexit_ssd detector/1", "exit_names": "[1, 2, 3]", "classes": "[" * 100_000}},
            "not a file of earlyexit export",
        ),
        ({"metadata": {"exit_names": "[" * 100_000}}, "manifest.json cannot be used"),
        ({"score_thresh": [2.0, 0.5]}, r"score thresholds \[2.0, 0.5\], expected numbers in \[0, 1\]"),
        ({"score_thresh": [float("nan"), 0.5]}, "score thresholds .nan, 0.5., expected"),
        ({"thresholds": [5, None]}, "thresholds .5.0, None., expected"),
        ({"exit_names": ["exit8", "full", "exit12"]}, "expected different names, the last full"),
        ({"exit_names": ["exit8", "exit8", "full"]}, "expected different names, the last full"),
        ({"empty": [0]}, "empty is not true or false, or true for the full path"),
        ({"empty": [False, False, True]}, "empty is not true or false, or true for the full path"),
    ],
)
def test_a_damaged_folder_is_an_error_of_one_line(staged_folder, tmp_path, change, message):
    shutil.copytree(staged_folder, tmp_path / "staged")
    manifest = tmp_path / "staged" / "manifest.json"
    content = json.loads(manifest.read_text())
    for key in change.keys() & {"score_thresh", "thresholds", "exit_names"}:
        content["metadata"][key] = json.dumps(change[key])
    for segment, empty in zip(content["segments"], change.get("empty", ()), strict=False):
        segment["empty"] = empty
    change = {key: value for key, value in change.items() if key in content}
    manifest.write_text(json.dumps({**content, **change}))
    with pytest.raises(EarlyExitError, match=message):
        Predictor(tmp_path / "staged")


def test_supervision_takes_the_detections(monkeypatch):
    found = Detections(np.zeros((1, 4)), np.array([2]), ["dog"], np.array([0.5]), 2, "full", None, 1.0)
    monkeypatch.setitem(sys.modules, "supervision", types.SimpleNamespace(Detections=dict))
    fields = found.to_supervision()
    assert fields["class_id"].tolist() == [2] and fields["data"]["class_name"].tolist() == ["dog"]


def test_a_missing_package_is_an_error_of_one_line(onnx_file, predictor, monkeypatch):
    found = predictor(np.zeros((8, 8, 3), np.uint8))
    calls = {
        "supervision": found.to_supervision,
        "onnxruntime": lambda: Predictor(onnx_file),
        "openvino": lambda: Predictor(onnx_file, "openvino"),
    }
    for name, call in calls.items():
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(EarlyExitError, match=f"^the package {name} is missing .*: pip install {name}$"):
            call()


def test_openvino_can_only_raise_the_score_thresholds_of_onnx_files(onnx_file, staged_folder, predictor, photos):
    pytest.importorskip("openvino")
    for path in (onnx_file, staged_folder):
        in_openvino = Predictor(path, "openvino", score_thresh=0.35)
        for photo in photos:
            expected, found = predictor(photo), in_openvino(photo)
            keep = expected.scores > 0.35
            assert_same({key: getattr(expected, key)[keep] for key in ("boxes", "labels", "scores")}, found)
            assert expected.exit_name == found.exit_name
        with pytest.raises(EarlyExitError, match="export with --format openvino"):
            Predictor(path, "openvino", score_thresh=0.1)


def test_openvino_cannot_change_the_exits_thresholds_of_one_onnx_file(onnx_file, staged_folder, photos):
    pytest.importorskip("openvino")
    with pytest.raises(EarlyExitError, match="export with --format openvino"):
        Predictor(onnx_file, "openvino", thresholds={"exit8": 0.2})
    assert Predictor(staged_folder, "openvino", thresholds={"exit8": 0.0})(photos[0]).exit_name == "exit8"
