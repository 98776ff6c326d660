"""Policies: what an exit has said about an image, as one number; the higher, the less there is to gain by going on.

A new one is a function and a name::

    @register_policy("largest_logit")
    def largest_logit(logits: Tensor) -> Tensor:
        return logits[..., 1:].amax((-1, -2)).sigmoid()
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyexit_ssd.errors import EarlyExitError, nearest
from earlyexit_ssd.modeling.outputs import ExitSignals

Policy = Callable[[ExitSignals, int], Tensor]
"""Signals of an exit and the exit's index to confidences [N] in [0, 1]."""

AMBIGUOUS = (0.05, 0.6)
"""Probabilities of an object between which a default box counts as undecided."""

CANDIDATES = 512
"""Default boxes that most rules look at; behind them there is nothing but sure background."""

FEWER_CANDIDATES = 128
"""Of rules that look for the largest probability, or closer at each box."""

_VECTOR = 32

POLICIES: dict[str, Policy] = {}
FITTED_POLICIES: dict[str, Callable[[Any], Policy]] = {}
"""Policies with numbers of their own, by name: what makes one from its parameters (plain types; None: not fitted)."""


def register_policy(name: str, boxes: int | None = None) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a function of the logits [N, A, C] under ``name``.

    Args:
        name: for ``ROUTING.POLICY``.
        boxes: the router shows it so many default boxes of each image only, see :func:`looked_at`; None: all.

    Raises:
        EarlyExitError: the name is taken, or ``boxes`` is below 1.
    """
    if not isinstance(name, str):
        raise EarlyExitError(f'register_policy takes the policy\'s name, got {name!r}; write @register_policy("name")')
    if boxes is not None and (type(boxes) is not int or boxes < 1):
        raise EarlyExitError(f"routing policy '{name}' looks at {boxes} default boxes; give 1 or more, or None for all")

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if name in POLICIES or name in FITTED_POLICIES:
            raise EarlyExitError(f"routing policy '{name}' is registered already; choose another name")
        POLICIES[name] = RegisteredPolicy(name, function, boxes)
        return function

    return register


class RegisteredPolicy:
    """A function of the logits as a policy; it is pickled by its name, so that models with a router can be."""

    def __init__(self, name: str, function: Callable[..., Tensor], boxes: int | None) -> None:
        self.name, self.function, self.boxes = name, function, boxes

    def __call__(self, signals: ExitSignals, exit_index: int) -> Tensor:
        return self.function(signals.logits)

    def __reduce__(self) -> tuple:
        return get_policy, (self.name,)


def get_policy(name: str, parameters: Any = None) -> Policy:
    """The policy of that name, with its parameters if it is one that is fitted.

    Raises:
        EarlyExitError: an unknown name (the message has the nearest one), or parameters missing or given in vain.
    """
    require_known(name)
    if name in FITTED_POLICIES:
        if not parameters:
            raise EarlyExitError(
                f"routing policy '{name}' has no parameters; tools/calibrate.py fits it and writes a certificate"
            )
        return FITTED_POLICIES[name](parameters)
    if parameters is not None:
        raise EarlyExitError(f"routing policy '{name}' has no parameters, some were given; leave them out")
    return POLICIES[name]


def require_known(name: str) -> None:
    """Raise where no policy has that name, before any work is done for it; the message has the nearest one."""
    names = [*POLICIES, *FITTED_POLICIES]
    if not isinstance(name, str):
        raise EarlyExitError(f"routing policy {name!r}: expected the name that it is registered by")
    if name not in names:
        hint = nearest(name, names) or f"; there are {', '.join(names)}"
        raise EarlyExitError(f"unknown routing policy '{name}'{hint}")


def foresees(name: str) -> bool:
    """Whether the policy looks at the trunk, and so can judge an exit without a branch."""
    return getattr(FITTED_POLICIES.get(name), "foresees", False)


@register_policy("mean_foreground")
def mean_foreground(logits: Tensor) -> Tensor:
    """Mean over the default boxes of the foreground probability, 1 - p(background).

    The rule of the project's history. A perfect detector has some 0.7 % foreground, so it is near zero by nature.
    """
    total = exp_(logits - logits[..., :1]).sum(-1)  # over all default boxes every pass counts; infinity does no harm
    return 1 - total.reciprocal().mean(-1)


@register_policy("max_foreground", FEWER_CANDIDATES)
def max_foreground(logits: Tensor) -> Tensor:
    """Largest probability of any class but background at any default box: leave when very sure."""
    return Odds(logits).largest.amax(-1)


@register_policy("entropy", CANDIDATES)
def entropy(logits: Tensor) -> Tensor:
    """1 - H / log C, H the mean over the default boxes of the entropy of their classes.

    BranchyNet's rule (Teerapittayanon et al. 2016, section III-B) with its one answer replaced by many.
    """
    differences = _ahead_of_background(logits)
    odds = exp_(differences.clone())
    total = odds.sum(-1)
    in_nats = total.log() - differences.mul_(odds).sum(-1) / total
    return (1 - in_nats.mean(-1) / math.log(logits.shape[-1])).clamp(0, 1)


@register_policy("margin", CANDIDATES)
def margin(logits: Tensor) -> Tensor:
    """Lead of the most probable class over the second, a mean over the default boxes weighted by foreground."""
    odds = Odds(logits)
    first = odds.odds.amax(-1)
    ahead = (first - below(odds.odds, first).amax(-1)) / odds.total
    return (ahead * odds.foreground).sum(-1) / odds.foreground.sum(-1).clamp(min=1e-12)


@register_policy("ambiguous_mass", CANDIDATES)
def ambiguous_mass(logits: Tensor) -> Tensor:
    """1 / (1 + m), m the sum of the objects' probabilities over the default boxes that are undecided (`AMBIGUOUS`)."""
    return 1 / (1 + undecided(Odds(logits).largest).sum(-1))


@register_policy("emptiness", FEWER_CANDIDATES)
def emptiness(logits: Tensor) -> Tensor:
    """1 - the largest probability of any object: a frame in which nothing is left undecided leaves with no answer."""
    return 1 - Odds(logits).largest.amax(-1)


def looked_at(signals: ExitSignals, boxes: int | None) -> ExitSignals:
    """The signals at the ``boxes`` default boxes whose objects' logits lead background's most at this exit (None: all).

    With many classes the softmax over all of them is what costs; a temperature does not change their order.
    """
    count = signals.logits.shape[1]
    if boxes is None or boxes >= count:
        return signals
    lead = largest_of(signals.logits[..., 1:]) - signals.logits[..., 0]
    where = lead.topk(boxes, dim=-1, sorted=False).indices
    return ExitSignals(at_boxes(signals.logits, where), signals.tap, signals.empty)


def largest_of(values: Tensor) -> Tensor:
    """``values.amax(-1)``, in up to half of the time: PyTorch vectorises over a last dimension of whole 32s only."""
    classes = values.shape[-1]
    if classes < _VECTOR or classes % _VECTOR == 0:
        return values.amax(-1)
    whole = classes - classes % _VECTOR
    return torch.maximum(values[..., :whole].amax(-1), values[..., -_VECTOR:].amax(-1))


def below(values: Tensor, largest: Tensor) -> Tensor:
    """``values`` [..., C], none negative, with 0 where they equal ``largest`` [...]; faster than a mask."""
    return (largest[..., None] - values).sign_().mul_(values)


def at_boxes(logits: Tensor, boxes: Tensor) -> Tensor:
    """[N, A, C] at the default boxes [N, K]: [N, K, C]; whole rows, which is faster than ``gather``."""
    images, count, classes = logits.shape
    if images == 1:  # the usual case, and every small operation counts there
        return logits[0].index_select(0, boxes[0])[None]
    rows = boxes + torch.arange(0, images * count, count, device=boxes.device)[:, None]
    return logits.reshape(-1, classes).index_select(0, rows.flatten()).view(images, -1, classes)


def undecided(probability: Tensor) -> Tensor:
    """``probability`` where it is `AMBIGUOUS`, else 0."""
    low, high = AMBIGUOUS
    if torch.onnx.is_in_onnx_export():  # it knows no threshold but 0
        return probability * ((probability > low) & (probability < high))
    return F.threshold(probability, low, 0.0) * (probability < high)


class Odds:
    """Softmax of raw logits [N, A, C] by way of the odds against background: over so short a last dimension that is
    five times as fast as PyTorch's own.

    Attributes:
        odds: exp(logit - background's logit), [N, A, C]; above e^60 it makes no difference any more.
        total: their sum [N, A]; ``odds / total`` are the probabilities.
    """

    def __init__(self, logits: Tensor) -> None:
        self.odds = exp_(_ahead_of_background(logits))  # in place: fresh memory costs more than arithmetic
        self.total = self.odds.sum(-1)

    @property
    def foreground(self) -> Tensor:
        """1 - p(background), [N, A]."""
        return 1 - 1 / self.total

    @property
    def largest(self) -> Tensor:
        """The largest probability of any class but background, [N, A]."""
        return self.odds[..., 1:].amax(-1) / self.total


def exp_(values: Tensor) -> Tensor:
    """``values.exp_()`` by way of 2^x: PyTorch's exp is MKL's, which takes three times as long on AMD's processors."""
    if torch.onnx.is_in_onnx_export():  # it knows no exp2
        return values.exp_()
    return values.mul_(math.log2(math.e)).exp2_()


def _ahead_of_background(logits: Tensor) -> Tensor:
    """Logits [N, A, C] less background's; above 60 it makes no difference any more."""
    return (logits - logits[..., :1]).clamp_(max=60.0)
