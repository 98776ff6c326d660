"""Policies: what an exit has said about an image, as one number; the higher, the less there is to gain by going on.

A new one is a function and a name::

    @register_policy("largest_logit")
    def largest_logit(logits: Tensor) -> Tensor:
        return logits[..., 1:].amax((-1, -2)).sigmoid()
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from earlyexit_ssd.errors import EarlyExitError, nearest
from earlyexit_ssd.modeling.outputs import ExitSignals

Policy = Callable[[ExitSignals, int], Tensor]
"""Signals of an exit and the exit's index to confidences [N] in [0, 1]."""

AMBIGUOUS = (0.05, 0.6)
"""Probabilities of an object between which a default box counts as undecided."""

CANDIDATES = 512
"""Default boxes that the rules look at; behind them there is nothing but sure background."""

FEWER_CANDIDATES = 128
"""Default boxes of the rules that look closer at each of them, which takes longest."""

_VECTOR = 32

POLICIES: dict[str, Policy] = {}
FITTED_POLICIES: dict[str, Callable[[Any], Policy]] = {}
"""Policies with numbers of their own, by name: what makes one from its parameters (plain types; None: not fitted)."""


def register_policy(name: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a function under ``name``: of the logits [N, A, C], or, if it takes ``previous`` too, of the logits and
    those of the exit before (None at the first exit).

    Raises:
        EarlyExitError: the name is taken.
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if name in POLICIES:
            raise EarlyExitError(f"routing policy '{name}' is registered already; choose another name")
        compares = "previous" in inspect.signature(function).parameters

        def policy(signals: ExitSignals, exit_index: int) -> Tensor:
            return function(signals.logits, signals.previous) if compares else function(signals.logits)

        policy.compares = compares
        POLICIES[name] = policy
        return function

    return register


def get_policy(name: str, parameters: Any = None) -> Policy:
    """The policy of that name, with its parameters if it is one that is fitted.

    Raises:
        EarlyExitError: an unknown name (the message has the nearest one), or parameters missing or given in vain.
    """
    names = [*POLICIES, *FITTED_POLICIES]
    if name not in names:
        hint = nearest(name, names) or f"; there are {', '.join(names)}"
        raise EarlyExitError(f"unknown routing policy '{name}'{hint}")
    if name in FITTED_POLICIES:
        return FITTED_POLICIES[name](parameters)
    if parameters is not None:
        raise EarlyExitError(f"routing policy '{name}' has no parameters, some were given; leave them out")
    return POLICIES[name]


@register_policy("mean_foreground")
def mean_foreground(logits: Tensor) -> Tensor:
    """Mean over the default boxes of the foreground probability, 1 - p(background).

    The rule of the project's history. A perfect detector has some 0.7 % foreground, so it is near zero by nature.
    """
    odds = (logits - logits[..., :1]).clamp_(max=60.0).exp_()  # over all default boxes memory is what costs
    return 1 - odds.sum(-1).reciprocal().mean(-1)


@register_policy("max_foreground")
def max_foreground(logits: Tensor) -> Tensor:
    """Largest probability of any class but background at any default box: leave when very sure."""
    return candidates(logits).largest.amax(-1)


@register_policy("entropy")
def entropy(logits: Tensor) -> Tensor:
    """1 - H / log C, H the mean over the `CANDIDATES` of the entropy of their classes.

    BranchyNet's rule (Teerapittayanon et al. 2016, section III-B) with its one answer replaced by many.
    """
    return (1 - candidates(logits).entropy.mean(-1) / math.log(logits.shape[-1])).clamp(0, 1)


@register_policy("margin")
def margin(logits: Tensor) -> Tensor:
    """Lead of the most probable class over the second, a mean over the `CANDIDATES` weighted by foreground."""
    odds = candidates(logits)
    first = largest_of(odds.odds)
    ahead = (first - largest_of(below(odds.odds, first))) / odds.total
    return (ahead * odds.foreground).sum(-1) / odds.foreground.sum(-1).clamp(min=1e-12)


@register_policy("ambiguous_mass")
def ambiguous_mass(logits: Tensor) -> Tensor:
    """1 / (1 + m), m the sum of the objects' probabilities over the default boxes that are undecided (`AMBIGUOUS`)."""
    return 1 / (1 + undecided(candidates(logits).largest).sum(-1))


@register_policy("emptiness")
def emptiness(logits: Tensor) -> Tensor:
    """1 - the largest probability of any object: a frame in which nothing is left undecided leaves with no answer."""
    return 1 - candidates(logits).largest.amax(-1)


@register_policy("agreement")
def agreement(logits: Tensor, previous: Tensor | None) -> Tensor:
    """Overlap of the class probabilities with those of the exit before, over what either takes for foreground.

    1 - sum_a TV_a / sum_a max(f_a, f'_a), TV the total variation distance at default box a, f the foreground
    probability, and a the `FEWER_CANDIDATES` of this exit; 0 at the first one, which has nothing to agree with.
    """
    if previous is None:
        return logits.new_zeros(len(logits))
    boxes = most_probable(logits, FEWER_CANDIDATES)
    now, before = Odds(at_boxes(logits, boxes)), Odds(at_boxes(previous, boxes))
    distance = (now.odds / now.total[..., None] - before.odds / before.total[..., None]).abs().flatten(1).sum(-1) / 2
    foreground = torch.maximum(now.foreground, before.foreground).sum(-1)
    return (1 - distance / foreground.clamp(min=1e-12)).clamp(0, 1)


def most_probable(logits: Tensor, count: int) -> Tensor:
    """[N, A, C] to the indices [N, min(count, A)] of the default boxes whose objects lead background most."""
    return lead(logits).topk(min(count, logits.shape[1]), dim=-1, sorted=False).indices


def lead(logits: Tensor) -> Tensor:
    """[N, A, C] to [N, A]: how far the first of the objects' logits is above background's."""
    return largest_of(logits[..., 1:]) - logits[..., 0]


def largest_of(values: Tensor) -> Tensor:
    """``values.amax(-1)``, in up to half of the time: PyTorch vectorises over a last dimension of whole 32s only."""
    classes = values.shape[-1]
    if classes < _VECTOR or classes % _VECTOR == 0:
        return values.amax(-1)
    whole = classes - classes % _VECTOR
    return torch.maximum(values[..., :whole].amax(-1), values[..., -_VECTOR:].amax(-1))


def below(values: Tensor, largest: Tensor) -> Tensor:
    """``values`` [..., C], none negative, with 0 where they equal ``largest`` [...]; faster than a mask."""
    return values * (largest[..., None] - values).sign_()


def at_boxes(logits: Tensor, boxes: Tensor) -> Tensor:
    """[N, A, C] at the default boxes [N, K]: [N, K, C]; whole rows, which is faster than ``gather``."""
    images, count, classes = logits.shape
    if images == 1:  # the usual case, and every small operation counts there
        return logits[0].index_select(0, boxes[0])[None]
    rows = boxes + torch.arange(0, images * count, count, device=boxes.device)[:, None]
    return logits.reshape(-1, classes).index_select(0, rows.flatten()).view(images, -1, classes)


def candidates(logits: Tensor, count: int = CANDIDATES) -> Odds:
    """The odds of the most probable default boxes alone: with many classes the softmax is what costs."""
    return Odds(at_boxes(logits, most_probable(logits, count)))


def undecided(probability: Tensor) -> Tensor:
    """``probability`` where it is `AMBIGUOUS`, else 0."""
    low, high = AMBIGUOUS
    return probability * ((probability > low) & (probability < high))


class Odds:
    """Softmax of raw logits [N, A, C] by way of the odds against background: over so short a last dimension that is
    five times as fast as PyTorch's own.

    Attributes:
        odds: exp(logit - background's logit), [N, A, C]; above e^60 it makes no difference any more.
        total: their sum [N, A]; ``odds / total`` are the probabilities.
    """

    def __init__(self, logits: Tensor) -> None:
        self._differences = (logits - logits[..., :1]).clamp_(max=60.0)
        self.odds = self._differences.exp()
        self.total = self.odds.sum(-1)

    @property
    def foreground(self) -> Tensor:
        """1 - p(background), [N, A]."""
        return 1 - 1 / self.total

    @property
    def largest(self) -> Tensor:
        """The largest probability of any class but background, [N, A]."""
        return largest_of(self.odds[..., 1:]) / self.total

    @property
    def entropy(self) -> Tensor:
        """Of the class probabilities, in nats, [N, A]."""
        return self.total.log() - (self.odds * self._differences).sum(-1) / self.total
