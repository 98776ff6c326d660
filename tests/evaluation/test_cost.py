"""Exported networks, MMACs, and order and statistics of timing."""

import copy
import warnings

import onnx
import pytest
import torch
from torch import nn

from earlyexit_ssd.config import CLOSED, load_config
from earlyexit_ssd.errors import ConfigError, EarlyExitError
from earlyexit_ssd.evaluation import cost
from earlyexit_ssd.evaluation.cost import (
    RUNTIME_TITLES,
    OnnxNetwork,
    PlainPath,
    count_mmacs,
    example_input,
    export_onnx,
    in_runtime,
    median_interval,
    mmacs_to_exit,
    time_modules,
)
from earlyexit_ssd.modeling import Architecture, Exit
from earlyexit_ssd.modeling.detector import AllOutputs, PathToExit
from earlyexit_ssd.modeling.outputs import ExitSignals
from earlyexit_ssd.routing import ExitRouter
from earlyexit_ssd.routing.policies import POLICIES, GainModel
from tests.tools.conftest import QuickCounter


def test_an_exported_path_keeps_its_outputs_and_its_mode(small_model, capfd):
    """Heads of earlier branches and confidences are outputs, otherwise the export would drop them."""
    model = copy.deepcopy(small_model).train()
    path, example = AllOutputs(model, 1, ExitRouter(2, thresholds=0.6)), example_input(model)
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
        assert torch.allclose(mine, theirs, atol=1e-4 * max(1.0, theirs.abs().max().item()))  # rounding in fp32
    assert time_modules([network], example, runs=1)[0].ms > 0


def test_a_path_to_an_empty_exit_computes_its_tap():
    """The head of an empty exit does not need the tap. Without the tap, the network would have no input and no cost."""
    exits = (Exit(8, "empty", pixels=64), Exit(8, "empty"))
    model = Architecture(classes=("cup",), width=0.25, image_size=96, exits=exits).build().eval()
    router = ExitRouter(2)  # both exits are closed
    glance, shallow, full = mmacs_to_exit(model, router)
    assert glance == pytest.approx(shallow * (64 / 96) ** 2, rel=0.05) and shallow < full
    for index in range(2):
        network = in_runtime(AllOutputs(model, index, router), example_input(model), "onnxruntime")
        assert network.input_shape == (1, 3, 96, 96)


class Scoring(nn.Module):
    """The router's confidence as a network of the logits."""

    def __init__(self, router):
        super().__init__()
        self.router = router

    def forward(self, logits):
        return self.router.confidence(ExitSignals(logits, logits[:, :4, 0]), 1)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_can_be_exported(policy):
    fitted = {
        "learned_gain": [GainModel(2).to_plain()] * 2,
        "foreseen_emptiness": [{"weight": [0.1] * 5, "bias": 0.0}] * 2,
        "balanced_ambiguity": [0.5, 1.5],
    }
    router = ExitRouter(2, policy=policy, thresholds=0.5, parameters=fitted.get(policy))
    logits = torch.randn(1, 700, 3, generator=torch.Generator().manual_seed(0)) - torch.tensor([-4.0, 0.0, 0.0])
    scoring = Scoring(router)
    (found,) = in_runtime(scoring, logits, "onnxruntime")(logits)
    assert found.tolist() == pytest.approx(scoring(logits).tolist(), abs=1e-5)


def test_the_configuration_accepts_every_runtime():
    for name in RUNTIME_TITLES:
        load_config(None, ["EVAL.RUNTIME", name])
    with pytest.raises(ConfigError):
        load_config(None, ["EVAL.RUNTIME", "tensorrt"])


def one_node(element, shape):
    """Return an ONNX file of one ReLU for inputs of this element type and shape."""
    x, y = (onnx.helper.make_tensor_value_info(name, element, shape) for name in ("x", "y"))
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    return model.SerializeToString()


def test_inputs_of_dynamic_size_or_another_type_are_refused():
    network = OnnxNetwork(one_node(onnx.TensorProto.FLOAT, [1, 3, 8, 8]), threads=3)
    options = network._run.session.get_session_options()  # idle threads must not slow the next network
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert (options.intra_op_num_threads, network.input_shape) == (3, (1, 3, 8, 8))
    with pytest.raises(EarlyExitError, match=r"expected one input of a fixed size, got x \['batch', 3, 'height'"):
        OnnxNetwork(one_node(onnx.TensorProto.FLOAT, ["batch", 3, "height", "width"]))
    with pytest.raises(EarlyExitError, match=r"half: its input is tensor\(float16\), expected tensor\(float\)"):
        OnnxNetwork(one_node(onnx.TensorProto.FLOAT16, [1, 3, 8, 8]), name="half")


def test_a_failed_export_is_reported_in_one_line():
    class Strange(nn.Module):
        def forward(self, x):
            return torch.linalg.eigvals(x)

    with pytest.raises(EarlyExitError, match="export to ONNX failed .*EVAL.RUNTIME to eager") as caught:
        export_onnx(Strange(), torch.ones(2, 2))
    assert "\n" not in str(caught.value)


# Multiply-accumulates and timing.


def test_only_convolutions_and_linear_layers_are_counted():
    module = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5))
    # 2 x 2 outputs x 8 channels x 3 x 3 x 3, and 32 x 5
    assert count_mmacs(module, torch.zeros(1, 3, 4, 4)) * 1e6 == pytest.approx(4 * 8 * 27 + 160)
    assert module.training and not module[1].num_batches_tracked  # counted in eval mode


def test_the_counter_of_other_tests_has_the_same_counts(small_model, monkeypatch):
    linear = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3, bias=False))

    def counts():
        return [*mmacs_to_exit(small_model), count_mmacs(linear, torch.zeros(2, 7))]

    expected = counts()
    monkeypatch.setattr(cost, "FlopCounterMode", QuickCounter)
    assert counts() == expected


def test_plain_path_is_the_full_path_without_branches(small_model):
    example, plain = example_input(small_model), PlainPath(small_model)
    small_model.eval()
    with torch.no_grad():
        logits, boxes = PathToExit(small_model, 2)(example)
        head = plain(example)
    assert torch.equal(head["cls_logits"], logits)
    assert torch.equal(head["bbox_regression"], boxes)
    assert count_mmacs(plain, example) < mmacs_to_exit(small_model)[-1]


def test_timed_modules_take_turns_and_threads_are_restored():
    calls = []

    class Recorder(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            calls.append((self.name + str(len(x)), (torch.get_num_threads(), self.training, torch.is_grad_enabled())))

    before = torch.get_num_threads()
    modules = [Recorder("a"), Recorder("b")]
    time_modules(modules, [torch.zeros(1), torch.zeros(2)], runs=2, threads=2)
    names, states = zip(*calls, strict=True)
    assert names == ("a1", "a1", "b2", "b2") * 2  # an untimed run before each timed run
    assert set(states) == {(2, False, False)}
    assert torch.get_num_threads() == before
    assert modules[0].training


def test_threads_are_restored_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError):
        time_modules([nn.Linear(2, 2)], torch.zeros(3), runs=1, threads=before + 1)
    assert torch.get_num_threads() == before


def test_a_path_computes_the_confidence_of_every_open_exit(small_model):
    class Recorder:
        hybrid = False

        def __init__(self, closed):
            self.exits, self.closed = [], closed

        def needs(self, exit_index):
            return exit_index != self.closed

        def confidence(self, signals, exit_index):
            self.exits.append(exit_index)

    for closed, index, expected in ((None, 0, [0]), (None, 1, [0, 1]), (None, 2, [0, 1]), (0, 2, [1]), (0, 1, [1])):
        router = Recorder(closed)
        PathToExit(small_model.eval(), index, router)(example_input(small_model))
        assert router.exits == expected


def test_median_interval_uses_order_statistics():
    # tables of the sign test: the 10th and 21st of 30 values, the smallest and largest of 6
    assert median_interval(range(1, 31)) == (15.5, [10, 21])
    assert median_interval(range(1, 7)) == (3.5, [1, 6])
    assert median_interval([5.0]) == (5.0, [5.0, 5.0])


def test_closed_exits_cost_no_head(small_model):
    """A closed exit 8 costs no head. The features that exit 12 takes from it are still computed."""
    everything = mmacs_to_exit(small_model, ExitRouter(2, thresholds=0.5))
    first_closed = mmacs_to_exit(small_model, ExitRouter(2, thresholds=[CLOSED, 0.5]))
    all_closed = mmacs_to_exit(small_model, ExitRouter(2, thresholds=CLOSED))
    assert everything == mmacs_to_exit(small_model)
    assert first_closed[0] == everything[0]  # its own cost does not depend on its threshold
    assert everything[1] > first_closed[1] and everything[2] > first_closed[2]
    assert all_closed[2] == pytest.approx(count_mmacs(PlainPath(small_model), example_input(small_model)))
