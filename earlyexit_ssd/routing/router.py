"""Decide at each exit which images leave."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.keywords import suggest_keywords
from earlyexit_ssd.modeling.losses import mean_over_processes
from earlyexit_ssd.modeling.outputs import ExitSignals
from earlyexit_ssd.routing import balanced_ambiguity, foreseen, learned_gain  # noqa: F401  (they register their policies)
from earlyexit_ssd.routing.policies import get_policy, looked_at


class ExitRouter(nn.Module):
    """An image leaves at the first exit whose confidence reaches that exit's threshold; the full path takes the rest.

    Args:
        num_exits: early exits, the full path not counted.
        policy: name of a confidence rule, see :mod:`earlyexit_ssd.routing.policies`.
        parameters: of a policy that is fitted, such as ``learned_gain``; None for the others.
        thresholds: one per exit, or one for all, in [0, 1], or `CLOSED`: nobody leaves there.
        temperatures: one per exit, or one for all; logits are divided by them before the policy sees them. The full
            path keeps its own scores (temperature 1).
        hybrid: nobody leaves: a photo takes its classes from the first exit that is sure and its boxes from the full
            path, whose classification head is then spared.
        temperature_bounds: (low, high); temperatures are held inside after every training step.
        learn_temperatures: fit the temperatures by likelihood (Guo et al. 2017) while the exits train. The logits
            take no gradient from it, so that the detector cannot be bent by its own confidence.

    Attributes:
        certificate: the `Certificate` that it was made from, if any: what is promised, and the photos that calibrated.

    Raises:
        EarlyExitError: an unknown policy, a number that is not in its range, or a wrong count.
    """

    @suggest_keywords
    def __init__(
        self,
        num_exits: int,
        *,
        policy: str = "max_foreground",
        parameters: Any = None,
        thresholds: Sequence[float] | float = (0.6,),
        temperatures: Sequence[float] | float = (1.0,),
        hybrid: bool = False,
        temperature_bounds: tuple[float, float] = (0.5, 3.0),
        learn_temperatures: bool = False,
    ) -> None:
        super().__init__()
        if type(num_exits) is not int or num_exits < 1:
            raise EarlyExitError(f"num_exits is {num_exits!r}, expected the number of early exits, 1 or more")
        if type(hybrid) is not bool:
            raise EarlyExitError(f"hybrid is {hybrid!r}, expected True or False")
        self.certificate: Any = None
        self.num_exits = num_exits
        self.policy = policy
        self.hybrid = hybrid
        self._plain_parameters = parameters
        self._policy = get_policy(policy, parameters)
        self.compares: bool = getattr(self._policy, "compares", False)
        self._boxes: int | None = getattr(self._policy, "boxes", None)
        self._foresees: bool = getattr(self._policy, "foresees", False)
        self.temperature_bounds = tuple(temperature_bounds)
        if len(self.temperature_bounds) != 2 or not 0 < self.temperature_bounds[0] < self.temperature_bounds[1]:
            raise EarlyExitError(f"temperature_bounds {self.temperature_bounds}: expected 0 < low < high")
        low, high = self.temperature_bounds
        self.register_buffer("thresholds", _per_exit("thresholds", thresholds, num_exits, 0.0, CLOSED))
        temperature = _per_exit("temperatures", temperatures, num_exits, low, high)
        if learn_temperatures:
            self.temperatures = nn.Parameter(temperature)
        else:
            self.register_buffer("temperatures", temperature)

    def confidence(self, signals: ExitSignals, exit_index: int) -> Tensor:
        """Confidences [N] in [0, 1] at an exit; the full path is exit ``num_exits``.

        A policy that looks at the logits alone has none at an exit without a branch: -1, which reaches no threshold.

        Raises:
            EarlyExitError: the policy gives something else than one number per image.
        """
        if signals.empty and not self._foresees:
            return -torch.ones_like(signals.logits[:, 0, 0], dtype=torch.float32)
        confidence = self._policy(self.shown(signals, exit_index), exit_index)
        if confidence.dim() != 1:
            raise EarlyExitError(
                f"routing policy '{self.policy}' gives {list(confidence.shape)}, expected one number per image, [N]"
            )
        return confidence.clamp(0.0, 1.0)

    def shown(self, signals: ExitSignals, exit_index: int) -> ExitSignals:
        """What the policy sees: tempered logits of the default boxes that it looks at; those of the exit before only
        if it compares."""
        given = signals.logits
        if signals.previous is not None and not self.compares:
            signals = dataclasses.replace(signals, previous=None)
        signals = looked_at(signals, self._boxes)
        previous = None if signals.previous is None else self.tempered(signals.previous, exit_index - 1)
        logits = self.tempered(signals.logits, exit_index)
        if logits is given:  # a policy may work in place, and detections are made of these
            logits = logits.clone()
        return ExitSignals(logits, previous, signals.tap, signals.empty)

    def tempered(self, logits: Tensor, exit_index: int) -> Tensor:
        """Raw logits of an exit in fp32, divided by its temperature; those of the full path stay as they are."""
        if exit_index >= self.num_exits:
            return logits.float()
        temperature = self.temperatures[exit_index].detach()
        if isinstance(self.temperatures, nn.Parameter):  # it may have left its bounds since the last training step
            temperature = temperature.clamp(*self.temperature_bounds)
        return logits.float() / temperature

    def needs(self, exit_index: int) -> bool:
        """Whether the exit has to be scored: images may leave there, or the next exit compares itself with it."""
        if exit_index >= self.num_exits:
            return True
        if float(self.thresholds[exit_index]) < CLOSED:
            return True
        following = exit_index + 1
        return self.compares and following < self.num_exits and float(self.thresholds[following]) < CLOSED

    def leaves(self, confidence: Tensor, exit_index: int) -> Tensor:
        """[N] bool; at the full path everything leaves."""
        if exit_index >= self.num_exits:
            return torch.ones_like(confidence, dtype=torch.bool)
        return confidence >= self.thresholds[exit_index]

    def temperature_loss(self, logits: Tensor, assignment: object, exit_index: int) -> Tensor | None:
        """Cross-entropy of the tempered logits [N, A, C] against ``assignment.labels`` [N, A]; None where fixed.

        Objects and background weigh the same, since 99 % of the default boxes are easy background.
        """
        if not isinstance(self.temperatures, nn.Parameter):
            return None
        self.clamp_temperatures()  # for a training loop that is not ours
        labels = assignment.labels
        logits = logits.float() / self.temperatures[exit_index]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
        parts = [labels > 0, labels == 0]
        counts = mean_over_processes(torch.stack([part.sum() for part in parts]).float())
        sums = torch.stack([(loss * part).sum() for part in parts])
        return (sums / counts.clamp(min=1)).sum() / (counts > 0).sum()

    @torch.no_grad()
    def clamp_temperatures(self) -> None:
        """Hold the temperatures inside their bounds; our trainer calls it after every step."""
        # ``data``, since the graph of another exit's loss may hold the parameter; its values change at the first call.
        self.temperatures.data.nan_to_num_(nan=1.0).clamp_(*self.temperature_bounds)

    def to_dict(self) -> dict:
        """Plain types, to be stored beside the weights; ``ExitRouter(**values)`` makes the router again."""
        self.clamp_temperatures()
        return {
            "num_exits": self.num_exits,
            "policy": self.policy,
            "parameters": self._plain_parameters,
            "thresholds": self.thresholds.tolist(),
            "temperatures": self.temperatures.tolist(),
            "temperature_bounds": list(self.temperature_bounds),
            "hybrid": self.hybrid,
        }

    def extra_repr(self) -> str:
        thresholds = [round(value, 4) for value in self.thresholds.tolist()]
        temperatures = [round(value, 3) for value in self.temperatures.tolist()]
        return f"policy={self.policy}, thresholds={thresholds}, temperatures={temperatures}"


def _per_exit(name: str, values: Sequence[float] | float, count: int, low: float, high: float) -> Tensor:
    try:
        values = torch.as_tensor(values, dtype=torch.float64).flatten().tolist()
    except (TypeError, ValueError, RuntimeError):
        raise EarlyExitError(f"{name} is {values!r}, expected one number, or one for each of {count} exits") from None
    if len(values) not in (1, count):
        raise EarlyExitError(f"{name} {values}: expected one number, or one for each of {count} exits")
    rounding = 1e-6  # a bound that fp32 cannot hold comes back from a file a little beside it
    for value in values:
        if not low - rounding <= value <= high + rounding:
            raise EarlyExitError(f"{name} has {value}, expected a number in [{low}, {high}]")
    return torch.tensor([min(max(value, low), high) for value in values]).expand(count).clone()
