"""Export a routed detector for use without PyTorch. The file is compared with the model before it is kept."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.ops import box_iou, clip_boxes_to_image

from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.console import progress
from earlyexit_ssd.data.dataset import as_tensor
from earlyexit_ssd.data.shapes import render_scene
from earlyexit_ssd.deploy import Detections, Predictor, graph
from earlyexit_ssd.deploy.predictor import FORMAT, MANIFEST
from earlyexit_ssd.errors import DataError, EarlyExitError, import_package, one_line
from earlyexit_ssd.files import make_folder, write_json, writing
from earlyexit_ssd.images import read_image
from earlyexit_ssd.modeling import EarlyExitSSDLite
from earlyexit_ssd.modeling.checkpoint import weights_path
from earlyexit_ssd.modeling.detector import DETECTORS, EarlyExitDetector, default_boxes_of_image, walk
from earlyexit_ssd.modeling.pretrained import current_certificate
from earlyexit_ssd.modeling.retrofit import read_weights
from earlyexit_ssd.modeling.trunk import evaluating
from earlyexit_ssd.modeling.validate import LEAST_SCORE
from earlyexit_ssd.runtimes import OnnxRuntime

logger = logging.getLogger(__name__)

Format = Literal["onnx", "staged", "openvino"]
SUFFIXES = {"onnx": ".onnx", "staged": "", "openvino": ".xml"}  # the files of format staged are in a folder
RENDERED_PHOTOS = 8  # number of photos to compare on, if none are given
EXPORT_PHOTOS = 16  # number of calibration photos to compare on, where a job has them
HEAD_PHOTOS = 4  # number of photos on which the outputs of every head are compared
MAX_HEAD_DIFFERENCE = 1e-4
"""Largest difference between a head's output and the model's; multiplied by the largest output if that is above 1."""
MAX_BOX_DIFFERENCE_PX = 0.1
MAX_SCORE_DIFFERENCE = 1e-3
NEAR_THRESHOLD = 1e-5  # rounding may move a confidence this close to its threshold to the other side
NEAR_LIMIT = 1e-4  # rounding may move a score or an IoU this close to its limit to the other side


@dataclass(frozen=True)
class Exported:
    """What was written, and the result of the comparison with the model."""

    path: Path  # the file, or the folder of staged files
    size: int  # bytes of all files
    photos: int  # number of photos on which file and model were compared
    detections: int  # number of the model's detections in these photos
    borderline: int  # number of photos with another exit or other detections because of rounding

    def __str__(self) -> str:
        same = f"exits and {self.detections} detections in {self.photos} photos are the model's"
        rounding = f"; in {self.borderline} photos rounding changed a decision" if self.borderline else ""
        return f"{self.path}: {self.size / 1e6:.1f} MB; {same}{rounding}"


def open_any(name_or_path: str | os.PathLike[str], router: bool = True) -> EarlyExitDetector:
    """Open shipped weights or a model file of any registered detector. Without ``router`` the model has no routing.
    Raise the errors of :meth:`EarlyExitSSDLite.from_pretrained`."""
    architecture = read_weights(weights_path(name_or_path)).get("architecture")
    name = architecture.get("detector") if isinstance(architecture, dict) else None
    detector = DETECTORS.get(name, EarlyExitSSDLite) if isinstance(name, str) else EarlyExitSSDLite
    return detector.from_pretrained(name_or_path, router=router)


def export_detector(
    model: EarlyExitDetector,
    path: str | os.PathLike[str],
    file_format: Format = "onnx",
    photos: Sequence[str | os.PathLike[str]] = (),
) -> Exported:
    """Write a detector that runs without PyTorch, with the routing of ``model.router``. `Predictor` runs the file.

    Closed exits are left out. Without a router the file has the full path only. Before the file is put in place, it is
    run on photos. If its exits, detections or heads differ from the model's by more than rounding, nothing is written.

    Args:
        model: the detector, which is not changed.
        path: path of the file, ending in .onnx or .xml (OpenVINO, with the weights in a .bin file beside it), or a
            folder for staged files.
        file_format: ``onnx``, ``staged`` (a file for each segment) or ``openvino``.
        photos: paths of photos to compare on; empty: `RENDERED_PHOTOS` are rendered.

    Raises:
        EarlyExitError: a hybrid router, a path that does not fit the format, an unreadable photo, or a result of the
            file that differs from the model's.
    """
    path = exportable_path(path, file_format)
    model = exportable(model)
    with evaluating(model), replacing(path) as new_path:
        segments, count = build_segments(model), len(photos) or RENDERED_PHOTOS
        _compare_heads(model, segments, islice(_photos(photos), HEAD_PHOTOS))
        write_segments(model, segments, new_path, file_format)
        compared = progress(_photos(photos), desc="compare with the model", total=count)
        detections, borderline = _compare(model, Predictor(new_path, runtime_of(file_format)), compared)
    return Exported(path, size_of(path), count, detections, borderline)


def exportable_path(path: str | os.PathLike[str], file_format: Format) -> Path:
    """Return the path. Raise EarlyExitError if no file or folder of this format can be written there."""
    path = Path(path)
    if file_format not in SUFFIXES:
        raise EarlyExitError(f"format {file_format!r:.60}: expected one of {', '.join(SUFFIXES)}")
    if path.suffix != SUFFIXES[file_format] and file_format != "staged":
        fix = "rename it, or choose another --format"
        raise EarlyExitError(f"{path}: a file of format {file_format} ends in {SUFFIXES[file_format]}; {fix}")
    if path.exists() and path.is_dir() != (file_format == "staged"):
        present = "a folder" if path.is_dir() else "a file"
        raise EarlyExitError(f"{path}: there is {present} of that name; choose another name")
    return path


def exportable(model: EarlyExitDetector) -> EarlyExitDetector:
    """Return a copy of the model on the CPU, without exits if it has no router. Raise EarlyExitError for a hybrid
    router."""
    if getattr(model.router, "hybrid", False):
        raise EarlyExitError(
            "a hybrid router cannot be exported, since all its photos run the whole trunk; calibrate and export with "
            "ROUTING.HYBRID false"
        )
    model = copy.deepcopy(model).cpu().eval()
    if model.router is not None:
        return model
    # without a router no photo leaves at an exit
    return type(model)(model, exits=(), classes=model.classes).eval()


def runtime_of(file_format: Format) -> str:
    """Return the runtime for files of a format."""
    return "openvino" if file_format == "openvino" else "onnxruntime"


def size_of(path: Path) -> int:
    """Return the bytes of an exported file with its weights, or of a folder of staged files."""
    files = [*path.iterdir()] if path.is_dir() else [path, *_weights_beside(path)]
    return sum(file.stat().st_size for file in files)


def _weights_beside(path: Path) -> list[Path]:
    return [path.with_suffix(".bin")] if path.suffix == ".xml" else []


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path. At the end, the file or folder written there replaces ``path``. A folder is replaced only
    if it is empty or holds an earlier export."""
    make_folder(path.parent)
    with tempfile.TemporaryDirectory(prefix=f".{path.name[:40]}.", dir=path.parent) as temporary, writing(path):
        new_path = Path(temporary) / path.name
        yield new_path
        if new_path.is_dir() and path.exists():
            if any(path.iterdir()) and not (path / MANIFEST).is_file():
                raise EarlyExitError(f"{path}: holds other files; choose a new folder for the staged files")
            os.replace(path, new_path.parent / "before")
        for weights in _weights_beside(path):
            os.replace(new_path.with_suffix(".bin"), weights)
        os.replace(new_path, path)


# The parts of a file: segments by PyTorch's exporter, settings of pre- and post-processing, and metadata.


class SegmentNetwork(nn.Module):
    """The layers from exit ``before`` (None: from the images) to exit ``index``, or a glance.

    Args:
        model: the detector with its router.
        inputs: names of the input tensors, from `graph.STATE`.
        head: whether the outputs of the exit's head are outputs of the segment.
        onward: whether an early exit follows. Its branch may read the context (see modeling/detector.py), so the
            context is then an output.
    """

    def __init__(
        self, model: EarlyExitDetector, before: int | None, index: int, inputs: Sequence[str], head: bool, onward: bool
    ) -> None:
        super().__init__()
        self.model, self.before, self.index = model, before, index
        self.inputs, self.head, self.onward = inputs, head, onward
        self.eval()  # the exporter sets the model's train or eval mode to that of this module

    def run(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of `graph.STATE` at this exit, the outputs of its head and its confidence [N]. ``state``
        has the tensors at the exit before."""
        model = self.model
        first = 0 if self.before is None else self.before + 1
        x, is_glance = state["x"], self.index < model.num_glances
        copies = [x] * model.num_glances  # at a glance x is the small copy of the image
        exits = walk(model, x, copies, first=first, finest=state.get("finest"), context=state.get("context"))
        at = next(each for each in exits if each.index == self.index)
        head = at.head()
        outputs: dict[str, Tensor | None] = {}
        if not at.full and not is_glance:
            outputs |= {"x": at.x, "finest": at.finest, "context": at.context if self.onward else None}
        if self.head:
            outputs |= head
        if model.router is not None:
            outputs[graph.CONFIDENCE] = model.router.confidence(at.signals(head), at.index)
        return {name: value for name, value in outputs.items() if value is not None}

    def forward(self, *state: Tensor) -> tuple[Tensor, ...]:
        """Run with a sequence of tensors, for the exporter."""
        return tuple(self.run(dict(zip(self.inputs, state, strict=True))).values())


def build_segments(model: EarlyExitDetector) -> list[graph.Segment]:
    """Return a segment for each open exit and one for the full path. ``model`` is a result of `exportable`, in eval
    mode and without gradients."""
    full = model.num_early_exits
    stops = [*(index for index in range(full) if model.router is not None and model.router.needs(index)), full]
    image = {"x": torch.zeros(1, 3, *model.transform.fixed_size[::-1])}
    state, segments, head_needed = {}, [], False
    for before, index in zip([None, *stops], stops, strict=False):
        name, empty = model.exit_names[index], index < full and model.empty[index]
        head_needed |= not empty  # also at an empty exit behind a branch: both sides of an If need the same outputs
        onward = any(index < later < full for later in stops)
        pixels = model.exits[index].pixels if index < full else None
        of_photo = not state  # the first segment, a glance, and the first segment behind a glance
        if of_photo:
            state = image if pixels is None else {"x": torch.zeros(1, 3, pixels, pixels)}
        network = SegmentNetwork(model, before, index, tuple(state), head_needed, onward)
        outputs = network.run(state)
        exported = _to_onnx(network, state, list(outputs), name)
        segments.append(graph.Segment(index, name, empty, exported, index == full, of_photo, pixels))
        state = {name: outputs[name] for name in graph.STATE if name in outputs}
    return segments


def photo_inputs(model: EarlyExitDetector, segment: graph.Segment, photo: np.ndarray) -> dict[str, np.ndarray]:
    """Return the inputs of a segment whose input is the photo, uint8 [H, W, 3]."""
    image = [as_tensor(photo)]
    is_glance = segment.pixels is not None
    x = model.small_copies(image)[segment.index] if is_glance else model.transform(image)[0].tensors
    return {"x_in": x.numpy()}


def _to_onnx(network: nn.Module, inputs: dict[str, Tensor], outputs: list[str], name: str) -> onnx.ModelProto:
    """Export a network with PyTorch's exporter on TorchScript. ``name`` is the exit's name for errors."""
    content = io.BytesIO()
    names = {"input_names": [f"{key}_in" for key in inputs], "output_names": outputs, "opset_version": graph.OPSET}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns of fixed shapes, and of its own deprecation
        try:
            torch.onnx.export(network, tuple(inputs.values()), content, **names, dynamo=False)
        except Exception as error:
            raise EarlyExitError(f"{name} cannot be exported to ONNX ({one_line(str(error))[:200]})") from error
    exported = onnx.load_from_string(content.getvalue())
    graph.expand_log_sum_exp(exported)
    return exported


def _settings(model: EarlyExitDetector) -> graph.Settings:
    width, height = model.transform.fixed_size
    thresholds = [] if model.router is None else model.router.thresholds.tolist()
    return graph.Settings(
        size=(height, width),
        mean=model.transform.image_mean,
        std=model.transform.image_std,
        anchors=default_boxes_of_image(model, torch.device("cpu")).numpy(),
        box_weights=model.box_coder.weights,
        thresholds=np.array(thresholds, np.float32),
        score_thresh=np.array(_score_thresholds(model), np.float32),
        nms_thresh=model.nms_thresh,
        topk_candidates=model.topk_candidates,
        detections_per_img=model.detections_per_img,
    )


def _score_thresholds(model: EarlyExitDetector) -> list[float]:
    """Return the score threshold of each class."""
    limit = model.score_thresh
    return [limit.get(name, LEAST_SCORE) if isinstance(limit, Mapping) else limit for name in model.classes]


def _metadata(model: EarlyExitDetector, settings: graph.Settings) -> dict[str, str]:
    """Return the metadata that a `Predictor` reads: key -> text, in JSON except the value of ``format``."""
    names = ("earlyexit_ssd", "torch", "torchvision", "onnx", "onnxruntime")
    certificate = current_certificate(model.router)
    values = {
        "classes": model.classes,
        "exit_names": model.exit_names,
        "thresholds": [None if value >= CLOSED else value for value in settings.thresholds.tolist()],
        "score_thresh": settings.score_thresh.tolist(),
        "certificate": certificate and certificate.to_dict(),
        "input": {
            "image": "uint8 [height, width, 3], RGB, any size; it is resized and normalised inside",
            "network_size": settings.size,
        },
        "versions": {name: version(name) for name in names},
    }
    return {"format": FORMAT, **{key: json.dumps(value) for key, value in values.items()}}


def write_segments(
    model: EarlyExitDetector, segments: Sequence[graph.Segment], path: Path, file_format: Format
) -> None:
    """Write the segments of ``model`` to a new file, or to a new folder for the format ``staged``."""
    settings = _settings(model)
    metadata = _metadata(model, settings)
    if file_format == "onnx":
        path.write_bytes(graph.build_graph(segments, settings, metadata).SerializeToString())
    elif file_format == "staged":
        path.mkdir()
        stages = {f"{position}_{segment.name}.onnx": segment for position, segment in enumerate(segments)}
        networks = [
            graph.stage_of_photo(segment, settings) if segment.of_photo else segment.model for segment in segments
        ]
        networks.append(graph.last_stage(settings))
        for name, network in zip((*stages, "detections.onnx"), networks, strict=True):
            (path / name).write_bytes(network.SerializeToString())
        rows = [{"file": name, "exit_index": part.index, "empty": part.empty} for name, part in stages.items()]
        write_json(path / MANIFEST, {"metadata": metadata, "segments": rows, "detections": "detections.onnx"})
    else:
        openvino = import_package("openvino")
        network = graph.build_graph(segments, dataclasses.replace(settings, openvino=True), metadata)
        try:
            converted = openvino.Core().read_model(network.SerializeToString())
            openvino.save_model(converted, path, compress_to_fp16=False)
        except Exception as error:
            raise EarlyExitError(f"OpenVINO cannot convert the detector ({one_line(str(error))[:200]})") from None


# Comparison with the model.


def _photos(paths: Sequence[str | os.PathLike[str]]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and pixels of the photos to compare on, one at a time, because all of them may not fit in memory.
    Unreadable photos are left out with a warning. Raise a DataError if no photo is left."""
    read = 0
    for path in paths:
        try:
            photo = read_image(path)
        except DataError as error:
            logger.warning("--photos: left out: %s", error)
            continue
        read += 1
        yield str(path), photo
    if paths and not read:
        raise DataError(f"--photos: none of the {len(paths)} photos can be read")
    for seed in range(0 if paths else RENDERED_PHOTOS):
        yield f"rendered photo {seed}", np.array(render_scene(np.random.default_rng(seed), 320)[0])


def _compare_heads(
    model: EarlyExitDetector, segments: Sequence[graph.Segment], photos: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Run the segments one after another. Raise EarlyExitError if their head outputs differ from the model's."""
    runs = [(segment, OnnxRuntime(segment.model.SerializeToString(), segment.name)) for segment in segments]
    for name, photo in photos:
        heads = model.exit_outputs([as_tensor(photo)]).heads
        outputs: dict[str, np.ndarray] = {}
        for segment, run in runs:
            outputs = run(photo_inputs(model, segment, photo) if segment.of_photo else graph.next_inputs(outputs))
            for key in (key for key in graph.HEAD if key in outputs):
                expected = heads[segment.index][key].numpy()
                difference = np.abs(outputs[key] - expected).max()
                if not difference <= MAX_HEAD_DIFFERENCE * max(1.0, np.abs(expected).max()):  # also true for NaN
                    raise EarlyExitError(
                        f"{name}: {key} of {segment.name} differ by {difference:.2g} from the model's, expected "
                        f"{MAX_HEAD_DIFFERENCE:g}; nothing was written"
                    )


def _compare(
    model: EarlyExitDetector, predictor: Predictor, photos: Iterable[tuple[str, np.ndarray]]
) -> tuple[int, int]:
    """Compare the file with the model. Return the numbers of the model's detections, and of photos that differ only by
    rounding."""
    detections = borderline = 0
    for name, photo in photos:
        (expected,) = model([as_tensor(photo)])
        detections += len(expected["boxes"])
        try:
            borderline += not _is_same(model, photo, expected, predictor(photo))
        except EarlyExitError as error:
            raise EarlyExitError(f"{name}: {error}; nothing was written") from None
    return detections, borderline


def _is_same(model: EarlyExitDetector, photo: np.ndarray, expected: dict[str, Tensor], found: Detections) -> bool:
    """Return whether exit and detections of the file (``found``) are the model's (``expected``); False if they differ
    and rounding explains the difference. Raise EarlyExitError for any other difference."""
    index = int(expected.get("exit_index", model.num_early_exits))
    if index != found.exit_index:
        left = min(index, found.exit_index)  # one of the two left here, the other did not
        confidence = float(model.router.confidence(model.exit_outputs([as_tensor(photo)]).signals(left), left))
        threshold = float(model.router.thresholds[left])
        if abs(confidence - threshold) <= NEAR_THRESHOLD:
            return False
        raise EarlyExitError(
            f"the file leaves at {found.exit_name}, the model at {model.exit_names[index]} (confidence "
            f"{confidence:.6f} at {model.exit_names[left]}, threshold {threshold:.6f})"
        )
    of_model = [expected[key].numpy() for key in ("boxes", "labels", "scores")]
    of_file = [found.boxes, found.labels, found.scores]
    unpaired = _unpaired(of_model, of_file)
    if not len(unpaired[0]):
        return True
    unexplained = np.flatnonzero(~_explained(model, photo, index, of_model, of_file, unpaired))
    if not len(unexplained):
        return False
    box, label, score = (values[unexplained[0]] for values in unpaired)
    raise EarlyExitError(
        f"{len(unexplained)} detections at {found.exit_name} are not the model's: {model.classes[label - 1]} "
        f"{score:.4f} at {[round(float(value), 1) for value in box]}"
    )


Arrays = Sequence[np.ndarray]  # boxes [n, 4], labels [n] and scores [n]


def _unpaired(first: Arrays, second: Arrays) -> Arrays:
    """Return the detections of ``first`` and ``second`` that have no equal among the others. Equal detections have the
    same label, and boxes and scores that differ by at most `MAX_BOX_DIFFERENCE_PX` and `MAX_SCORE_DIFFERENCE`."""
    of_boxes, of_labels, of_scores = map(_differences, first, second)
    equal = (of_boxes.max(-1) <= MAX_BOX_DIFFERENCE_PX) & (of_labels == 0) & (of_scores <= MAX_SCORE_DIFFERENCE)
    rows, columns = linear_sum_assignment(equal, maximize=True)
    rows, columns = rows[equal[rows, columns]], columns[equal[rows, columns]]
    both = zip(first, second, strict=True)
    return [np.concatenate([np.delete(values, rows, 0), np.delete(others, columns, 0)]) for values, others in both]


def _differences(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the absolute differences [n, m, ...] of every row of ``first`` [n, ...] and of ``second`` [m, ...]."""
    return np.abs(first[:, None].astype(np.float64) - second[None].astype(np.float64))


def _explained(
    model: EarlyExitDetector, photo: np.ndarray, index: int, of_model: Arrays, of_file: Arrays, unpaired: Arrays
) -> np.ndarray:
    """Return which of the n ``unpaired`` detections rounding explains, bool [n].

    A detection is explained if the model has the same box before any box is dropped, and one of these holds: (1) The
    score is close to a limit: the score threshold, or the lowest score that is kept for the class or the photo. (2) The
    IoU with a kept box of the class is close to the limit of the NMS. (3) Two overlapping boxes have the same score.
    (4) The box overlaps an explained box.
    """
    (boxes, labels, scores), limit = unpaired, model.nms_thresh
    all_boxes, all_scores = _boxes_before_nms(model, photo, index)
    same_score = np.abs(all_scores[:, labels - 1] - scores) <= MAX_SCORE_DIFFERENCE
    in_model = ((_differences(all_boxes, boxes).max(-1) <= MAX_BOX_DIFFERENCE_PX) & same_score).any(0)
    lowest_kept = np.sort(all_scores, axis=0)[-min(model.topk_candidates, len(all_scores))]
    explained = np.abs(scores - np.maximum(lowest_kept, _score_thresholds(model))[labels - 1]) <= NEAR_LIMIT
    if len(of_model[2]) == model.detections_per_img:
        explained |= np.abs(scores - of_model[2][-1]) <= NEAR_LIMIT
    kept_boxes, kept_labels, _ = map(np.concatenate, zip(of_model, of_file, strict=True))
    near_nms = np.abs(_overlaps(boxes, kept_boxes) - limit) <= NEAR_LIMIT
    explained |= (near_nms & (labels[:, None] == kept_labels)).any(1)
    overlapping = (_overlaps(boxes, boxes) > limit) & (labels[:, None] == labels)
    np.fill_diagonal(overlapping, False)
    explained |= (overlapping & (_differences(scores, scores) <= NEAR_LIMIT)).any(1)
    for _ in labels:
        explained |= (overlapping & explained).any(1)
    return explained & in_model


def _overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return box_iou(torch.from_numpy(first), torch.from_numpy(second)).numpy()


def _boxes_before_nms(model: EarlyExitDetector, photo: np.ndarray, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes [A, 4] in the photo's pixels and scores [A, K] of an exit, before any is dropped."""
    outputs = model.exit_outputs([as_tensor(photo)])
    head, size = outputs.heads[index], outputs.network_sizes[0]
    boxes = model.box_coder.decode_single(head["bbox_regression"][0], outputs.anchors[0])
    detections = [{"boxes": clip_boxes_to_image(boxes, size)}]
    (detections,) = model.transform.postprocess(detections, [size], outputs.photo_sizes)
    return detections["boxes"].numpy(), head["cls_logits"][0].softmax(-1)[:, 1:].numpy()
