"""Preprocessing and postprocessing of the graph, compared with torchvision's."""

import itertools

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper

from earlyexit_ssd.deploy import graph
from earlyexit_ssd.deploy.graph import Scope, Settings, expand_log_sum_exp, last_stage, preprocess
from earlyexit_ssd.modeling.detector import default_boxes_of_image
from earlyexit_ssd.runtimes import OnnxRuntime, OpenVino
from tests.deploy.conftest import build_model

MEAN, STD = (0.5, 0.25, 0.4), (0.5, 0.2, 1.0)


def settings(**changes) -> Settings:
    values = {
        "size": (24, 32),
        "mean": MEAN,
        "std": STD,
        "anchors": np.zeros((1, 4), np.float32),
        "box_weights": (10.0, 10.0, 5.0, 5.0),
        "thresholds": np.zeros(0, np.float32),
        "score_thresh": np.zeros(1, np.float32),
        "nms_thresh": 0.5,
        "topk_candidates": 300,
        "detections_per_img": 300,
    }
    return Settings(**{**values, **changes})


@pytest.mark.parametrize(("openvino", "many_rows"), [(True, 1), (False, 0), (False, 1000)])
@pytest.mark.parametrize("size", [(1, 1), (7, 200), (24, 32), (61, 53)])
def test_photos_are_resized_as_torchvision_does(monkeypatch, size, openvino, many_rows):
    monkeypatch.setattr(graph, "MANY_ROWS", many_rows)
    scope = Scope(itertools.count())
    photo_size = scope("Slice", scope("Shape", "image"), scope.constant([0], np.int64), scope.constant([2], np.int64))
    x = preprocess(scope, photo_size, settings(openvino=openvino))
    photo = helper.make_tensor_value_info("image", TensorProto.UINT8, ["h", "w", 3])
    model = helper.make_model(
        scope.graph("test", [(x, TensorProto.FLOAT, [1, 3, 24, 32])], [photo]),
        opset_imports=[helper.make_opsetid("", graph.OPSET)],
        ir_version=graph.IR_VERSION,
    )
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    (found,) = OnnxRuntime(model.SerializeToString(), "test")({"image": image}).values()
    pixels = torch.from_numpy(image).permute(2, 0, 1) / 255
    pixels = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    expected = F.interpolate(pixels[None], (24, 32), mode="bilinear", align_corners=False)
    assert np.allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize(
    ("score_thresh", "topk_candidates", "detections_per_img"),
    [(0.2, 300, 300), (0.001, 10, 300), (0.001, 300, 7), (0.001, 5, 3), ({"cat": 0.4}, 20, 9), (1.0, 300, 300)],
)
def test_detections_are_torchvision_s(score_thresh, topk_candidates, detections_per_img):
    model = build_model(topk_candidates=topk_candidates, detections_per_img=detections_per_img)
    model.score_thresh = score_thresh
    anchors = default_boxes_of_image(model, torch.device("cpu"))
    head = {
        "cls_logits": 2 * torch.randn(1, len(anchors), 3, generator=torch.Generator().manual_seed(1)),
        "bbox_regression": 4 * torch.randn(1, len(anchors), 4, generator=torch.Generator().manual_seed(2)),
    }
    head["cls_logits"][0, 0] = torch.tensor([-200.0, 200.0, -200.0])  # a score of 1, which is not above 1
    (expected,) = model.postprocess_detections(head, [anchors], [(96, 96)])
    (expected,) = model.transform.postprocess([expected], [(96, 96)], [(50, 200)])
    thresholds = [0.4, 0.001] if isinstance(score_thresh, dict) else [score_thresh] * 2
    values = {"score_thresh": np.array(thresholds, np.float32), "nms_thresh": model.nms_thresh}
    values |= {"topk_candidates": topk_candidates, "detections_per_img": detections_per_img}
    stage = last_stage(settings(size=(96, 96), anchors=anchors.numpy(), **values))
    feeds = {name: value.numpy() for name, value in head.items()} | {"photo_size": np.array([50, 200])}
    found = OnnxRuntime(stage.SerializeToString(), "test")(feeds)
    assert found["labels"].tolist() == expected["labels"].tolist()
    assert np.allclose(found["boxes"], expected["boxes"], atol=1e-3)
    assert np.allclose(found["scores"], expected["scores"], atol=1e-6)
    assert len(found["boxes"]) == 0 if score_thresh == 1.0 else 0 < len(found["boxes"]) <= detections_per_img


def test_nms_at_0_keeps_apart_boxes_in_openvino(tmp_path):
    pytest.importorskip("openvino")
    anchors = np.array([[0, 0, 8, 8], [4, 0, 12, 8], [16, 0, 24, 8]], np.float32)
    stage = last_stage(settings(size=(24, 24), anchors=anchors, nms_thresh=0.0, openvino=True))
    (tmp_path / "stage.onnx").write_bytes(stage.SerializeToString())
    logits = np.array([[[0, 5], [0, 4], [0, 3]]], np.float32)
    feeds = {"cls_logits": logits, "bbox_regression": np.zeros((1, 3, 4), np.float32)}
    feeds |= {"photo_size": np.array([24, 24]), "score_thresh": np.array([0.1], np.float32)}
    found = OpenVino(tmp_path / "stage.onnx")(feeds)
    assert found["boxes"].tolist() == [[0, 0, 8, 8], [16, 0, 24, 8]]


@pytest.mark.parametrize("keep", [0, 1])
def test_an_expanded_log_sum_exp_gives_the_same_values(keep):
    values = np.random.default_rng(0).normal(0, 50, (1, 4, 5)).astype(np.float32)
    node = helper.make_node("ReduceLogSumExp", ["x"], ["y"], axes=[-1], keepdims=keep)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 5])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 1] if keep else [1, 4])
    model = helper.make_model(
        helper.make_graph([node], "test", [x], [y]), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    expand_log_sum_exp(model)
    onnx.checker.check_model(model, full_check=True)
    assert "ReduceLogSumExp" not in {node.op_type for node in model.graph.node}
    found = OnnxRuntime(model.SerializeToString(), "test")({"x": values})["y"]
    assert np.allclose(found, torch.from_numpy(values).logsumexp(-1, keepdim=bool(keep)), atol=1e-5)
