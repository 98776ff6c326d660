import contextlib
import json
import os
import signal

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from earlyexit_ssd.engine import Hook, read_log
from earlyexit_ssd.engine.loop import AfterStep, Checkpoint, ExponentialMovingAverage, Log
from earlyexit_ssd.errors import CannotWrite, EarlyExitError
from tests.engine.conftest import line_trainer


class Raise(Hook):
    """Raises MemoryError at a step, in place of a kill."""

    def __init__(self, step):
        self.step = step

    def after_step(self, trainer):
        if trainer.step == self.step:
            raise MemoryError


def averaged_trainer(path, *more, **changes):
    trainer = line_trainer(**changes)
    ema = ExponentialMovingAverage(trainer.model, 0.9)
    trainer.hooks = [Checkpoint(path, 4, ema), AfterStep(ema.update), *more]
    return trainer, ema


def test_resumed_run_has_the_weights_of_an_uninterrupted_run(tmp_path):
    whole, whole_ema = averaged_trainer(tmp_path / "whole.pth")
    assert whole.run()
    for kill_at in (1, 4, 7, 10, 19, 29):
        path = tmp_path / f"{kill_at}.pth"
        with contextlib.suppress(MemoryError):
            averaged_trainer(path, Raise(kill_at))[0].run()
        resumed, ema = averaged_trainer(path)
        assert resumed.run()
        for found, expected in ((resumed.model, whole.model), (ema.average, whole_ema.average)):
            for value, other in zip(found.parameters(), expected.parameters(), strict=True):
                assert torch.equal(value, other), kill_at


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_a_checkpoint_and_stops(tmp_path, number):
    class Interrupt(Hook):
        def after_step(self, trainer):
            if trainer.step == 5:
                os.kill(os.getpid(), number)

    path = tmp_path / "last.pth"
    checkpoint = Checkpoint(path, 100)
    before = signal.getsignal(number)
    trainer = line_trainer([checkpoint, Interrupt()])
    assert not trainer.run()
    assert checkpoint.signal_name == number.name
    assert torch.load(path, weights_only=True)["step"] == 5
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("change", [{"step": "x"}, {"model": {}}, {"optimizer": None}, {"ema": {"average": 3}}])
def test_invalid_checkpoint_is_a_one_line_error(tmp_path, change):
    path = tmp_path / "last.pth"
    averaged_trainer(path)[0].run()
    torch.save(torch.load(path, weights_only=True) | change, path)
    with pytest.raises(EarlyExitError, match=r"last\.pth: not the state of this training .*move it away"):
        averaged_trainer(path)[0].run()


def test_log_has_a_line_per_period_and_at_the_end(tmp_path):
    line_trainer([Log(tmp_path, 7)]).run()
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [7, 14, 21, 28, 30]
    assert {"lr", "loss", "loss/square", "epoch", "seconds"} <= entries[0].keys()


@pytest.mark.parametrize("partial_line", ["", '{"step": 18, "lo'])  # of a kill in the middle of a line
def test_resumed_log_has_no_step_twice(tmp_path, partial_line):
    def hooks():
        return [Checkpoint(tmp_path / "last.pth", 10), Log(tmp_path, 3)]

    with contextlib.suppress(MemoryError):
        line_trainer([*hooks(), Raise(17)]).run()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write(partial_line)
    line_trainer(hooks()).run()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [event.step for event in board.Scalars("loss")] == list(range(3, 31, 3))


def test_measurements_at_the_end_of_epochs_are_logged(tmp_path):
    """An epoch has ten steps. Every second epoch and the last epoch are measured."""
    measurements = iter([{"AP50": None, "T": 1.5}, {"AP50": 0.25, "T": 1.25}])
    line_trainer([Log(tmp_path, 20, lambda: next(measurements), measure_period=2)]).run()
    lines = [(line["step"], line.get("AP50"), line.get("T")) for line in read_log(tmp_path)]
    assert lines == [(20, None, 1.5), (30, 0.25, 1.25)]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("T")] == [(20, 1.5), (30, 1.25)]
    assert [(event.step, event.value) for event in board.Scalars("AP50")] == [(30, 0.25)]


@pytest.mark.parametrize("file", ["log.jsonl", "tensorboard/events"])
def test_full_disk_is_a_one_line_error(tmp_path, file, small_files, monkeypatch):
    if file == "tensorboard/events":
        monkeypatch.setattr("earlyexit_ssd.engine.loop.append_text", lambda *_: None)
    message = rf"{file}.*: cannot be written \(File too large\); make room"
    with small_files(150), pytest.raises(CannotWrite, match=message):
        line_trainer([Log(tmp_path, 1)]).run()
