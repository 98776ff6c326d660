"""Optimizers and the learning-rate schedule."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch
from torch import nn


def build_optimizer(
    model: nn.Module, name: str, lr: float, weight_decay: float, lr_factors: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """``sgd`` (momentum 0.9) or ``adamw`` over what requires a gradient; norms, biases and scalars do not decay.

    Args:
        lr_factors: beginnings of parameters' names to what their rate is multiplied by; 1 for all others. A group
            of parameters keeps its factor under ``lr_factor``.
    """

    def factor(parameter_name: str) -> float:
        return next((value for start, value in (lr_factors or {}).items() if parameter_name.startswith(start)), 1.0)

    def kind(named: tuple[str, nn.Parameter]) -> tuple[float, float]:
        return factor(named[0]), weight_decay if named[1].ndim > 1 else 0.0

    named = [(key, parameter) for key, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [parameter for _, parameter in members],
            "lr": lr * lr_factor,
            "lr_factor": lr_factor,
            "weight_decay": decay,
        }
        for (lr_factor, decay), members in itertools.groupby(sorted(named, key=kind, reverse=True), kind)
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=lr)


def learning_rate(step: int, total: int, peak: float, warmup: float) -> float:
    """Linear warm-up over the share ``warmup`` of all steps, then a cosine to zero (Loshchilov and Hutter 2017)."""
    warmup_steps = int(total * warmup)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total - warmup_steps)))
