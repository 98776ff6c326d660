import contextlib
import os
import signal

import pytest
import torch

from earlyexit_ssd.engine import Checkpoint, ExponentialMovingAverage, Hook, UpdateAverage
from earlyexit_ssd.errors import EarlyExitError
from tests.engine.conftest import line_trainer


class Raise(Hook):
    """Stands for a kill at a given step."""

    def __init__(self, step):
        self.step = step

    def after_step(self, trainer):
        if trainer.step == self.step:
            raise MemoryError


def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def averaged_trainer(path, *more, **changes):
    trainer = line_trainer(**changes)
    ema = ExponentialMovingAverage(trainer.model, 0.9)
    trainer.hooks = [Checkpoint(path, 4, ema), UpdateAverage(ema), *more]
    return trainer, ema


def test_resumed_run_reaches_the_same_weights(tmp_path):
    whole, whole_ema = averaged_trainer(tmp_path / "whole.pth")
    assert whole.run()
    for kill_at in (1, 4, 7, 10, 19, 29):
        path = tmp_path / f"{kill_at}.pth"
        with contextlib.suppress(MemoryError):
            averaged_trainer(path, Raise(kill_at))[0].run()
        resumed, ema = averaged_trainer(path)
        assert resumed.run()
        assert torch.equal(weights(resumed), weights(whole)), kill_at
        for one, other in zip(ema.average.parameters(), whole_ema.average.parameters(), strict=True):
            assert torch.equal(one, other)


def test_signal_saves_and_stops(tmp_path):
    class Interrupt(Hook):
        def after_step(self, trainer):
            if trainer.step == 5:
                os.kill(os.getpid(), signal.SIGTERM)

    path = tmp_path / "last.pth"
    checkpoint = Checkpoint(path, 100)
    before = signal.getsignal(signal.SIGTERM)
    trainer = line_trainer([checkpoint, Interrupt()])
    assert not trainer.run()
    assert checkpoint.signal_name == "SIGTERM"
    assert torch.load(path, weights_only=True)["step"] == 5
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("change", [{"step": "x"}, {"model": {}}, {"optimizer": None}, {"ema": {"average": 3}}])
def test_a_state_of_something_else_is_one_line(tmp_path, change):
    path = tmp_path / "last.pth"
    averaged_trainer(path)[0].run()
    torch.save(torch.load(path, weights_only=True) | change, path)
    with pytest.raises(EarlyExitError, match=r"last\.pth: not the state of this training .*move it away"):
        averaged_trainer(path)[0].run()


def test_no_half_file_is_left(tmp_path):
    line_trainer([Checkpoint(tmp_path / "last.pth", 1)]).run()
    assert [path.name for path in tmp_path.iterdir()] == ["last.pth"]
