import contextlib
import json

import torch

from earlyexit_ssd import ExitRouter
from earlyexit_ssd.engine import Checkpoint, ClampTemperatures, Log
from tests.engine.conftest import line_trainer
from tests.engine.test_checkpoints import Raise


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_log_has_every_period_and_the_end(tmp_path):
    line_trainer([Log(tmp_path, 7)]).run()
    assert [entry["step"] for entry in lines(tmp_path)] == [7, 14, 21, 28, 30]
    assert {"lr", "loss", "square", "epoch", "seconds"} <= lines(tmp_path)[0].keys()
    assert any((tmp_path / "tensorboard").iterdir())


def test_resumed_log_has_no_step_twice(tmp_path):
    with contextlib.suppress(MemoryError):
        line_trainer([Checkpoint(tmp_path / "last.pth", 10), Log(tmp_path, 3), Raise(17)]).run()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 18, "lo')  # a kill in the middle of a line
    line_trainer([Checkpoint(tmp_path / "last.pth", 10), Log(tmp_path, 3)]).run()
    assert [entry["step"] for entry in lines(tmp_path)] == [3, 6, 9, 12, 15, 18, 21, 24, 27, 30]


def test_temperatures_stay_in_their_bounds_after_every_step():
    router = ExitRouter(2, learn_temperatures=True)

    class Watch(ClampTemperatures):
        def after_step(self, trainer):
            with torch.no_grad():
                router.temperatures.add_(10.0)
            super().after_step(trainer)
            assert router.temperatures.tolist() == [3.0, 3.0]

    assert line_trainer([Watch(router)], epochs=1).run()
