"""Quantise an ONNX model to 8 bits for ONNX Runtime on a CPU.

Activations become uint8 with one scale per tensor, weights int8 with one scale per output channel (Jacob et al. 2018,
"Quantization and training of neural networks for efficient integer-arithmetic-only inference"). First the model is
rewritten. Up to rounding in 32 bits its outputs stay the same:

1. HardSwish(x) = x * HardSigmoid(x) becomes two operators, because ONNX Runtime has no HardSwish of integers.
2. The channels of depthwise convolutions are padded with zeros to a multiple of `CHANNEL_MULTIPLE`, which is faster.
3. The channels of a tensor get similar ranges. The factors move into the convolutions before and after the tensor
   (Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction", section 4.1).

Then biases are corrected by the mean error that rounding the weights causes (the same paper, section 4.2). Scales of
weights are chosen so that sums do not saturate on processors without VNNI (`_weight_scales`).
"""

from __future__ import annotations

import copy
import logging
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from earlyexit_ssd.runtimes import OnnxRuntime

OPERATORS = ("Conv", "Add", "Mul", "Relu", "Clip", "HardSigmoid", "GlobalAveragePool", "MaxPool")
"""Operators that are quantised, besides HardSwish."""
BY_CHANNEL = ("Relu", "Clip", "HardSigmoid", "Mul", "GlobalAveragePool")  # operators that do not mix channels
CHANNEL_MULTIPLE = 16  # ONNX Runtime's depthwise kernels compute 16 channels at a time, the rest one by one
LEVELS = 255  # steps of an 8-bit number
LEAST_STEPS = 8  # smallest factor of a channel in equalisation, in steps of 1 / `LEVELS`
QUANTILE = 0.9999  # share of a photo's values that are below the upper end of a tensor's range
SAMPLED = 50_000  # about how many values of a photo's tensor these quantiles are of
LARGEST_PAIR = 127  # steps; with rounding at most 128, and 128 * 255 < 2**15
CLIPPED = 3.0  # HardSigmoid is constant below -3 and above 3


@dataclass
class Statistics:
    """Values of a tensor over all photos."""

    low: float  # the photo's quantile 1 - `QUANTILE`, the lowest of all photos
    high: float  # the photo's quantile `QUANTILE`, the highest of all photos
    largest: np.ndarray  # largest value of each channel [C]
    mean: np.ndarray  # mean of each channel [C]


def quantise(
    model: onnx.ModelProto, inputs: Sequence[Mapping[str, np.ndarray]], in_float: Callable[[onnx.NodeProto], bool]
) -> onnx.ModelProto:
    """Return the model in 8 bits, with pairs of QuantizeLinear and DequantizeLinear.

    Args:
        model: a float32 model. It is not changed.
        inputs: the model's inputs for some photos, name -> array. They give the ranges of the activations.
        in_float: whether a node stays in 32 bits.
    """
    network = Network(model)
    network.split_hard_swish()
    network.pad_channels()
    float_nodes = {node.name for node in network.nodes if node.op_type not in OPERATORS or in_float(node)}
    network.equalise(network.measure(inputs, {node.output[0] for node in network.convolutions()}), float_nodes)
    read_or_written = (
        name for node in network.nodes if node.op_type in OPERATORS for name in (*node.input, *node.output)
    )
    statistics = network.measure(inputs, {*read_or_written} - {*network.weights, ""})
    network.correct_biases(statistics, float_nodes)
    return _quantise_static(network, inputs[0], statistics, float_nodes)


class Network:
    """Nodes and weights of an ONNX model.

    Attributes:
        nodes: the nodes in the order of computation. All have names.
        weights: name -> array of all constants.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = copy.deepcopy(model)
        self.weights = {value.name: numpy_helper.to_array(value) for value in self._model.graph.initializer}
        self.nodes: list[onnx.NodeProto] = []
        self._factors: dict[str, tuple[str, str]] = {}  # tensor that only a HardSwish reads -> its factors, output
        outputs = {value.name for value in self._model.graph.output}
        for index, node in enumerate(self._model.graph.node):
            node.name = node.name or f"node_{index}"
            if node.output[0] in outputs:  # an initializer cannot be an output
                self.nodes.append(node)
            elif node.op_type == "Constant":
                self.weights[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
            elif node.op_type == "Identity" and node.input[0] in self.weights:  # the exporter's, for equal weights
                self.weights[node.output[0]] = self.weights[node.input[0]]
            else:
                self.nodes.append(node)
        for node in self.convolutions():  # none shares its weights with another
            for place, name in enumerate([*node.input][1:], 1):
                node.input[place] = f"{node.name}_{place}"
                self.weights[node.input[place]] = self.weights[name]

    def model(self, outputs: Sequence[str] = ()) -> onnx.ModelProto:
        """Return the network as a model, with additional ``outputs``."""
        model = copy.deepcopy(self._model)
        graph = model.graph
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(self.nodes)
        read = {name for node in self.nodes for name in node.input}
        graph.initializer.extend(
            numpy_helper.from_array(value, name) for name, value in self.weights.items() if name in read
        )
        present = {value.name for value in graph.output}
        # without a type, since some are int64
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs if name not in present)
        return model

    def readers(self) -> dict[str, list[onnx.NodeProto]]:
        """Return a dict: tensor -> the nodes that read it. An output of the model is also read by an empty node."""
        readers = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                readers[name].append(node)
        for value in self._model.graph.output:
            readers[value.name].append(onnx.NodeProto())
        return readers

    def convolutions(self) -> Iterator[onnx.NodeProto]:
        return (node for node in self.nodes if node.op_type == "Conv")

    def split_hard_swish(self) -> None:
        """Replace each HardSwish(x) by x * HardSigmoid(x * factors). The factors are 1 before `equalise`."""
        nodes, readers = [], self.readers()
        for node in self.nodes:
            if node.op_type != "HardSwish":
                nodes.append(node)
                continue
            (x,), (y,) = node.input, node.output
            factors, scaled, gate = (f"{y}_{suffix}" for suffix in ("factors", "scaled", "gate"))
            self.weights[factors] = np.ones((1, 1, 1, 1), np.float32)
            if len(readers[x]) == 1:
                self._factors[x] = factors, y
            nodes += [
                helper.make_node("Mul", [x, factors], [scaled], f"{node.name}/Scale"),
                helper.make_node("HardSigmoid", [scaled], [gate], f"{node.name}/HardSigmoid", alpha=1 / 6, beta=0.5),
                helper.make_node("Mul", [x, gate], [y], f"{node.name}/Mul"),
            ]
        self.nodes = nodes

    def pad_channels(self) -> None:
        """Pad the channels of depthwise convolutions with zeros, where all neighbours can be padded too."""
        extra: dict[str, int] = {}  # tensor -> number of channels that are added
        for node in self.convolutions():
            channels = len(self.weights[node.input[1]])
            if self._is_depthwise(node) and channels % CHANNEL_MULTIPLE:
                extra |= dict.fromkeys(self._same_channels(node.output[0]), -channels % CHANNEL_MULTIPLE)
        for node in self.convolutions():
            before, after = extra.get(node.input[0], 0), extra.get(node.output[0], 0)
            if self._is_depthwise(node):
                before = 0  # the weight has one input channel
                next(item for item in node.attribute if item.name == "group").i += after
            for name in node.input[1:]:
                value = self.weights[name]
                self.weights[name] = np.pad(value, [(0, after), (0, before), (0, 0), (0, 0)][: value.ndim])

    def _same_channels(self, tensor: str) -> set[str]:
        """Return the tensors whose channels are those of ``tensor``. Empty if one of them is an input or output of the
        model, or of a node that is neither a convolution nor in `BY_CHANNEL`."""
        readers = self.readers()
        writers = {name: node for node in self.nodes for name in node.output}
        tensors, waiting = set(), [tensor]
        while waiting:
            name = waiting.pop()
            if name in tensors:
                continue
            tensors.add(name)
            for node in (writers.get(name, onnx.NodeProto()), *readers[name]):
                if node.op_type in BY_CHANNEL or self._is_depthwise(node):
                    waiting += [value for value in (*node.input, *node.output) if value not in self.weights]
                elif node.op_type != "Conv" or _groups(node) > 1:
                    return set()
        return tensors

    def measure(self, inputs: Sequence[Mapping[str, np.ndarray]], names: set[str]) -> dict[str, Statistics]:
        """Return a dict: tensor [1, C, H, W] in ``names`` -> its statistics."""
        run = OnnxRuntime(self.model(sorted(names - {*inputs[0]})).SerializeToString(), "the model")
        rows = defaultdict(list)
        for photo in inputs:
            for name, value in {**run(photo), **photo}.items():
                if name in names and value.ndim == 4:
                    bounds = np.quantile(value.ravel()[:: 1 + value.size // SAMPLED], [1 - QUANTILE, QUANTILE])
                    rows[name].append([*bounds, value.max((0, 2, 3)), value.mean((0, 2, 3))])
        statistics = {}
        for name, values in rows.items():
            low, high, largest, mean = zip(*values, strict=True)
            statistics[name] = Statistics(min(low), max(high), np.max(largest, 0), np.mean(mean, 0))
        return statistics

    def equalise(self, statistics: Mapping[str, Statistics], float_nodes: set[str]) -> None:
        """Give the channels of tensors between convolutions similar ranges.

        A convolution's output x before Relu or HardSwish is divided by a factor per channel. The convolutions that read
        the result are multiplied by it. The factors are multiples of 1 / `LEVELS`, so they are exact in 8 bits. The
        outputs of convolutions and activations in ``float_nodes`` are not divided.
        """
        readers = self.readers()
        for node in self.convolutions():
            (x,), following = node.output, readers[node.output[0]]
            factors_name, y = self._factors.get(x, (None, ""))  # HardSwish
            if [reader.op_type for reader in following] == ["Relu"]:
                y = following[0].output[0]
            convolutions = self._multiplied_with(y, readers)
            if not convolutions or float_nodes & {node.name, *(reader.name for reader in following)}:
                continue
            largest = statistics[x].largest.clip(CLIPPED / 2 if factors_name else 1e-6)
            if not all(map(self._is_depthwise, convolutions)):
                largest = np.sqrt(largest)  # half of the differences go to the weights
            factors = np.round(largest / largest.max() * LEVELS).clip(LEAST_STEPS).astype(np.float32) / LEVELS
            for name in node.input[1:]:
                self.weights[name] = (self.weights[name].T / factors).T
            for reader in convolutions:
                shape = (-1, 1, 1, 1) if self._is_depthwise(reader) else (1, -1, 1, 1)
                self.weights[reader.input[1]] = self.weights[reader.input[1]] * factors.reshape(shape)
            if factors_name:
                self.weights[factors_name] = factors.reshape(1, -1, 1, 1)

    def zero_below(self) -> dict[str, float]:
        """Return a dict: tensor that only a HardSwish reads -> value below which the result is 0 in all channels."""
        return {x: float((-CLIPPED / self.weights[factors]).min()) for x, (factors, _) in self._factors.items()}

    def _multiplied_with(self, tensor: str, readers: Mapping[str, Sequence[onnx.NodeProto]]) -> list[onnx.NodeProto]:
        """Return the convolutions that read multiples of ``tensor``. Empty if another node reads them."""
        gates = {node.output[0] for node in self.nodes if node.op_type == "HardSigmoid"}
        tensors, convolutions = [tensor], []
        for name in tensors:
            for node in readers[name]:
                if node.op_type == "Conv" and (_groups(node) == 1 or self._is_depthwise(node)):
                    convolutions.append(node)
                elif node.op_type == "GlobalAveragePool" or (node.op_type == "Mul" and gates & {*node.input}):
                    tensors.append(node.output[0])
                else:
                    return []
        return convolutions

    def _is_depthwise(self, node: onnx.NodeProto) -> bool:
        return node.op_type == "Conv" and 1 < _groups(node) == len(self.weights[node.input[1]])

    def correct_biases(self, statistics: Mapping[str, Statistics], float_nodes: set[str]) -> None:
        """Subtract from each bias the mean error that rounding the weights causes."""
        for node in self.convolutions():
            if node.name in float_nodes or len(node.input) < 3 or not (_groups(node) == 1 or self._is_depthwise(node)):
                continue
            weight = self.weights[node.input[1]]
            error = (_rounded(weight) - weight).sum((2, 3))
            mean = statistics[node.input[0]].mean
            error = error[:, 0] * mean if self._is_depthwise(node) else error @ mean
            self.weights[node.input[2]] = (self.weights[node.input[2]] - error).astype(np.float32)


def _groups(convolution: onnx.NodeProto) -> int:
    return next((item.i for item in convolution.attribute if item.name == "group"), 1)


def _weight_scales(weight: np.ndarray) -> np.ndarray:
    """Return the scales [O] of a weight [O, I, H, W] in int8, symmetric.

    Without VNNI, matrix kernels on x86 add the products of two neighbouring weights and activations in 16 bits. So
    that this sum does not saturate, two neighbours are at most `LARGEST_PAIR` together. Then processors compute the
    same. The kernels of depthwise convolutions (I = 1) have no such sums.
    """
    if weight.shape[1] == 1:
        return np.abs(weight).max((1, 2, 3)).clip(1e-12) / 127
    rows = weight.transpose(0, 2, 3, 1).reshape(len(weight), -1)  # the kernels' order: channels last
    rows = np.pad(rows, [(0, 0), (0, rows.shape[1] % 2)])
    pairs = np.abs(rows[:, ::2] + rows[:, 1::2]).max(1) / LARGEST_PAIR
    return np.maximum(np.abs(rows).max(1) / 127, pairs).clip(1e-12)


def _rounded(weight: np.ndarray) -> np.ndarray:
    """Return a weight [O, I, H, W] rounded to the values of int8."""
    scales = _weight_scales(weight).reshape(-1, 1, 1, 1)
    return np.round(weight / scales) * scales


def _quantise_static(
    network: Network, photo: Mapping[str, np.ndarray], statistics: Mapping[str, Statistics], float_nodes: set[str]
) -> onnx.ModelProto:
    """Return the network in 8 bits, by ONNX Runtime's quantiser, with the ranges of ``statistics``."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class OnePhoto(CalibrationDataReader):  # its ranges are not used
        photos = iter([photo])

        def get_next(self) -> Mapping[str, np.ndarray] | None:
            return next(self.photos, None)

    readers, identities = network.readers(), []
    overrides = {name: _scale(values.low, values.high) for name, values in statistics.items()}
    for name, least in network.zero_below().items():
        overrides[name] = _scale(max(statistics[name].low, least), statistics[name].high)
    for node in network.nodes:
        if node.op_type == "HardSigmoid" and node.name not in float_nodes and len(readers[node.input[0]]) == 1:
            attributes = {item.name: item.f for item in node.attribute}
            alpha, beta = attributes.get("alpha", 0.2), attributes.get("beta", 0.5)
            # 8 bits span the inputs between which HardSigmoid rises, so input and output are the same integers
            overrides |= {node.input[0]: _scale(-beta / alpha, (1 - beta) / alpha), node.output[0]: _scale(0, 1)}
            identities.append(node.name)
    for node in network.convolutions():
        if node.name not in float_nodes:
            overrides[node.input[1]] = [
                {"axis": 0, "scale": np.array(scale, np.float32), "zero_point": np.array(0, np.int8)}
                for scale in _weight_scales(network.weights[node.input[1]])
            ]
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder, "float32.onnx"), Path(folder, "int8.onnx")
        onnx.save(network.model(), paths[0])
        disabled = logging.root.manager.disable
        logging.disable(max(disabled, logging.WARNING))  # advice to fuse BatchNorm, which is fused already
        try:
            quantize_static(
                *paths,
                OnePhoto(),
                QuantFormat.QDQ,
                op_types_to_quantize=list(OPERATORS),
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=sorted(float_nodes),
                extra_options={"TensorQuantOverrides": overrides},
            )
        finally:
            logging.disable(disabled)
        return _remove_identities(identities, onnx.load(paths[1]))


def _scale(low: float, high: float) -> list[dict[str, np.ndarray]]:
    """Return the override of a tensor's scale and zero point that makes its range [low, high], with 0 in it."""
    low, high = min(low, 0.0), max(high, 1e-6)
    scale = (high - low) / LEVELS
    return [{"scale": np.array(scale, np.float32), "zero_point": np.array(round(-low / scale), np.uint8)}]


def _remove_identities(identities: Sequence[str], model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove nodes that do not change the integers, given their names, with the conversions before and after them."""
    nodes = list(model.graph.node)
    writers = {name: node for node in nodes for name in node.output}
    removed, same = set(), {}  # names of nodes; integers after -> integers before
    for node in nodes:
        before = writers.get(node.input[0]) if node.op_type == "QuantizeLinear" else None
        if before is not None and before.name in identities:
            dequantize = writers[before.input[0]]
            removed |= {node.name, before.name, dequantize.name}
            same[node.output[0]] = dequantize.input[0]
    for node in nodes:
        node.input[:] = [same.get(name, name) for name in node.input]
    del model.graph.node[:]
    model.graph.node.extend(node for node in nodes if node.name not in removed)
    return model
