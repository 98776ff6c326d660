"""An exported file has the model's exits and detections; otherwise it is not written."""

import copy
import dataclasses
import json
import weakref
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from earlyexit_ssd import ExitRouter
from earlyexit_ssd.deploy import Predictor
from earlyexit_ssd.errors import DataError, EarlyExitError
from earlyexit_ssd.modeling.trunk import evaluating
from earlyexit_ssd.pipeline import export
from earlyexit_ssd.pipeline.export import export_detector, open_any
from tests.deploy.conftest import build_model, build_photos, save_photos


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return sorted(save_photos(tmp_path_factory.mktemp("photos"), 6).iterdir())


def changed(model, **attributes):
    """A copy of the model with other attributes."""
    model = copy.deepcopy(model)
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def with_tap_router(**exits):
    """A model whose router reads the taps, as empty exits need it."""
    model, rng = build_model(**exits), np.random.default_rng(0)
    with evaluating(model):
        taps, _ = model.trunk_maps(torch.zeros(1, 3, *model.transform.fixed_size))
    lengths = [2 * tap.shape[1] + (not empty) for tap, empty in zip(taps, model.empty, strict=True)]
    parameters = [{"weight": rng.normal(0, 0.3, length).tolist(), "bias": 0.0} for length in lengths]
    model.router = ExitRouter(len(taps), policy="foreseen_emptiness", parameters=parameters, thresholds=0.5)
    return model


def node_kinds(graph) -> set[str]:
    kinds = {node.op_type for node in graph.node}
    for node in graph.node:
        for attribute in node.attribute:
            kinds |= node_kinds(attribute.g) if attribute.HasField("g") else set()
    return kinds


@pytest.mark.parametrize(
    "exits",
    [
        {"exit_layers": (4, 8), "empty": (4, 8)},
        {"exit_layers": (4, 8), "empty": (8,)},
        {"exit_layers": (8,), "glances": ((32, 12), (64, 8))},
    ],
)
def test_empty_exits_and_glances_detect_nothing(tmp_path, paths, traced_once, exits):
    model = with_tap_router(**exits)
    last = model.num_early_exits
    exported = export_detector(model, tmp_path / "detector.onnx", photos=paths)
    assert exported.photos == 6 and exported.size == exported.path.stat().st_size
    predictor, photo = Predictor(exported.path), np.asarray(Image.open(paths[0]))
    for index, name in enumerate(predictor.exit_names):
        predictor._thresholds[:] = [0.0 if place >= index else 2.0 for place in range(last)]
        found = predictor(photo)
        assert found.exit_name == name and found.boxes.shape == (len(found), 4)
        assert (len(found) == 0) == (index < last and model.empty[index])


def test_batch_norm_is_folded_and_closed_exits_are_left_out(tmp_path, paths, onnx_file, model):
    operators = node_kinds(onnx.load(onnx_file).graph)
    assert operators >= {"Conv", "If"} and "BatchNormalization" not in operators
    closed = changed(model)
    closed.router.thresholds = [2.0, *model.router.thresholds.tolist()[1:]]
    exported = export_detector(closed, tmp_path / "closed.onnx", photos=paths)
    assert exported.size < onnx_file.stat().st_size
    for runtime in ("onnxruntime", "openvino"):
        pytest.importorskip(runtime)
        predictor = Predictor(exported.path, runtime, thresholds={"exit8": 2.0})  # it may be closed again
        assert predictor.exit_names == ("exit8", "exit12", "full")
        assert predictor.thresholds["exit8"] is None and predictor._thresholds[0] == 2.0
        with pytest.raises(EarlyExitError, match="exit8 was closed when the file was written"):
            Predictor(exported.path, runtime, thresholds={"exit8": 0.5})
    assert Predictor(exported.path).thresholds["exit8"] is None


def test_without_a_router_the_file_is_the_full_path(tmp_path, paths, model, traced_once):
    plain = changed(model, router=None)
    exported = export_detector(plain, tmp_path / "full.onnx", photos=paths)
    predictor = Predictor(exported.path)
    found = predictor(np.zeros((9, 9, 3), np.uint8))
    assert found.exit_name == "full" and found.exit_confidence is None and exported.detections > 0
    assert predictor.exit_names == ("full",) and predictor.thresholds == {} and found.exit_index == 0
    assert plain.exit_names == ("exit8", "exit12", "full")


def test_few_photos_are_in_memory_at_a_time(tmp_path, paths, model, traced_once, monkeypatch):
    read, photos, alive = export.read_image, [], []

    def reading(path):
        photo = read(path)
        photos.append(weakref.ref(photo))
        alive.append(sum(photo() is not None for photo in photos))
        return photo

    monkeypatch.setattr(export, "read_image", reading)
    assert export_detector(model, tmp_path / "detector.onnx", photos=paths).photos == len(paths) == 6
    assert max(alive) <= 2


def test_unreadable_photos_are_left_out_of_the_comparison(tmp_path, paths, model, traced_once, caplog):
    (tmp_path / "broken.jpg").write_bytes(b"no photo")
    export_detector(model, tmp_path / "detector.onnx", photos=[tmp_path / "broken.jpg", paths[0]])
    assert "left out: " in caplog.text and "broken.jpg" in caplog.text
    with pytest.raises(DataError, match="none of the 1 photos can be read"):
        export_detector(model, tmp_path / "other.onnx", photos=[tmp_path / "broken.jpg"])
    assert not (tmp_path / "other.onnx").exists()


@pytest.mark.parametrize("routed", [True, False])
def test_the_file_has_the_score_thresholds_of_the_classes(tmp_path, paths, model, traced_once, routed):
    limited = changed(model, router=model.router if routed else None, score_thresh={"cat": 0.45})
    predictor = Predictor(export_detector(limited, tmp_path / "detector.onnx", photos=paths).path)
    assert predictor.score_thresh.tolist() == pytest.approx([0.45, 0.001]) and predictor.classes == ("cat", "dog")


@pytest.mark.parametrize("file_format", ["onnx", "staged"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nms_thresh": 0.3}, "detections at .* are not the model's: (cat|dog) [01]"),
        ({"mean": (0.6, 0.5, 0.5)}, "not the model's|leaves at"),
        ({"box_weights": (11.0, 10.0, 5.0, 5.0)}, "not the model's"),
        ({"thresholds": np.float32([0.0, 0.0])}, r"the file leaves at exit8, the model at \w+ \(confidence"),
    ],
)
def test_a_file_with_another_exit_or_other_detections_is_not_written(
    tmp_path, paths, model, traced_once, monkeypatch, change, message, file_format
):
    real = export._settings
    monkeypatch.setattr(export, "_settings", lambda model: dataclasses.replace(real(model), **change))
    with pytest.raises(EarlyExitError, match=message):
        export_detector(model, tmp_path / ("a" if file_format == "staged" else "a.onnx"), file_format, paths)
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_other_outputs_of_a_head_is_not_written(tmp_path, paths, model, traced_once, monkeypatch):
    segments = export.build_segments(model)
    weights = max(segments[-1].model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weights.raw_data = (np.frombuffer(weights.raw_data, np.float32) * np.float32(1.01)).tobytes()
    monkeypatch.setattr(export, "build_segments", lambda model: segments)
    (tmp_path / "a.onnx").write_text("an earlier file")
    with pytest.raises(EarlyExitError, match=r"of full differ by .* nothing was written"):
        export_detector(model, tmp_path / "a.onnx", photos=paths)
    assert (tmp_path / "a.onnx").read_text() == "an earlier file"


def test_a_confidence_at_its_threshold_may_fall_on_either_side(model):
    photo, tied = build_photos(1)[0], changed(model)
    with torch.no_grad():
        tied.router.thresholds = 2.0
        (expected,) = tied([export.as_tensor(photo)])
        confidence = float(tied.router.confidence(tied.exit_outputs([export.as_tensor(photo)]).signals(0), 0))
        found = export.Detections(*[None] * 4, exit_index=0, exit_name="exit8", exit_confidence=None, ms=0)
        tied.router.thresholds = (confidence - 5e-6, 2.0)
        assert not export._is_same(tied, photo, expected, found)
        tied.router.thresholds = (confidence - 5e-5, 2.0)
        with pytest.raises(EarlyExitError, match="the file leaves at exit8, the model at full"):
            export._is_same(tied, photo, expected, found)


def test_a_folder_of_staged_files_replaces_an_earlier_one_and_nothing_else(
    tmp_path, paths, model, staged_folder, traced_once
):
    files = {"0_exit8.onnx", "1_exit12.onnx", "2_full.onnx", "detections.onnx", "manifest.json"}
    assert {path.name for path in staged_folder.iterdir()} == files
    plain, folder = changed(model, router=None), tmp_path / "staged"
    folder.mkdir()
    for _ in range(2):
        export_detector(plain, folder, "staged", paths)
    assert {path.name for path in folder.iterdir()} == {"0_full.onnx", "detections.onnx", "manifest.json"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(EarlyExitError, match="mine: holds other files"):
        export_detector(plain, tmp_path / "mine", "staged", paths)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "staged"}


@pytest.mark.parametrize("exits", [None, {"glances": ((32, 12), (64, 8))}, {}])
def test_exits_of_an_openvino_file(tmp_path, paths, model, traced_once, exits):
    pytest.importorskip("openvino")
    model = model if exits is None else with_tap_router(exit_layers=(8,), **exits)
    exported = export_detector(model, tmp_path / "detector.xml", "openvino", paths)
    assert {path.name for path in tmp_path.iterdir()} == {"detector.xml", "detector.bin"}
    thresholds = dict.fromkeys(model.exit_names[:-1], 2.0) | {"exit8": 0.0}
    predictor = Predictor(exported.path, "openvino", thresholds=thresholds, score_thresh={"cat": 0.9})
    own = predictor._thresholds.copy()
    for path in paths[:2]:  # a runtime that ignores an input would repeat an earlier result
        photo = np.asarray(Image.open(path))
        for values, name in ((own, "exit8"), (2.0, "full"), (0.0, model.exit_names[0])):
            predictor._thresholds[:] = values
            assert predictor(photo).exit_name == name
    assert predictor.classes == ("cat", "dog")


def test_an_openvino_file_without_exits(tmp_path, paths):
    """Exit and confidence are constants, which have a second name in OpenVINO."""
    pytest.importorskip("openvino")
    exported = export_detector(build_model(exit_layers=()), tmp_path / "detector.xml", "openvino", paths)
    assert Predictor(exported.path, "openvino")(np.asarray(Image.open(paths[0]))).exit_name == "full"


@pytest.mark.parametrize(
    ("name", "file_format", "message"),
    [
        ("a.pth", "onnx", "a.pth: a file of format onnx ends in .onnx"),
        ("a.onnx", "openvino", "a file of format openvino ends in .xml"),
        ("a.onnx", "tflite", "format 'tflite': expected one of onnx, staged, openvino"),
        ("taken.onnx", "onnx", "taken.onnx: there is a folder of that name"),
    ],
)
def test_an_unusable_path_format_or_router_is_an_error(tmp_path, model, name, file_format, message):
    (tmp_path / "taken.onnx").mkdir()
    with pytest.raises(EarlyExitError, match=message):
        export_detector(model, tmp_path / name, file_format)
    with pytest.raises(EarlyExitError, match="a hybrid router cannot be exported"):
        export_detector(changed(model, router=ExitRouter(2, hybrid=True)), tmp_path / "a.onnx")


def test_the_model_and_its_mode_do_not_change(tmp_path, paths, model):
    training = changed(model).train()
    before = {name: value.clone() for name, value in training.state_dict().items()}
    export_detector(training, tmp_path / "a.onnx", photos=paths[:1])
    assert training.training and all(torch.equal(value, before[name]) for name, value in training.state_dict().items())


def test_a_model_file_is_opened_as_its_detector(tmp_path, model):
    model.save(tmp_path / "model.pth")
    assert open_any(tmp_path / "model.pth").router is not None
    assert open_any(tmp_path / "model.pth", router=False).router is None
    content = torch.load(tmp_path / "model.pth", weights_only=True)
    content["architecture"]["detector"] = "ssd300_vgg16"
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(EarlyExitError, match="other.pth"):
        open_any(tmp_path / "other.pth")


def test_the_file_has_the_certificate_only_of_the_calibrated_router(model):
    calibrated = changed(model)
    router = calibrated.router
    router.certificate = SimpleNamespace(router=router.to_dict(), to_dict=lambda: {"format": "x"})
    for thresholds, expected in ((router.thresholds.tolist(), {"format": "x"}), (0.9, None)):
        router.thresholds = thresholds
        assert json.loads(export._metadata(calibrated, export._settings(calibrated))["certificate"]) == expected
