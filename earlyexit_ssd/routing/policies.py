"""Policies: the raw logits of an exit to one confidence per image."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from earlyexit_ssd.errors import EarlyExitError, nearest

Policy = Callable[[Tensor], Tensor]
"""Logits [N, A, C] with background in column 0 to confidences [N] in [0, 1]."""


def mean_foreground(logits: Tensor) -> Tensor:
    """Mean over the default boxes of the foreground probability, 1 - p(background).

    The rule of the project's history. A perfect detector has some 0.7 % foreground, so it is near zero by nature.
    """
    return 1 - logits.softmax(-1)[..., 0].mean(-1)


def max_foreground(logits: Tensor) -> Tensor:
    """Largest probability of any class but background at any default box."""
    return logits.softmax(-1)[..., 1:].amax((-1, -2))


POLICIES: dict[str, Policy] = {"mean_foreground": mean_foreground, "max_foreground": max_foreground}


def get_policy(name: str) -> Policy:
    """The policy of that name.

    Raises:
        EarlyExitError: an unknown name; the message has the nearest one.
    """
    if name not in POLICIES:
        hint = nearest(name, POLICIES) or f"; there are {', '.join(POLICIES)}"
        raise EarlyExitError(f"unknown routing policy '{name}'{hint}")
    return POLICIES[name]
