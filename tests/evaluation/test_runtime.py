"""Networks in ONNX Runtime give what they give in eager PyTorch."""

import copy
import importlib
import warnings

import onnx
import pytest
import torch
from torch import nn

from earlyexit_ssd.config import load_config
from earlyexit_ssd.errors import ConfigError, EarlyExitError
from earlyexit_ssd.evaluation import runtime
from earlyexit_ssd.evaluation.cost import example_input, time_modules
from earlyexit_ssd.evaluation.runtime import OnnxNetwork, deploy_package, export_onnx, in_runtime
from earlyexit_ssd.modeling.outputs import ExitSignals
from earlyexit_ssd.modeling.paths import AllOutputs, PathToExit
from earlyexit_ssd.routing import ExitRouter
from earlyexit_ssd.routing.learned_gain import GainModel, to_plain
from earlyexit_ssd.routing.policies import FITTED_POLICIES, POLICIES


def test_a_path_keeps_its_outputs_and_its_mode(small_model, capfd):
    """Heads of earlier branches and the router's scores are computed too: they are outputs, so nothing drops them."""
    model = copy.deepcopy(small_model).train()
    path, example = AllOutputs(PathToExit(model, 1, ExitRouter(2, thresholds=0.6))), example_input(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network = in_runtime(path, example, "onnxruntime")
    assert model.training
    assert capfd.readouterr() == ("", "")
    assert network.input_shape == (1, 3, 96, 96)
    with torch.no_grad():
        expected, found = path.eval()(example), network(example)
    assert len(found) == 6
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4)
    assert time_modules([network], example, runs=1)[0].ms > 0


class Scoring(nn.Module):
    """What a router says of logits."""

    def __init__(self, router):
        super().__init__()
        self.router = router

    def forward(self, logits):
        return self.router.confidence(ExitSignals(logits, logits.flip(1), logits[:, :4, 0]), 1)


@pytest.mark.parametrize("policy", [*sorted(POLICIES), *sorted(FITTED_POLICIES)])
def test_every_policy_can_be_exported(policy):
    fitted = {
        "learned_gain": [to_plain(GainModel(2))] * 2,
        "foreseen_emptiness": [{"weight": [0.1] * 5, "bias": 0.0}] * 2,
        "balanced_ambiguity": [0.5, 1.5],
    }
    router = ExitRouter(2, policy=policy, thresholds=0.5, parameters=fitted.get(policy))
    logits = torch.randn(1, 700, 3, generator=torch.Generator().manual_seed(0)) - torch.tensor([-4.0, 0.0, 0.0])
    scoring = Scoring(router)
    (found,) = in_runtime(scoring, logits, "onnxruntime")(logits)
    assert found.tolist() == pytest.approx(scoring(logits).tolist(), abs=1e-5)


def test_eager_is_the_module_itself():
    module = nn.Linear(2, 2)
    assert in_runtime(module, torch.zeros(1, 2), "eager") is module


def test_runtimes_are_those_of_the_configuration():
    for name in runtime.RUNTIME_TITLES:
        load_config(None, ["EVAL.RUNTIME", name])
    with pytest.raises(ConfigError):
        load_config(None, ["EVAL.RUNTIME", "tensorrt"])


def test_a_missing_package_is_one_line(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named '{name}'")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(EarlyExitError, match=r"package onnx .*: pip install onnx onnxruntime"):
        deploy_package("onnx")


def test_what_cannot_be_run_is_one_line():
    with pytest.raises(EarlyExitError, match=r"x\.onnx: ONNX Runtime cannot load it") as caught:
        OnnxNetwork(b"no graph", name="x.onnx")
    assert "\n" not in str(caught.value)


def one_node(element, shape):
    """A file that keeps what is above zero of an input of this element type and shape."""
    sides, result = (onnx.helper.make_tensor_value_info(name, element, shape) for name in ("x", "y"))
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [sides], [result])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    return model.SerializeToString()


def test_an_input_of_any_size_is_refused():
    with pytest.raises(EarlyExitError, match=r"expected one input of a fixed size, got x \['batch', 3, 'height'"):
        OnnxNetwork(one_node(onnx.TensorProto.FLOAT, ["batch", 3, "height", "width"]))


def test_an_input_of_another_type_is_refused():
    assert OnnxNetwork(one_node(onnx.TensorProto.FLOAT, [1, 3, 8, 8])).input_shape == (1, 3, 8, 8)
    with pytest.raises(EarlyExitError, match=r"half: its input is tensor\(float16\), expected tensor\(float\)"):
        OnnxNetwork(one_node(onnx.TensorProto.FLOAT16, [1, 3, 8, 8]), name="half")


def test_what_cannot_be_exported_is_one_line():
    class Strange(nn.Module):
        def forward(self, x):
            return torch.linalg.eigvals(x)

    with pytest.raises(EarlyExitError, match="no export to ONNX .*EVAL.RUNTIME to eager") as caught:
        export_onnx(Strange(), torch.ones(2, 2))
    assert "\n" not in str(caught.value)
