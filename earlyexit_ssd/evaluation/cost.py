"""What an image pays up to each exit: multiply-accumulates and milliseconds.

Both are of the network (trunk, branches, head) on a normalised input: resizing the photo and post-processing are
not counted. The way to an exit holds every earlier branch, as routing runs them; with a router, its scoring too.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from earlyexit_ssd.evaluation.mode import evaluating
from earlyexit_ssd.modeling.outputs import Router
from earlyexit_ssd.modeling.paths import AllOutputs, PathToExit
from earlyexit_ssd.progress import progress

COUNTED = ("conv", "linear", "addmm")
"""fvcore's names of convolutions and linear layers."""

WARM_UP_RUNS = 3


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of one image, with an interval that holds the true median with 95 % confidence."""

    ms: float
    low: float
    high: float
    threads: int
    runs: int


class PlainPath(nn.Module):
    """The detector without exits: what the full path costs if no branch is run on the way.

    Normalised input [N,3,S,S] -> the head's dict of ``cls_logits`` [N,A,C] and ``bbox_regression`` [N,A,4].
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = model.backbone, model.head

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.head(list(self.backbone(images).values()))


def mmacs_to_exit(model: nn.Module, router: Router | None = None) -> list[float]:
    """Millions of multiply-accumulates of one image to each exit, shallow to deep; the last is the full path.

    Convention: convolutions and linear layers only; BatchNorm, activations, pooling and additions are not
    counted, and one multiplication with its addition counts once. (fvcore's total counts BatchNorm too.) Branches that
    ``router`` has closed are not computed.
    """
    example = example_input(model)
    paths = [PathToExit(model, index, router) for index in range(len(model.exit_names))]
    return [count_mmacs(AllOutputs(path), example) for path in paths]


def count_mmacs(module: nn.Module, example: Tensor) -> float:
    """Millions of multiply-accumulates of ``module(example)``, in the convention of `mmacs_to_exit`."""
    with evaluating(module), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer: about shapes, and about its own future on import
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(module, example)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        by_operator = analysis.by_operator()
    return sum(by_operator[name] for name in COUNTED) / 1e6


def time_modules(
    modules: Sequence[nn.Module],
    examples: Tensor | Sequence[Tensor],
    runs: int = 30,
    threads: int = 1,
    desc: str = "",
) -> list[Timing]:
    """Time each module on its example ``runs`` times, in turns, so that a drift of the machine hits all alike.

    ``threads`` of the CPU are used meanwhile, then PyTorch's own number is restored. CUDA is synchronised
    around every run. Each module is warmed up first.

    Args:
        modules: called with one tensor.
        examples: one for each module, or one for all.
        desc: of a progress bar over the rounds; without it there is none.
    """
    examples = [examples] * len(modules) if isinstance(examples, Tensor) else examples
    milliseconds: list[list[float]] = [[] for _ in modules]
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with evaluating(*modules):
            rounds = range(-WARM_UP_RUNS, runs)
            for run in progress(rounds, desc=desc) if desc else rounds:
                for module, example, values in zip(modules, examples, milliseconds, strict=True):
                    value = _time_once(module, example)
                    if run >= 0:
                        values.append(value)
    finally:
        torch.set_num_threads(threads_before)
    return [Timing(*median_interval(values), threads=threads, runs=runs) for values in milliseconds]


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Median of ``values`` and a 95 % confidence interval of it from the order statistics (no distribution
    assumed).

    Fewer than six values cannot give 95 %; then the interval is their range.
    """
    ordered = sorted(values)
    n, below, rank = len(ordered), 0.0, 0
    # the number of values under the true median is binomial(n, 1/2); leave at most 2.5 % on either side
    while rank < n // 2:
        below += math.comb(n, rank) / 2**n
        if below > 0.025:
            break
        rank += 1
    rank = max(rank, 1)
    return statistics.median(ordered), ordered[rank - 1], ordered[n - rank]


def example_input(model: nn.Module) -> Tensor:
    """A random normalised batch of one, [1,3,H,W], of the model's input size, on its device."""
    width, height = model.transform.fixed_size
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 3, height, width, generator=generator).to(next(model.parameters()).device)


def _time_once(call: Callable[[Tensor], object], example: Tensor) -> float:
    _synchronize(example.device)
    start = time.perf_counter()
    call(example)
    _synchronize(example.device)
    return (time.perf_counter() - start) * 1000


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
