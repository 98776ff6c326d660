"""A fitted policy for a mean over classes: what an exit leaves undecided counts more, the rarer its class is.

AP is the mean of the classes' own, so an object missed is worth 1 / (objects of its class): the inverse frequency of
class-balanced learning (Cui et al. 2019, "Class-balanced loss based on effective number of samples", with beta -> 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling.outputs import ExitSignals
from earlyexit_ssd.routing.policies import FEWER_CANDIDATES, FITTED_POLICIES, Odds, undecided


class BalancedAmbiguity(nn.Module):
    """Confidence: 1 / (1 + m), m the sum of weight * probability over the default boxes that are undecided
    (`AMBIGUOUS`), by the weight of each one's most probable class.

    Args:
        parameters: a weight for every class but background, as :func:`class_weights` gives them.

    Raises:
        EarlyExitError: something else than positive numbers.
    """

    boxes = FEWER_CANDIDATES
    only_counts = True  # labels, of whichever photos: it needs no training photos

    def __init__(self, parameters: Sequence[float]) -> None:
        super().__init__()
        if not isinstance(parameters, (list, tuple)) or not all(
            type(value) in (int, float) and 0 < value < math.inf for value in parameters
        ):
            raise EarlyExitError(
                f"routing policy 'balanced_ambiguity': its parameters are {parameters!r}, expected a positive weight "
                "for every class; calibrate again (tools/calibrate.py)"
            )
        self.register_buffer("weights", torch.tensor(parameters, dtype=torch.float32))

    def forward(self, signals: ExitSignals, exit_index: int) -> Tensor:
        """Confidences [N].

        Raises:
            EarlyExitError: the exit says another number of classes than there are weights.
        """
        if signals.logits.shape[-1] - 1 != len(self.weights):
            raise EarlyExitError(
                f"routing policy 'balanced_ambiguity' has weights of {len(self.weights)} classes, the model has "
                f"{signals.logits.shape[-1] - 1}; calibrate again (tools/calibrate.py)"
            )
        odds = Odds(signals.logits)
        best, classes = odds.odds[..., 1:].max(-1)
        return 1 / (1 + (undecided(best / odds.total) * self.weights[classes]).sum(-1))


def class_weights(objects: Sequence[int]) -> list[float]:
    """Of every class, from how many objects of it there are: mean(n + 1) / (n + 1), 1 where all are alike."""
    counts = torch.tensor(objects, dtype=torch.float64) + 1
    return (counts.mean() / counts).tolist()


FITTED_POLICIES["balanced_ambiguity"] = BalancedAmbiguity
