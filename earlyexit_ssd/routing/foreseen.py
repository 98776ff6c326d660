"""A fitted policy that foresees an empty answer: linear in what the trunk has seen so far.

The scene tells long before the objects do: a street has no chair. A ridge regression on the pooled tap (as Alain and
Bengio 2017, "Understanding intermediate layers using linear classifier probes", look into layers) predicts the largest
probability that the full path will say; no label is needed, only the full path's own answers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling.outputs import ExitSignals
from earlyexit_ssd.routing.policies import FEWER_CANDIDATES, FITTED_POLICIES, Odds

PENALTIES = tuple(10.0**power for power in range(-1, 6))
LEAST_PROBABILITY = 1e-3
"""Probabilities are held this far from 0 and 1 before their logits are taken."""


class ForeseenEmptiness(nn.Module):
    """Confidence: 1 - the largest probability of any object that the full path is expected to say.

    Args:
        parameters: per early exit ``{"weight": [d], "bias": float}`` for :func:`evidence`, plain numbers, as
            :func:`fit_foresight` gives them.

    Raises:
        EarlyExitError: something else.
    """

    boxes = FEWER_CANDIDATES
    foresees = True  # it looks at the tap, so an exit without a branch can be judged

    def __init__(self, parameters: Sequence[dict]) -> None:
        super().__init__()
        try:
            self._count = len(parameters)
            for index, values in enumerate(parameters):
                self.register_buffer(f"weight{index}", torch.tensor(values["weight"]))
                self.register_buffer(f"bias{index}", torch.tensor(values["bias"]))
        except (KeyError, RuntimeError, TypeError, ValueError):
            raise EarlyExitError(
                f"routing policy 'foreseen_emptiness': its parameters are {str(parameters)[:60]}, expected weight and "
                "bias, numbers, for every early exit; calibrate again (tools/calibrate.py)"
            ) from None

    def forward(self, signals: ExitSignals, exit_index: int) -> Tensor:
        """Confidences [N]; at the full path 1 - its own largest probability."""
        if exit_index >= self._count:
            return 1 - Odds(signals.logits).largest.amax(-1)
        weight, bias = getattr(self, f"weight{exit_index}"), getattr(self, f"bias{exit_index}")
        return torch.sigmoid(-F.linear(evidence(signals), weight[None], bias[None])[:, 0])


def evidence(signals: ExitSignals) -> Tensor:
    """The pooled tap and, where the exit has a branch, the logit of the largest probability that it says: [N, d]."""
    if signals.empty:
        return signals.tap
    return torch.cat([signals.tap, to_logits(Odds(signals.logits).largest.amax(-1))[:, None]], dim=1)


def to_logits(probability: Tensor) -> Tensor:
    """log(p / (1 - p)), with p held `LEAST_PROBABILITY` from 0 and 1."""
    return torch.logit(probability, eps=LEAST_PROBABILITY)


def fit_foresight(inputs: Tensor, probability: Tensor) -> dict[str, list | float]:
    """Ridge regression of the logit of ``probability`` [n] on ``inputs`` [n, d], its penalty by leave-one-out.

    With X the standardised inputs, the residual of a photo left out is (y - Xw) / (1 - h), h the diagonal of
    X (X'X + penalty)^-1 X' + 1/n (Golub, Heath and Wahba 1979, equation 1.3).

    Returns:
        ``weight`` [d] and ``bias`` for the inputs as they are, plain numbers.
    """
    inputs, targets = inputs.double(), to_logits(probability.double())
    mean, scale = inputs.mean(0), inputs.std(0, unbiased=False).clamp(min=1e-3)
    left, values, right = torch.linalg.svd((inputs - mean) / scale, full_matrices=False)
    projected = left.T @ (targets - targets.mean())
    best: tuple[float, Tensor] | None = None
    for penalty in PENALTIES:
        shrink = values**2 / (values**2 + penalty)
        residual = targets - targets.mean() - left @ (shrink * projected)
        leverage = (left**2 @ shrink) + 1 / len(inputs)
        error = (residual / (1 - leverage).clamp(min=1e-6)).square().mean().item()
        if best is None or error < best[0]:
            best = error, right.T @ (values / (values**2 + penalty) * projected)
    weight = best[1] / scale
    return {"weight": weight.float().tolist(), "bias": float(targets.mean() - mean @ weight)}


FITTED_POLICIES["foreseen_emptiness"] = ForeseenEmptiness
