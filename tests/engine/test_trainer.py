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

    hook = StopAtFive()
    assert not line_trainer([hook]).run()
    assert hook.steps == [1, 2, 3, 4, 5]


def test_hooks_nest_and_end_whatever_happens():
    calls = []

    class Named(Hook):
        def __init__(self, name):
            self.name = name

        def before_training(self, trainer):
            calls.append(f"{self.name} in")

        def after_step(self, trainer):
            calls.append(f"{self.name} step")
            if self.name == "outer":
                raise MemoryError

        def after_training(self, trainer):
            calls.append(f"{self.name} out")

    with pytest.raises(MemoryError):
        line_trainer([Named("outer"), Named("inner")]).run()
    assert calls == ["outer in", "inner in", "inner step", "outer step", "inner out", "outer out"]


def test_diverged_loss_names_the_photos():
    class Broken(LineLoader):
        def epoch(self, epoch, start):
            yield torch.full((8, 1), float("nan")), torch.zeros(8, 1)

    trainer = line_trainer(loader=Broken(), describe=lambda batch: ["a.jpg", "b.jpg"])
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    with pytest.raises(TrainingDiverged, match=r"step 0: square = nan for the photos a.jpg, b.jpg"):
        trainer.run()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_diverged_gradient_leaves_the_weights_alone():
    """The loss is finite where its gradient is not, as the square root of 0."""
    trainer = line_trainer(describe=lambda batch: ["a.jpg"])
    weight = trainer.model[0].weight
    trainer.compute_losses = lambda batch: {"root": (weight - weight.detach()).abs().sqrt().sum()}
    before = weight.detach().clone()
    with pytest.raises(TrainingDiverged, match="norm of the gradient = nan for the photos a.jpg"):
        trainer.run()
    assert torch.equal(weight, before)


def test_gradients_are_clipped():
    trainer = line_trainer(clip_gradient=1e-6, optimizer=None)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1.0)
    before = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    trainer.train_step(next(iter(trainer.loader.epoch(0, 0))))
    after = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    assert (after - before).norm() <= 1.01e-6


def test_bf16_trains():
    assert line_trainer(amp="bf16").run()


def test_a_group_of_parameters_has_its_share_of_the_rate():
    trainer = line_trainer(optimizer=None)
    weight, bias = trainer.model[0].parameters()
    trainer.optimizer = torch.optim.SGD([{"params": [weight], "lr_factor": 0.25}, {"params": [bias]}], lr=1.0)
    trainer.train_step(next(iter(trainer.loader.epoch(0, 0))))
    slow, normal = trainer.optimizer.param_groups
    assert (slow["lr"], normal["lr"]) == (0.25 * trainer.lr, trainer.lr)
