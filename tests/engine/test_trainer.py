import pytest
import torch

from earlyexit_ssd.engine import Hook, TrainingDiverged
from tests.engine.conftest import LineLoader, line_trainer


def test_learns_the_line():
    trainer = line_trainer(epochs=30)
    assert trainer.run()
    assert trainer.step == 300
    assert trainer.losses["square"] < 0.01


def test_hooks_see_every_step_and_may_stop():
    class StopAtFive(Hook):
        def __init__(self):
            self.steps = []

        def after_step(self, trainer):
            self.steps.append(trainer.step)
            trainer.stop = trainer.step == 5

        def after_training(self, trainer):
            raise AssertionError("the training did not end")

    hook = StopAtFive()
    assert not line_trainer([hook]).run()
    assert hook.steps == [1, 2, 3, 4, 5]


def test_diverged_loss_names_the_photos():
    class Broken(LineLoader):
        def epoch(self, epoch, start):
            yield torch.full((8, 1), float("nan")), torch.zeros(8, 1)

    trainer = line_trainer(loader=Broken(), describe=lambda batch: ["a.jpg", "b.jpg"])
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    with pytest.raises(TrainingDiverged, match=r"step 0: square = nan for the photos a.jpg, b.jpg"):
        trainer.run()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_gradients_are_clipped():
    trainer = line_trainer(clip_gradient=1e-6, optimizer=None)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1.0)
    before = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    trainer.train_step(next(iter(trainer.loader.epoch(0, 0))))
    after = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    assert (after - before).norm() <= 1.01e-6


def test_bf16_trains():
    assert line_trainer(amp="bf16").run()
