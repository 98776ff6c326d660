"""What each step of the quantisation for ONNX Runtime gives: time of the network, and error of its scores.

Example:
    python benchmarks/quantisation_steps.py model.pth --photos frames --test-photos more_frames
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from earlyexit_ssd.console import progress, run_tool
from earlyexit_ssd.data.dataset import as_tensor
from earlyexit_ssd.deploy.benchmark import ratio
from earlyexit_ssd.images import read_image
from earlyexit_ssd.modeling.trunk import evaluating
from earlyexit_ssd.pipeline import export, quantize
from earlyexit_ssd.pipeline.int8 import FloatLayers, _by_nncf, _by_onnx_runtime
from earlyexit_ssd.pipeline.quantize import Network
from earlyexit_ssd.runtimes import OnnxRuntime

LEAST = 0.02  # least score in 32 or 8 bits of the default boxes that count
FIRST = FloatLayers(3, False)
Inputs = list[dict[str, np.ndarray]]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model.pth of a run, or a checkpoint of torchvision; its full path is quantised")
    parser.add_argument("--photos", required=True, type=Path, help="folder; 64 photos give the ranges")
    parser.add_argument("--test-photos", required=True, type=Path, help="folder; 50 photos give time and error")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    model = export.exportable(export.open_any(args.model, router=False))
    with evaluating(model):
        (segment,) = export.build_segments(model)
        inputs, tests = (
            [{"x_in": model.transform([as_tensor(read_image(path))])[0].tensors.numpy()} for path in sample(*which)]
            for which in ((args.photos, 64), (args.test_photos, 50))
        )
    ours = partial(_by_onnx_runtime, segment.model, inputs)
    rows: dict[str, Callable[[], onnx.ModelProto]] = {
        "ONNX Runtime's quantiser alone": partial(alone, segment.model, inputs),
        "NNCF": partial(_by_nncf(), segment.model, inputs, FloatLayers(0, False)),
        "all steps": partial(ours, FloatLayers(0, False)),
        "all steps, first three convolutions in 32 bits": partial(ours, FIRST),
        "the same without padded channels": partial(without, "pad_channels", ours),
        "the same without equal ranges": partial(without, "equalise", ours),
        "the same without corrected biases": partial(without, "correct_biases", ours),
        "the same without the limit of pairs of weights": partial(saturating, ours),
        "the same, heads in 32 bits too": partial(ours, FloatLayers(3, True)),
    }
    floats = OnnxRuntime(segment.model.SerializeToString(), "32 bits")
    print(f"{len(inputs)} photos for the ranges, {len(tests)} for time and error, one thread, ONNX Runtime\n")
    print("| quantisation | times as fast as in 32 bits | error of the scores' logits |\n|---|---|---|")
    for name, quantised in rows.items():
        run = OnnxRuntime(quantised().SerializeToString(), name)
        times, errors = [], []
        for photo in progress(tests, desc=name):
            expected, found = (timed(each, photo, times) for each in (floats, run))
            before, after = (object_logits(outputs["cls_logits"]) for outputs in (expected, found))
            errors.append((before - after)[np.maximum(before, after) > np.log(LEAST / (1 - LEAST))])
        error = np.sqrt((np.concatenate(errors) ** 2).mean())
        columns = np.array(times).reshape(1, -1, 2)
        print(f"| {name} | {ratio(columns[..., 0], columns[..., 1])} | {error:.3f} |", flush=True)


def sample(folder: Path, count: int) -> list[Path]:
    photos = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    return [photos[index] for index in np.random.default_rng(0).permutation(len(photos))[:count]]


def timed(run: OnnxRuntime, photo: dict[str, np.ndarray], times: list[float]) -> dict[str, np.ndarray]:
    """Run once untimed, then timed, and add the milliseconds."""
    run(photo)
    start = time.perf_counter()
    outputs = run(photo)
    times.append(1000 * (time.perf_counter() - start))
    return outputs


def object_logits(cls_logits: np.ndarray) -> np.ndarray:
    """Return log(p / (1 - p)) of the highest object probability p at each default box."""
    shifted = np.exp(cls_logits - cls_logits.max(-1, keepdims=True))
    probability = (shifted[..., 1:].max(-1) / shifted.sum(-1)).clip(1e-4, 1 - 1e-4)
    return np.log(probability / (1 - probability))


def alone(model: onnx.ModelProto, inputs: Inputs) -> onnx.ModelProto:
    class Photos(CalibrationDataReader):
        photos = iter(inputs)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.photos, None)

    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True}
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{name}.onnx") for name in ("float32", "prepared", "int8")]
        onnx.save(model, paths[0])
        quant_pre_process(*paths[:2], skip_symbolic_shape=True)
        quantize_static(*paths[1:], Photos(), **types)
        return onnx.load(paths[2])


def without(step: str, ours: Callable[[FloatLayers], onnx.ModelProto]) -> onnx.ModelProto:
    with mock.patch.object(Network, step, lambda *_: None):
        return ours(FIRST)


def saturating(ours: Callable[[FloatLayers], onnx.ModelProto]) -> onnx.ModelProto:
    with mock.patch.object(quantize, "LARGEST_PAIR", 254):
        return ours(FIRST)


if __name__ == "__main__":
    arguments = parse_args()
    raise SystemExit(run_tool(lambda: main(arguments)))
