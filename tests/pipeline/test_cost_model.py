import numpy as np
import pytest

from earlyexit_ssd import ExitRouter
from earlyexit_ssd.config import CLOSED, load_config
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.evaluation.cost import Timing, mmacs_to_exit
from earlyexit_ssd.pipeline import cost_model
from earlyexit_ssd.pipeline.cost_model import CostModel, measure_cost_model
from tests.modeling.conftest import small_model

MODEL = CostModel("mmacs", {"": 10, "1": 22, "0": 20, "11": 45, "10": 42, "01": 43, "00": 40}, 2, 40.0, {})


def test_closed_exits_are_not_paid():
    assert MODEL.per_exit().tolist() == [10, 22, 45]
    assert MODEL.per_exit([CLOSED, 0.5]).tolist() == [10, 20, 43]
    assert MODEL.of_each(np.array([[0.5, 0.5], [CLOSED, CLOSED]])).tolist() == [[10, 22, 45], [10, 20, 40]]


def test_speedup_by_hand():
    assert MODEL.speedup(np.array([0, 1, 2, 0]), [0.5, 0.5]) == pytest.approx(40 / ((10 + 22 + 45 + 10) / 4))


@pytest.mark.parametrize("changes", [{}, {"empty": (8,)}], ids=str)
def test_measured_costs_are_those_of_the_paths(changes):
    model, router = small_model(exit_layers=(8, 12), **changes), ExitRouter(2)
    costs = measure_cost_model(load_config(None, ["CALIBRATION.COST", "mmacs"]), model, router)
    for thresholds in ([0.5, 0.5], [CLOSED, 0.5], [0.5, CLOSED], [CLOSED, CLOSED]):
        expected = mmacs_to_exit(model, ExitRouter(2, thresholds=thresholds))
        opened = [*(index for index in range(2) if thresholds[index] < CLOSED), 2]
        assert [costs.per_exit(thresholds)[index] for index in opened] == pytest.approx(
            [expected[index] for index in opened]
        )
    assert costs.per_exit([CLOSED, CLOSED])[2] == pytest.approx(costs.plain)


@pytest.mark.parametrize(
    ("cost", "installed", "fails", "runtime"),
    [
        ("auto", True, False, "onnxruntime"),
        ("auto", False, False, "eager"),
        ("ms", True, False, "eager"),
        ("auto", True, True, "eager"),
    ],
)
def test_milliseconds_are_those_of_onnx_runtime_where_it_is_installed(
    monkeypatch, caplog, cost, installed, fails, runtime
):
    def timed(networks, examples, runtime, runs, threads):
        if fails and runtime == "onnxruntime":
            raise EarlyExitError("no export to ONNX (such a layer)")
        return [Timing(1.0, 1.0, 1.0, 1, 1)] * len(networks)

    monkeypatch.setattr(cost_model, "time_in_runtime", timed)
    monkeypatch.setattr(cost_model, "runtime_installed", lambda: installed)
    model = small_model(exit_layers=(8,))
    found = measure_cost_model(load_config(None, ["CALIBRATION.COST", cost]), model, ExitRouter(1))
    assert found.measured["runtime"] == runtime and found.unit == "ms"
    assert ("costs are measured in eager instead of ONNX Runtime: no export to ONNX" in caplog.text) is fails
