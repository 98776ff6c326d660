"""The content of a metrics.json with invented figures."""

import pytest


def exit_row(name: str, layer: int, ap50: float, ms: float, **more) -> dict:
    return {
        "name": name,
        "layer": layer,
        "AP": ap50 * 0.6,
        "AP50": ap50,
        "AP50_interval": [ap50 - 0.03, ap50 + 0.03],
        "precision": 0.8,
        "recall": 0.5,
        "f1": 0.615,
        "false_positives_per_image": 0.25,
        "false_positives_per_empty_image": 0.125,
        "localization_error": 0.21,
        "confidence": {"mean": 0.61, "std": 0.2, "min": 0.1, "max": 0.99},
        "mmacs": ms * 10,
        "ms": ms,
        "ms_interval": [ms - 1, ms + 2],
        **more,
    }


@pytest.fixture
def metrics() -> dict:
    routed = exit_row("routed", 0, 0.65, 30.0, exit_share={"exit8": 0.5, "exit12": 0.25, "full": 0.25})
    for key in ("name", "layer", "confidence", "ms_interval"):
        del routed[key]
    settings = {"score": 0.5, "iou": 0.5, "device": "cpu", "threads": 1}
    return {
        "context": {"splits": ["toy_test"], "images": 614, "empty_images": 0, **settings},
        "exits": [
            exit_row("exit8", 8, 0.55, 22.0, false_positives_per_empty_image=None),
            exit_row("exit12", 12, 0.66, 35.0),
            exit_row("full", 16, 0.72, 48.0),
        ],
        "without_exits": {"mmacs": 405.3, "ms": 43.0, "ms_interval": [42.0, 44.0]},
        "routed": {**routed, "policy": "max_foreground", "thresholds": [0.6, 0.6], "speedup": 1.43},
        "verdict": {
            "ship": True,
            "what": "routed",
            "findings": [{"line": "exit8: AP50 0.550 is above 0.35: accurate enough", "veto": False}],
        },
    }


@pytest.fixture
def with_rivals(metrics) -> dict:
    """The metrics with two rivals: a smaller plain detector, and an ONNX file in another runtime with unknown MMACs."""
    small = exit_row("plain 256", 16, 0.64, 33.0, kind="plain", source=None, runtime="eager")
    foreign = exit_row("yolox_nano", 16, 0.71, 15.0, kind="onnx", source="nano.onnx", runtime="onnxruntime")
    for row in (small, foreign):
        del row["layer"], row["confidence"]
    return {**metrics, "rivals": [small, {**foreign, "mmacs": None}]}
