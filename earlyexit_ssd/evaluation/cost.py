"""Multiply-accumulates and milliseconds of one image up to each exit, in eager PyTorch, ONNX Runtime or OpenVINO."""

from __future__ import annotations

import importlib.util
import io
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from earlyexit_ssd.console import progress
from earlyexit_ssd.errors import EarlyExitError, import_package
from earlyexit_ssd.modeling.detector import AllOutputs
from earlyexit_ssd.modeling.outputs import Router
from earlyexit_ssd.modeling.trunk import evaluating
from earlyexit_ssd.runtimes import OnnxRuntime, compile_in_openvino

EAGER, ONNX_RUNTIME, OPENVINO = "eager", "onnxruntime", "openvino"
RUNTIME_TITLES = {EAGER: "eager PyTorch", ONNX_RUNTIME: "ONNX Runtime", OPENVINO: "OpenVINO"}
"""Name of a runtime in the configuration and in metrics.json -> its name in tables and charts."""


def runtime_installed() -> bool:
    """Return whether onnx and onnxruntime are installed, without importing them."""
    return all(importlib.util.find_spec(name) is not None for name in ("onnx", "onnxruntime"))


class OnnxNetwork(nn.Module):
    """An ONNX graph that ONNX Runtime runs on the CPU. ``content`` and ``name`` are those of `OnnxRuntime`.

    Attributes:
        input_shape: shape of the only input. A dynamic first dimension is replaced by 1.
        metadata: the file's custom metadata, text by key.

    Raises:
        EarlyExitError: ONNX Runtime cannot load the graph, or it does not have one input, of a fixed size and in fp32.
    """

    def __init__(self, content: bytes, threads: int = 1, name: str = "the network") -> None:
        super().__init__()
        self._run = OnnxRuntime(content, name, threads, spinning=False)
        self.metadata, inputs = self._run.metadata, self._run.session.get_inputs()
        shape = inputs[0].shape if inputs else []
        self.input_shape = tuple(1 if axis == 0 and not isinstance(n, int) else n for axis, n in enumerate(shape))
        if len(inputs) != 1 or not all(isinstance(length, int) and length > 0 for length in self.input_shape):
            shapes = ", ".join(f"{node.name} {node.shape}" for node in inputs) or "none"
            raise EarlyExitError(f"{name}: expected one input of a fixed size, got {shapes}; export it again")
        if inputs[0].type != "tensor(float)":
            raise EarlyExitError(f"{name}: its input is {inputs[0].type}, expected tensor(float); export it in fp32")

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the outputs, in the file's order, for a float32 tensor of ``input_shape`` on the CPU."""
        return list(map(torch.from_numpy, self._run({self._run.inputs[0]: x.numpy()}).values()))


class OpenVinoNetwork(nn.Module):
    """An ONNX graph that OpenVINO runs on the CPU, in fp32."""

    def __init__(self, content: bytes, threads: int = 1) -> None:
        super().__init__()
        model = import_package(OPENVINO).Core().read_model(content)
        self._request = compile_in_openvino(model, threads).create_infer_request()

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the outputs, in the graph's order, for a float32 tensor on the CPU."""
        outputs = self._request.infer([x.numpy()], share_inputs=True)
        return [torch.from_numpy(output) for output in outputs.values()]


def in_runtime(network: nn.Module, example: Tensor, runtime: str, threads: int = 1) -> nn.Module:
    """Convert ``network`` for ``runtime`` and inputs of the example's shape. An `OnnxNetwork` is returned unchanged."""
    if runtime == EAGER or isinstance(network, OnnxNetwork):
        return network
    content = export_onnx(network, example)
    return OpenVinoNetwork(content, threads) if runtime == OPENVINO else OnnxNetwork(content, threads)


def time_in_runtime(
    networks: Sequence[nn.Module], examples: Sequence[Tensor], runtime: str, runs: int, threads: int
) -> list[Timing]:
    """Convert each network for ``runtime`` and time it on its example, see `time_modules`."""
    pairs = list(zip(networks, examples, strict=True))
    pairs = pairs if runtime == EAGER else progress(pairs, desc="export to ONNX")
    return time_modules([in_runtime(*pair, runtime, threads) for pair in pairs], examples, runs, threads, desc="time")


def export_onnx(network: nn.Module, example: Tensor) -> bytes:
    """Return the bytes of an ONNX file of the network, weights included, for inputs of the example's shape. Raise an
    EarlyExitError if the export fails."""
    import_package("onnx")
    content = io.BytesIO()
    with evaluating(network), warnings.catch_warnings():
        # the tracer warns that it is deprecated, and that shapes become constants, which is intended
        warnings.simplefilter("ignore")
        try:
            # in torch 2.6 the newer exporter fails on BatchNorm with current onnxscript, and its graphs are not faster
            torch.onnx.export(network, (example.cpu(),), content, dynamo=False)
        except Exception as error:
            raise EarlyExitError(f"export to ONNX failed ({error}); set EVAL.RUNTIME to eager") from error
    return content.getvalue()


COUNTED = (torch.ops.aten.convolution, torch.ops.aten.addmm, torch.ops.aten.mm)  # convolutions and linear layers


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of one image, and the 95 % confidence interval [low, high] of this median."""

    ms: float
    ms_interval: list[float]


class PlainPath(nn.Module):
    """Trunk and head of ``model`` without branches: the network of the detector without exits, to time and count it.

    It maps normalised images [N, 3, H, W] to ``cls_logits`` [N, A, C] and ``bbox_regression`` [N, A, 4].
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = model.backbone, model.head

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.head(list(self.backbone(images).values()))


def mmacs_to_exit(model: nn.Module, router: Router | None = None) -> list[float]:
    """Return the millions of multiply-accumulates (MMACs) of one image to each exit, shallow to deep, full path last.

    Only convolutions and linear layers are counted. The branches of earlier exits are included, unless ``router`` has
    closed these exits.
    """
    paths = (AllOutputs(model, index, router) for index in range(len(model.exit_names)))
    return [count_mmacs(path, example_input(model)) for path in paths]


def count_mmacs(module: nn.Module, example: Tensor) -> float:
    """Return the MMACs of ``module(example)``, counted as in `mmacs_to_exit`."""
    with evaluating(module), FlopCounterMode(display=False) as counter:
        module(example)
    counts = counter.get_flop_counts().get("Global", {})
    return sum(count for operator, count in counts.items() if operator in COUNTED) / 2e6  # 2 FLOP per MAC


def time_modules(
    modules: Sequence[nn.Module],
    examples: Tensor | Sequence[Tensor],
    runs: int = 30,
    threads: int = 1,
    desc: str | None = None,
) -> list[Timing]:
    """Time each module ``runs`` times. The modules take turns, so that a slow phase of the machine slows all of them.

    Before each timed run the module runs once untimed, because here the other modules have replaced its data in the
    CPU's caches. In use a detector runs alone. ``examples`` are one input for each module, or one tensor for all.
    ``threads`` are CPU threads of PyTorch. ``desc`` is the title of the progress bar; None: no bar.
    """
    examples = [examples] * len(modules) if isinstance(examples, Tensor) else examples
    milliseconds: list[list[float]] = [[] for _ in modules]
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with evaluating(*modules):
            for _ in progress(range(runs), desc=desc):
                for module, example, values in zip(modules, examples, milliseconds, strict=True):
                    module(example)
                    synchronize()
                    start = time.perf_counter()
                    module(example)
                    synchronize()
                    values.append((time.perf_counter() - start) * 1000)
    finally:
        torch.set_num_threads(threads_before)
    return [Timing(*median_interval(values)) for values in milliseconds]


def median_interval(values: Sequence[float]) -> tuple[float, list[float]]:
    """Return the median of ``values`` and its distribution-free 95 % confidence interval from order statistics.

    Fewer than six values cannot give 95 %. Then the interval is their range.
    """
    ordered = sorted(values)
    # the number of values below the true median is binomial(n, 1/2); at most 2.5 % may lie on either side
    rank = max(1, int(stats.binom.ppf(0.025, len(ordered), 0.5)))
    return statistics.median(ordered), [ordered[rank - 1], ordered[-rank]]


def example_input(model: nn.Module) -> Tensor:
    """Return a random normalised image [1, 3, H, W], seeded, of the model's input size and on its device."""
    width, height = model.transform.fixed_size
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 3, height, width, generator=generator).to(next(model.parameters()).device)
