import pytest
from torch import nn

from earlyexit_ssd.engine import build_optimizer, learning_rate


def test_schedule_by_hand():
    # 100 steps, 10 of them warm-up, peak 1.
    rates = [learning_rate(step, 100, 1.0, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5)
    assert rates[99] < 0.001
    assert max(rates) == pytest.approx(1.0)


def test_norms_and_biases_do_not_decay():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model[0].bias.requires_grad_(False)
    groups = build_optimizer(model, "sgd", 0.1, 0.5).param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.5, 1), (0.0, 2)]


def test_rate_factors_go_by_the_beginning_of_a_name():
    model = nn.ModuleDict({"backbone": nn.Conv2d(3, 4, 1), "branches": nn.Conv2d(3, 4, 1)})
    groups = build_optimizer(model, "adamw", 0.1, 0.5, {"backbone.": 0.25}).param_groups
    found = {(group["lr"], group["lr_factor"], group["weight_decay"]) for group in groups}
    assert found == {(0.1, 1.0, 0.5), (0.1, 1.0, 0.0), (0.025, 0.25, 0.5), (0.025, 0.25, 0.0)}
    (slow,) = [group for group in groups if group["lr_factor"] == 0.25 and group["weight_decay"]]
    assert slow["params"][0] is model["backbone"].weight
