import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from earlyexit_ssd.data import DetectionDataset, Record, build_loader
from earlyexit_ssd.engine import Hook
from earlyexit_ssd.engine.loop import (
    ExponentialMovingAverage,
    PhotoLoader,
    TrainingDiverged,
    build_optimizer,
    learning_rate,
)
from tests.engine.conftest import LineLoader, line_trainer


def test_learning_rate_by_hand():
    # 100 steps, 10 of them warm-up, peak 1.
    rates = [learning_rate(step, 100, 1.0, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5)
    assert rates[99] < 0.001
    assert max(rates) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_norms_and_biases_do_not_decay_and_factors_apply_to_prefixes(name):
    model = nn.ModuleDict({"backbone": nn.Conv2d(3, 4, 1), "branches": nn.Conv2d(3, 4, 1), "norm": nn.BatchNorm2d(4)})
    model["branches"].bias.requires_grad_(False)
    groups = build_optimizer(model, name, 0.1, 0.5, {"backbone.": 0.25}).param_groups
    settings = [(group["lr"], group["lr_factor"], group["weight_decay"], len(group["params"])) for group in groups]
    assert settings == [(0.1, 1.0, 0.5, 1), (0.1, 1.0, 0.0, 2), (0.025, 0.25, 0.5, 1), (0.025, 0.25, 0.0, 1)]
    assert groups[2]["params"][0] is model["backbone"].weight


def ids(batches):
    return [[target["image_id"] for target in targets] for _, targets in batches]


def test_batches_depend_on_epoch_and_start_only(tmp_path):
    records = []
    for index in range(11):
        path = tmp_path / f"{index}.png"
        Image.fromarray(np.full((8, 8, 3), index, np.uint8)).save(path)
        records.append(Record(index + 1, path, 8, 8))
    dataset = DetectionDataset(records, ("chair",), train=True)
    loader = PhotoLoader(build_loader(dataset, 3, 0, True, seed=0), torch.device("cpu"))
    assert len(loader) == 3
    first, second = ids(loader.epoch(0, 0)), ids(loader.epoch(1, 0))
    assert [len(batch) for batch in first] == [3, 3, 3]
    assert first != second
    # resumed within an epoch; the next epoch is complete
    assert ids(loader.epoch(0, 2)) == first[2:]
    assert ids(loader.epoch(1, 0)) == second
    assert len(loader) == 3


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


def test_average_copies_counters_and_its_state_is_restored():
    model = nn.BatchNorm1d(2)
    ema = ExponentialMovingAverage(model, 0.9)
    model(torch.randn(4, 2))
    ema.update(model)
    assert ema.average.num_batches_tracked == 1
    again = ExponentialMovingAverage(model, 0.9)
    again.load_state_dict(ema.state_dict())
    assert again.updates == 1
    assert torch.equal(again.average.running_mean, ema.average.running_mean)


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_trainer_fits_a_line(amp):
    trainer = line_trainer(epochs=30, amp=amp)
    assert trainer.run()
    assert trainer.step == 300
    assert trainer.losses["square"] < (0.01 if amp == "off" else 0.02)


def test_hooks_run_after_every_step_and_can_stop():
    steps = []

    class StopAtFive(Hook):
        def after_step(self, trainer):
            steps.append(trainer.step)
            trainer.stop = trainer.step == 5

    assert not line_trainer([StopAtFive()]).run()
    assert steps == [1, 2, 3, 4, 5]


def test_hooks_nest_and_end_after_an_error():
    calls = []

    class Named(Hook):
        def __init__(self, name):
            self.name = name

        def before_training(self, trainer):
            calls.append(f"{self.name} in")
            if self.name == "broken":
                raise MemoryError

        def after_step(self, trainer):
            calls.append(f"{self.name} step")
            if self.name == "outer":
                raise MemoryError

        def after_training(self, trainer):
            calls.append(f"{self.name} out")

    with pytest.raises(MemoryError):
        line_trainer([Named("outer"), Named("inner")]).run()
    assert calls == ["outer in", "inner in", "inner step", "outer step", "inner out", "outer out"]
    calls.clear()
    with pytest.raises(MemoryError):
        line_trainer([Named("inner"), Named("broken")]).run()
    assert calls == ["inner in", "broken in", "inner out"]


def test_diverged_loss_names_the_photos():
    class Broken(LineLoader):
        def epoch(self, epoch, start):
            yield torch.full((8, 1), float("nan")), torch.zeros(8, 1)

    trainer = line_trainer(loader=Broken(), describe=lambda batch: ["a.jpg", "b.jpg"])
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    with pytest.raises(TrainingDiverged, match=r"step 0: square = nan for the photos a.jpg, b.jpg"):
        trainer.run()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_diverged_gradient_does_not_change_the_weights():
    """The loss is finite but its gradient is not, as for the square root at 0."""
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
    before = nn.utils.parameters_to_vector(trainer.model.parameters()).detach().clone()
    trainer.train_step(next(iter(trainer.loader.epoch(0, 0))))
    assert (nn.utils.parameters_to_vector(trainer.model.parameters()) - before).norm() <= 1.01e-6


def test_lr_factor_scales_the_rate_of_a_group():
    trainer = line_trainer(optimizer=None)
    weight, bias = trainer.model[0].parameters()
    trainer.optimizer = torch.optim.SGD([{"params": [weight], "lr_factor": 0.25}, {"params": [bias]}], lr=1.0)
    trainer.train_step(next(iter(trainer.loader.epoch(0, 0))))
    slow, normal = trainer.optimizer.param_groups
    rate = learning_rate(0, trainer.total_steps, trainer.peak_lr, trainer.warmup)
    assert (slow["lr"], normal["lr"]) == (0.25 * rate, rate)
