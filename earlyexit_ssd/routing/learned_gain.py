"""The learned policy: a small model says what going on would add for this image.

Published relatives predict the difference between a light and a heavy detector from the light one's output (Lin et al.
2023, DynamicDet, section 3.3; Kag et al. 2023, "Efficient edge inference by selective query"); this one predicts the
difference between an exit and the exits behind it, per photo, from a few statistics that cost next to nothing. What the
exit before said adds nothing to them (rank correlation with the loss on calibration photos 0.38 with and without).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling.outputs import ExitSignals
from earlyexit_ssd.routing.policies import FEWER_CANDIDATES, FITTED_POLICIES, Odds, undecided

LEVELS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Probabilities above which default boxes are counted."""

_LEVELS = torch.tensor(LEVELS)  # made once: from a list it takes as long as ten operations

NUM_STATISTICS = len(LEVELS) + 4
HIDDEN = 8


def logit_statistics(logits: Tensor) -> Tensor:
    """How many default boxes are how sure, and how much is undecided: [N, A, C] to [N, `NUM_STATISTICS`].

    With p the largest object probability of a default box: log(1 + x) of the number of p
    above each of `LEVELS`, of the sum of p and of the sum of undecided p; the largest p of any class and of a second.
    """
    odds = Odds(logits)
    by_box_and_class = odds.odds[..., 1:] / odds.total[..., None]
    probability, by_class = by_box_and_class.amax(-1), _two_largest(by_box_and_class.amax(1))
    counts = (probability[..., None] > _LEVELS.to(probability)).sum(1, dtype=probability.dtype)
    sums = torch.stack([probability, undecided(probability)], 1).sum(-1)
    return torch.cat([torch.cat([counts, sums], 1).log1p(), by_class], 1)


def _two_largest(values: Tensor) -> Tensor:
    """[..., C] to [..., 2]; the second is 0 where there is one class."""
    if values.shape[-1] == 1:
        return torch.nn.functional.pad(values, (0, 1))
    return values.topk(2, dim=-1).values


class GainModel(nn.Module):
    """Statistics and pooled tap to the gain of going on, one number per image.

    A perceptron with one hidden layer on the standardised statistics, and a linear term in the tap's channel means.
    """

    def __init__(self, tap_channels: int) -> None:
        super().__init__()
        self.tap_channels = tap_channels
        self.register_buffer("mean", torch.zeros(NUM_STATISTICS + tap_channels))
        self.register_buffer("scale", torch.ones(NUM_STATISTICS + tap_channels))
        self.hidden = nn.Linear(NUM_STATISTICS, HIDDEN)
        self.output = nn.Linear(HIDDEN, 1)
        self.skip = nn.Linear(NUM_STATISTICS, 1, bias=False)
        self.tap = nn.Linear(tap_channels, 1, bias=False)
        for layer in (self.output, self.skip, self.tap):
            nn.init.zeros_(layer.weight)

    def inputs(self, signals: ExitSignals) -> Tensor:
        """[N, NUM_STATISTICS + tap_channels], as `forward` takes them."""
        return torch.cat([logit_statistics(signals.logits), signals.tap[:, : self.tap_channels]], dim=1)

    def forward(self, inputs: Tensor) -> Tensor:
        """`inputs` to gains [N]."""
        inputs = (inputs - self.mean) / self.scale
        statistics, tap = inputs[:, :NUM_STATISTICS], inputs[:, NUM_STATISTICS:]
        return (self.output(torch.tanh(self.hidden(statistics))) + self.skip(statistics) + self.tap(tap)).squeeze(1)

    @torch.no_grad()
    def folded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Minus the gain in a third of the operations: an affine map of `inputs` to the hidden layer before tanh and
        the linear terms, weight [inputs, HIDDEN + 1] and bias [HIDDEN + 1], and what tanh is weighed by, [HIDDEN].
        """
        none = self.tap.weight.new_zeros(HIDDEN, self.tap_channels)
        linear = torch.cat([self.skip.weight, self.tap.weight], 1)
        weight = torch.cat([torch.cat([self.hidden.weight, none], 1), -linear]) / self.scale
        bias = torch.cat([self.hidden.bias, -self.output.bias]) - weight @ self.mean
        return weight.T.contiguous(), bias, -self.output.weight[0]


class LearnedGain(nn.Module):
    """The policy: confidence 1 / (1 + exp(gain)), so that a common threshold means a common gain at every exit.

    Args:
        parameters: per early exit what :func:`to_plain` gave, plain numbers.

    Raises:
        EarlyExitError: something else.
    """

    boxes = FEWER_CANDIDATES
    foresees = True  # it looks at the tap, so an exit without a branch can be judged

    def __init__(self, parameters: Sequence[dict[str, list]]) -> None:
        super().__init__()
        try:
            self.models = nn.ModuleList(_from_plain(one) for one in parameters)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            raise EarlyExitError(
                f"routing policy 'learned_gain': its parameters are {str(parameters)[:60]}, expected the numbers of a "
                "fitted model for every early exit; calibrate again (tools/calibrate.py)"
            ) from None
        self.requires_grad_(False)
        self._fold()
        self.register_load_state_dict_post_hook(_fold_again)

    def _fold(self) -> None:
        for index, model in enumerate(self.models):
            for name, value in zip(("weight", "bias", "output"), model.folded(), strict=True):
                self.register_buffer(f"{name}{index}", value, persistent=False)

    def forward(self, signals: ExitSignals, exit_index: int) -> Tensor:
        """Confidences [N]; 1 at the full path, behind which there is nothing to gain."""
        if exit_index >= len(self.models):
            return torch.ones_like(signals.logits[:, 0, 0])
        model = self.models[exit_index]
        weight, bias, output = (getattr(self, f"{name}{exit_index}") for name in ("weight", "bias", "output"))
        rows = torch.addmm(bias, model.inputs(signals), weight)
        hidden = rows[:, :HIDDEN].tanh()  # no addmv below: it has no export to ONNX
        return torch.addmm(rows[:, HIDDEN:], hidden, output[:, None]).squeeze(1).sigmoid()


def _fold_again(policy: LearnedGain, _: object) -> None:
    """What is derived from the numbers follows them when a state dict brings others."""
    policy._fold()


def to_plain(model: GainModel) -> dict[str, list]:
    """The model's numbers as nested lists, for a model file or JSON."""
    return {name: value.tolist() for name, value in model.state_dict().items()}


def _from_plain(values: dict[str, list]) -> GainModel:
    state = {name: torch.tensor(value) for name, value in values.items()}
    model = GainModel(state["tap.weight"].shape[1])
    model.load_state_dict(state)
    return model


def fit_gain(
    inputs: Tensor, gains: Tensor, steps: int = 600, lr: float = 0.01, weight_decay: float = 1.0, seed: int = 0
) -> GainModel:
    """Least squares (AdamW, full batch) of the gains [n] on the inputs [n, NUM_STATISTICS + tap_channels]."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GainModel(inputs.shape[1] - NUM_STATISTICS)
    model.mean, model.scale = inputs.mean(0), inputs.std(0).clamp(min=1e-3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        ((model(inputs) - gains) ** 2).mean().backward()
        optimizer.step()
        schedule.step()
    return model


FITTED_POLICIES["learned_gain"] = LearnedGain
