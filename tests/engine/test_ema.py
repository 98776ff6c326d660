import torch
from torch import nn

from earlyexit_ssd.engine import ExponentialMovingAverage


def test_average_by_hand():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 0.0)
    ema = ExponentialMovingAverage(model, 0.5)
    nn.init.constant_(model.weight, 11.0)
    ema.update(model)  # decay 2 / 11
    assert ema.average.weight.item() == 9.0
    for _ in range(20):
        ema.update(model)
    assert abs(ema.average.weight.item() - 11.0) < 1e-4


def test_counters_are_copied_and_the_state_comes_back():
    model = nn.BatchNorm1d(2)
    ema = ExponentialMovingAverage(model, 0.9)
    model(torch.randn(4, 2))
    ema.update(model)
    assert ema.average.num_batches_tracked == 1
    again = ExponentialMovingAverage(model, 0.9)
    again.load_state_dict(ema.state_dict())
    assert again.updates == 1
    assert torch.equal(again.average.running_mean, ema.average.running_mean)
