"""A model for inference alone: the same answers, up to rounding, in about half of the time in eager PyTorch."""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from earlyexit_ssd.modeling.early_exit_ssd import EarlyExitSSDLite


def is_fused(model: nn.Module) -> bool:
    """Whether the model comes from `fuse_for_inference`."""
    return getattr(model, "fused", False)


def fuse_for_inference(model: EarlyExitSSDLite) -> EarlyExitSSDLite:
    """A copy in eval mode with every BatchNorm folded into its convolution and, on a CPU, the channels last in memory.

    Detections are the model's up to rounding in fp32. Its router goes along. The copy cannot be trained, saved or
    matched with a certificate: keep the model, and give it its router first.
    """
    fused = copy.deepcopy(model).eval().requires_grad_(False)
    fused.fused = True
    for sequence in [module for module in fused.modules() if isinstance(module, nn.Sequential)]:
        for (name, first), (next_name, second) in pairwise(list(sequence.named_children())):
            if isinstance(first, nn.Conv2d) and isinstance(second, _BatchNorm):
                setattr(sequence, name, fuse_conv_bn_eval(first, second))
                setattr(sequence, next_name, nn.Identity())
    if next(fused.parameters()).device.type == "cpu":  # on CUDA, depthwise convolutions are many times slower so
        fused.to(memory_format=torch.channels_last)
    return fused
