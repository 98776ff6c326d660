#!/usr/bin/env python
"""Quantise an exported detector to 8 bits, and say what is left of its AP; `earlyexit benchmark` times it.

Every segment is quantised on its own by ONNX Runtime: static ranges from calibration photos, weights per channel, on a
graph of QuantizeLinear and DequantizeLinear. The full path alone, without exits, says what 8 bits bring.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from earlyexit_ssd.command_line import run_tool
from earlyexit_ssd.data.dataset import as_tensor
from earlyexit_ssd.deploy import Predictor
from earlyexit_ssd.files import writing
from earlyexit_ssd.images import read_image
from earlyexit_ssd.modeling.detector import EarlyExitDetector
from earlyexit_ssd.pipeline.export import WRITERS, _contract, _metadata, _Parts, _segments, open_any
from earlyexit_ssd.progress import progress

EXAMPLES = """
examples:
  %(prog)s checkpoint.pth --out int8.onnx --photos train2017 --activations QUInt8
      write the full path in 8 bits; ranges from 100 of the photos
  %(prog)s checkpoint.pth --out int8.onnx --photos train2017 --float head --ap val2017 instances_val2017.json
      the heads stay in fp32; AP of the written file
"""
KINDS = ["Conv", "Add", "Mul", "Relu", "HardSwish", "HardSigmoid", "GlobalAveragePool", "Clip"]
"""Operators that are quantised; reshaping and joining the heads' outputs is left in fp32."""


class Inputs(CalibrationDataReader):
    """What the full path gets for each photo."""

    def __init__(self, model: EarlyExitDetector, photos: Sequence[Path]) -> None:
        self._values = self._prepared(model, progress(photos, desc="ranges"))

    @staticmethod
    def _prepared(model: EarlyExitDetector, photos: Sequence[Path]) -> Iterator[dict[str, np.ndarray]]:
        for photo in photos:
            yield {"x_in": model.transform([as_tensor(read_image(photo))])[0].tensors.numpy()}

    def get_next(self) -> dict[str, np.ndarray] | None:
        """ONNX Runtime's interface."""
        return next(self._values, None)


def quantised(model: EarlyExitDetector, photos: Sequence[Path], activations: str, in_float: Sequence[str]) -> _Parts:
    """The full path in 8 bits, to be written by a writer of `earlyexit_ssd.pipeline.export`.

    Args:
        activations: QUInt8 or QInt8; weights are QInt8, per channel.
        in_float: parts of names of operators that stay in fp32, such as ``head`` or ``fc`` (squeeze-excitation).
    """
    ((float_network, segment),) = _segments(model)
    left = [node.name for node in segment.model.graph.node if any(part in node.name for part in in_float)]
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(segment.model, source)
        quantize_static(
            source,
            target,
            Inputs(model, photos),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=KINDS,
            per_channel=True,
            activation_type=QuantType[activations],
            weight_type=QuantType.QInt8,
            nodes_to_exclude=left,
        )
        network = onnx.load(target)
    segment = dataclasses.replace(segment, model=network)
    contract = _contract(model)
    return _Parts([(float_network, segment)], contract, _metadata(model, contract))


def average_precision(predictor: Predictor, folder: Path, annotations: str) -> tuple[float, float]:
    """AP and AP50 of COCO over the detector's classes, on all photos of the annotations."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(annotations)
    ids = {row["name"]: row["id"] for row in truth.loadCats(truth.getCatIds())}
    found = []
    for image in progress(truth.loadImgs(truth.getImgIds()), desc="AP"):
        answer = predictor(read_image(folder / image["file_name"]))
        for name, score, box in zip(answer.class_names, answer.scores, answer.boxes, strict=True):
            if name in ids:
                corner, sides = box[:2], box[2:] - box[:2]
                row = {"image_id": image["id"], "category_id": ids[name], "score": float(score)}
                found.append({**row, "bbox": [*map(float, (*corner, *sides))]})
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
        evaluation.params.catIds = [ids[name] for name in predictor.classes if name in ids]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0]), float(evaluation.stats[1])


def job(args: argparse.Namespace) -> None:
    """Write, and evaluate what was asked for."""
    file_format = "openvino" if args.out.endswith(".xml") else "onnx"
    model = open_any(args.model, router=False).eval()
    if args.activations != "float":
        photos = sorted(path for path in Path(args.photos).iterdir() if path.suffix == ".jpg")
        chosen = np.random.default_rng(0).permutation(len(photos))[: args.count]
        with torch.no_grad():
            parts = quantised(model, [photos[place] for place in chosen], args.activations, args.float)
        with writing(args.out):
            WRITERS[file_format](parts, Path(args.out))
    figures = {"file": args.out, "activations": args.activations, "float": args.float}
    if args.ap:
        predictor = Predictor(args.out, "openvino" if file_format == "openvino" else "onnxruntime")
        figures["AP"], figures["AP50"] = average_precision(predictor, Path(args.ap[0]), args.ap[1])
    print(json.dumps(figures))


def main(arguments: Sequence[str] | None = None) -> int:
    """The script; the exit code as the tools have it."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="model.pth, checkpoint or shipped weights; its full path is taken")
    parser.add_argument("--out", required=True, help="file to write (.onnx, .xml)")
    parser.add_argument("--photos", help="folder that the ranges come from")
    parser.add_argument("--count", type=int, default=100, help="photos for the ranges; 100")
    parser.add_argument(
        "--activations", choices=["QUInt8", "QInt8", "float"], default="QUInt8", help="QUInt8; float writes nothing"
    )
    parser.add_argument("--float", nargs="+", default=[], metavar="PART", help="parts of names that stay in fp32")
    parser.add_argument("--ap", nargs=2, metavar=("PHOTOS", "JSON"), help="folder and COCO annotations")
    args = parser.parse_args(arguments)
    return run_tool(lambda: job(args))


if __name__ == "__main__":
    sys.exit(main())
