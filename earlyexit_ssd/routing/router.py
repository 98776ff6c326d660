"""The router, which decides at each exit which images leave."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.errors import EarlyExitError, suggest_keywords
from earlyexit_ssd.modeling.losses import mean_over_processes
from earlyexit_ssd.modeling.outputs import ExitSignals
from earlyexit_ssd.routing.policies import at_likeliest_boxes, get_policy


class ExitRouter(nn.Module):
    """Images leave at the first exit whose confidence reaches its threshold. Other images take the full path.

    ``thresholds``, ``temperatures`` and ``policy`` may be assigned later, with the checks of the constructor. A policy
    with fitted parameters can only be passed to the constructor.

    Args:
        num_exits: number of early exits, without the full path.
        policy: name of the function that computes the confidence, see :mod:`earlyexit_ssd.routing.policies`.
        parameters: the parameters of a fitted policy such as ``learned_gain``; None for other policies.
        thresholds: one per exit, or one for all exits, in [0, 1] or `CLOSED` (2). No image leaves at a closed exit.
            By default all exits are closed, since a threshold is safe only after calibration (``tools/calibrate.py``).
        temperatures: one per exit, or one for all exits. An exit's logits are divided by its temperature before the
            policy gets them. The logits of the full path are not divided.
        hybrid: every image runs the whole trunk. Its classes come from the first exit that reaches its threshold, and
            its boxes from the full path.
        temperature_bounds: (low, high). Temperatures are clamped to them after every training step.
        learn_temperatures: fit the temperatures while the exits train (temperature scaling, Guo et al. 2017, but with
            the balanced loss of `temperature_loss`). No gradient flows into the logits.

    Attributes:
        certificate: the `Certificate` that the router was built from, or None.

    Raises:
        EarlyExitError: an unknown policy, a number outside its range, or a wrong number of values.
    """

    @suggest_keywords
    def __init__(
        self,
        num_exits: int,
        *,
        policy: str = "ambiguous_mass",
        parameters: Any = None,
        thresholds: Sequence[float] | float = CLOSED,
        temperatures: Sequence[float] | float = (1.0,),
        hybrid: bool = False,
        temperature_bounds: tuple[float, float] = (0.5, 3.0),
        learn_temperatures: bool = False,
    ) -> None:
        super().__init__()
        if type(num_exits) is not int or num_exits < 0:
            raise EarlyExitError(f"num_exits is {num_exits!r}, expected the number of early exits")
        if type(hybrid) is not bool:
            raise EarlyExitError(f"hybrid is {hybrid!r}, expected True or False")
        self.certificate: Any = None
        self.num_exits, self.hybrid = num_exits, hybrid
        self._set_policy(policy, parameters)
        self.temperature_bounds = tuple(map(float, temperature_bounds))
        if len(self.temperature_bounds) != 2 or not 0 < self.temperature_bounds[0] < self.temperature_bounds[1]:
            raise EarlyExitError(f"temperature_bounds {self.temperature_bounds}: expected 0 < low < high")
        self.register_buffer("thresholds", _per_exit("thresholds", thresholds, num_exits, 0.0, 1.0))
        temperature = _per_exit("temperatures", temperatures, num_exits, *self.temperature_bounds)
        if learn_temperatures:
            self.temperatures = nn.Parameter(temperature)
        else:
            self.register_buffer("temperatures", temperature)

    def _set_policy(self, name: str, parameters: Any) -> None:
        policy = get_policy(name, parameters)
        self._modules.pop("_policy", None)  # nn.Module refuses to replace a module by a function
        self._policy, self._policy_name, self._plain_parameters = policy, name, parameters
        self._boxes, self._reads_taps = policy.boxes, policy.reads_taps

    @property
    def policy(self) -> str:
        """Name of the policy."""
        return self._policy_name

    @policy.setter
    def policy(self, name: str) -> None:
        self._set_policy(name, None)

    def __setattr__(self, name: str, value: Any) -> None:
        """Accept numbers and lists for thresholds and temperatures, as in the constructor."""
        if name in ("thresholds", "temperatures") and hasattr(self, name):
            bounds = (0.0, 1.0) if name == "thresholds" else self.temperature_bounds
            old = getattr(self, name)
            new = _per_exit(name, value, self.num_exits, *bounds).to(old)
            if name in self._parameters:  # keep the parameter itself: an optimizer may hold it
                old.data.copy_(new)
            else:
                self._buffers[name] = new
        else:
            super().__setattr__(name, value)

    def confidence(self, signals: ExitSignals, exit_index: int) -> Tensor:
        """Compute confidences [N] in [0, 1] at an exit; the full path is exit ``num_exits``. At an exit without a
        branch they are -1, which reaches no threshold, if the policy reads logits only. Raise EarlyExitError unless
        the policy returns a tensor [N] without NaN; other values are clamped to [0, 1]."""
        if signals.empty and not self._reads_taps:
            return -torch.ones_like(signals.logits[:, 0, 0], dtype=torch.float32)
        likeliest = at_likeliest_boxes(signals, self._boxes)
        logits = self.tempered(likeliest.logits, exit_index)
        confidence = self._policy(ExitSignals(logits, likeliest.tap, likeliest.empty), exit_index)
        if not isinstance(confidence, Tensor) or confidence.shape != (len(logits),):
            got = list(confidence.shape) if isinstance(confidence, Tensor) else f"a {type(confidence).__name__}"
            expected = "expected one number per image, a tensor [N]"
            raise EarlyExitError(f"routing policy '{self.policy}' returns {got}, {expected}")
        traced = torch.jit.is_tracing() or torch.compiler.is_compiling()
        # NaN from logits that are not finite is the model's, not the policy's
        if not traced and confidence.isnan().any() and logits.isfinite().all():
            raise EarlyExitError(f"routing policy '{self.policy}' returns NaN, expected numbers in [0, 1]")
        return confidence.clamp(0.0, 1.0)

    def tempered(self, logits: Tensor, exit_index: int) -> Tensor:
        """Return a copy of raw logits divided by the exit's temperature, in fp32. The full path's are not divided."""
        if exit_index >= self.num_exits:
            return logits.float().clone()
        temperature = self.temperatures[exit_index].detach()
        if isinstance(self.temperatures, nn.Parameter):  # a training step may have moved it outside its bounds
            temperature = temperature.clamp(*self.temperature_bounds)
        return logits.float() / temperature

    @property
    def closed(self) -> bool:
        """Whether all exits are closed, so that every image takes the full path."""
        return bool((self.thresholds >= CLOSED).all())

    def needs(self, exit_index: int) -> bool:
        """Whether the confidence at the exit is needed: True unless the exit is closed."""
        return exit_index >= self.num_exits or float(self.thresholds[exit_index]) < CLOSED

    def leaves(self, confidence: Tensor, exit_index: int) -> Tensor:
        """Return the mask [N] of the images that leave at the early exit."""
        return confidence >= self.thresholds[exit_index]

    def temperature_loss(self, logits: Tensor, assignment: object, exit_index: int) -> Tensor | None:
        """Return the balanced cross-entropy between softmax(logits / T) and ``assignment.labels`` [N, A], a scalar.

        ``logits`` are [N, A, C], and T is the exit's temperature. The loss is the mean of two means, over the default
        boxes with an object and over those without, since 99 % of them are background. None if temperatures are not
        learned.
        """
        if not isinstance(self.temperatures, nn.Parameter):
            return None
        self.clamp_temperatures()  # a user's training loop may not call it
        labels, logits = assignment.labels, logits.float() / self.temperatures[exit_index]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
        parts = [labels > 0, labels == 0]
        counts = mean_over_processes(torch.stack([part.sum() for part in parts]).float())
        sums = torch.stack([(loss * part).sum() for part in parts])
        return (sums / counts.clamp(min=1)).sum() / (counts > 0).sum()

    @torch.no_grad()
    def clamp_temperatures(self) -> None:
        """Clamp the temperatures to their bounds. The package's training calls it after every step."""
        # ``data``, since the graph of another exit's loss may need the parameter and autograd refuses changes in place
        self.temperatures.data.nan_to_num_(nan=1.0).clamp_(*self.temperature_bounds)

    def to_dict(self) -> dict:
        """Return the settings as plain types. ``ExitRouter(**values)`` is an equal router with fixed temperatures."""
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
        thresholds = ["closed" if value >= CLOSED else round(value, 4) for value in self.thresholds.tolist()]
        return f"policy={self.policy}, thresholds={thresholds}, temperatures={self.temperatures.tolist()}"


def _per_exit(name: str, values: Sequence[float] | float, count: int, low: float, high: float) -> Tensor:
    """Return ``values`` as one number in [``low``, ``high``] per exit, [count]. A threshold may also be `CLOSED`."""
    closed = CLOSED if name == "thresholds" else None
    problem = EarlyExitError(f"{name} is {values!r:.60}, expected one number, or one for each of {count} exits")
    try:
        values = torch.as_tensor(values, dtype=torch.float64).flatten().tolist()
    except (TypeError, ValueError, RuntimeError):
        raise problem from None
    if len(values) not in (1, count):
        raise problem
    rounding = 1e-6  # a bound stored in fp32 may lie a little outside
    for value in values:
        if value != closed and not low - rounding <= value <= high + rounding:
            fix = f", or {CLOSED:g} to close the exit" if closed else ""
            raise EarlyExitError(f"{name} has {value}, expected a number in [{low:g}, {high:g}]{fix}")
    numbers = [value if value == closed else min(max(value, low), high) for value in values]
    return torch.tensor(numbers).expand(count).clone()
