import numpy as np
import pytest

from earlyexit_ssd import ExitRouter
from earlyexit_ssd.config import CLOSED, load_config
from earlyexit_ssd.evaluation.cost import mmacs_to_exit
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
