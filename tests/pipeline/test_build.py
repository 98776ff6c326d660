import pytest

from earlyexit_ssd.config import load_config
from earlyexit_ssd.errors import ConfigError
from earlyexit_ssd.pipeline import build
from earlyexit_ssd.pipeline.build import build_device, build_router, evaluation_device


def test_thresholds_of_another_model_are_refused():
    """A configuration of two exits with the weights of three."""
    cfg = load_config(None, ["ROUTING.THRESHOLDS", "[0.4, 0.5]"])
    assert build_router(cfg, {"num_exits": 2}).thresholds.tolist() == pytest.approx([0.4, 0.5])
    with pytest.raises(ConfigError, match=r"ROUTING.THRESHOLDS has 2 numbers, the model has 3 early exits: give one"):
        build_router(cfg, {"num_exits": 3})


def test_where_the_runtime_measures_the_cpu_auto_is_the_cpu(monkeypatch):
    asked = []
    monkeypatch.setattr(build, "_device", lambda cfg, name: asked.append(name))
    for keys in ([], ["EVAL.RUNTIME", "onnxruntime"], ["EVAL.RUNTIME", "onnxruntime", "DEVICE", "cuda"]):
        cfg = load_config(None, keys)
        evaluation_device(cfg)
        assert cfg.DEVICE in ("auto", "cuda")  # the caller's is left alone
    assert asked == ["auto", "cpu", "cuda"]


def test_mixed_precision_is_of_training_alone():
    cfg = load_config(None, ["ENGINE.AMP", "fp16", "DEVICE", "cpu"])
    assert evaluation_device(cfg).type == "cpu"
    with pytest.raises(ConfigError, match="ENGINE.AMP 'fp16' needs CUDA, DEVICE is cpu; use bf16 or off"):
        build_device(cfg)
