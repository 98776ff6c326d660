import pytest

from earlyexit_ssd.config import load_config
from earlyexit_ssd.errors import ConfigError
from earlyexit_ssd.pipeline import build
from earlyexit_ssd.pipeline.build import build_router, evaluation_device


def test_thresholds_of_another_model_are_refused():
    """A configuration of two exits with the weights of three."""
    cfg = load_config(None, ["ROUTING.THRESHOLDS", "[0.4, 0.5]"])
    assert build_router(cfg, {"num_exits": 2}).thresholds.tolist() == pytest.approx([0.4, 0.5])
    with pytest.raises(ConfigError, match=r"ROUTING.THRESHOLDS has 2 numbers, the model has 3 early exits: give one"):
        build_router(cfg, {"num_exits": 3})


def test_where_the_runtime_measures_the_cpu_auto_is_the_cpu(monkeypatch):
    asked = []
    monkeypatch.setattr(build, "build_device", lambda cfg: asked.append(cfg.DEVICE))
    for keys in ([], ["EVAL.RUNTIME", "onnxruntime"], ["EVAL.RUNTIME", "onnxruntime", "DEVICE", "cuda"]):
        cfg = load_config(None, keys)
        evaluation_device(cfg)
        assert cfg.DEVICE in ("auto", "cuda")  # the caller's is left alone
    assert asked == ["auto", "cpu", "cuda"]
