"""Export a detector in 8 bits: weights and activations as integers, by post-training quantisation.

A *segment* is the part of the network between two exits. Every segment is quantised on its own, for ONNX Runtime by
`quantize`, for OpenVINO by NNCF. Both insert pairs of QuantizeLinear and DequantizeLinear (Jacob et al. 2018,
"Quantization and training of neural networks for efficient integer-arithmetic-only inference"). The router, the
decoding and the NMS stay in 32 bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch

from earlyexit_ssd.config import CLOSED, get_cfg
from earlyexit_ssd.console import progress
from earlyexit_ssd.data.dataset import DetectionDataset, load_dataset, read_dataset, to_coco
from earlyexit_ssd.data.duplicates import blocks_of
from earlyexit_ssd.data.records import canonical
from earlyexit_ssd.deploy import Predictor
from earlyexit_ssd.deploy.benchmark import Ratio, ratio
from earlyexit_ssd.deploy.graph import Segment, next_inputs
from earlyexit_ssd.errors import DataError, EarlyExitError, import_package, one_line
from earlyexit_ssd.evaluation.matches import (
    DetectionsById,
    agreement,
    ap_of_choice,
    as_ground_truth,
    bootstrap_choices,
    exit_matches,
)
from earlyexit_ssd.images import read_image
from earlyexit_ssd.modeling.detector import EarlyExitDetector
from earlyexit_ssd.modeling.trunk import evaluating
from earlyexit_ssd.pipeline import export
from earlyexit_ssd.pipeline.build import with_values
from earlyexit_ssd.pipeline.quantize import OPERATORS, quantise
from earlyexit_ssd.runtimes import OnnxRuntime

logger = logging.getLogger(__name__)

RANGE_PHOTOS = 200  # largest number of photos on which ranges of activations are measured, and files are timed
SCORE, IOU = 0.5, 0.5  # an object is found by a detection with at least this score and IoU
DELTA = 0.05  # default share of the bootstrap draws that may lose more AP50 than is allowed


@dataclass(frozen=True)
class FloatLayers:
    """The layers that stay in 32 bits: the first convolutions after the image, and optionally the heads, or everything
    but the glances."""

    convolutions: int
    heads: bool
    full_size: bool = False

    def __str__(self) -> str:
        words = [f"the first {self.convolutions} convolutions"] if self.convolutions else []
        words += ["everything but the glances"] if self.full_size else ["the heads"] if self.heads else []
        return " and ".join(words) + " in 32 bits" if words else "all layers"


LADDER = (FloatLayers(0, False), FloatLayers(3, False), FloatLayers(3, True), FloatLayers(9, True))
"""Layers in 32 bits, in the order in which they are tried. The first layers are the most sensitive, and have few MMACs.
ONNX Runtime computes the first three convolutions faster in 32 bits, so it starts with the second entry."""
GLANCES_ONLY = FloatLayers(3, False, full_size=True)
"""Tried last, if the detector has a glance. Then no detection changes, only which photos leave."""


@dataclass(frozen=True)
class Int8Figures:
    """Figures of a file in 8 bits, compared with the reference: the same detector in 32 bits, or the detections
    ``reference`` of `export_int8`. On unlabelled photos, the reference's detections with a score of at least `SCORE`
    are the labels."""

    path: Path
    size: int  # bytes
    float_layers: FloatLayers
    photos: int
    labelled: bool
    AP: tuple[float, float]  # (reference, 8 bits)
    AP50: tuple[float, float]
    lost_bound: float  # largest AP50 lost in a share 1 - ``delta`` of the bootstrap draws
    AP_lost_bound: float | None  # the same for AP; None if the loss of AP is not limited
    delta: float
    objects: int  # number of the reference's detections with a score of at least `SCORE`
    objects_kept: int  # number of these that the detector in 8 bits also finds
    speed: Ratio  # time of a photo in 32 bits / time in 8 bits, from photo to detections, one thread
    runtime: str

    @property
    def speed_text(self) -> str:
        return f"{self.speed} times as fast as in 32 bits ({self.runtime}, 1 thread)"

    @property
    def bound_text(self) -> str:
        also = "" if self.AP_lost_bound is None else f", AP {self.AP_lost_bound:.3f}"
        return f"AP50 lost in {100 * (1 - self.delta):g} % of the draws at most {self.lost_bound:.3f}{also}"

    def __str__(self) -> str:
        size = f"{self.size / 1e6:.1f} MB in 8 bits ({self.float_layers})"
        photos = f"{self.photos} labelled photos" if self.labelled else f"{self.photos} photos, labelled in 32 bits"
        pairs = {"AP50": self.AP50, "AP": self.AP}
        aps = ", ".join(f"{name} {after:.3f} instead of {before:.3f}" for name, (before, after) in pairs.items())
        kept = f"{self.objects_kept} of {self.objects} objects kept"
        return f"{self.path}: {size}; {aps} on {photos} ({self.bound_text}), {kept}; {self.speed_text}"


def export_int8(
    model: EarlyExitDetector,
    path: str | os.PathLike[str],
    file_format: export.Format,
    dataset: DetectionDataset,
    ap_drop: float,
    reference: DetectionsById | None = None,
    delta: float = DELTA,
    coco_ap_drop: float | None = None,
    block: int | None = None,
) -> Int8Figures:
    """Write a detector in 8 bits, if it is faster than in 32 bits and loses little AP50.

    First the detector is exported in 32 bits and compared with the model. Then more and more layers stay in 32 bits
    (`LADDER`), until the loss is at most ``ap_drop``. The thresholds are computed again, so that as many photos leave
    at each exit as in 32 bits. The temperatures stay the same. The file has no certificate, because the certificate of
    a detector in 32 bits does not hold for 8 bits.

    Args:
        model, path, file_format: see `export_detector`.
        dataset: photos like those of use, with or without labels. The ranges of activations are measured on at most
            `RANGE_PHOTOS` of them.
        ap_drop: largest AP50 that may be lost, in a share 1 - ``delta`` of the bootstrap draws.
        reference: detections with which those in 8 bits are compared; None: the detections in 32 bits.
        delta: share of the bootstrap draws that may lose more than ``ap_drop``.
        coco_ap_drop: as ``ap_drop``, for COCO's AP (IoU 0.5 to 0.95); None: not limited.
        block: number of consecutive photos of a folder that the bootstrap draws together; None: 1.

    Raises:
        EarlyExitError: the runtime or, for OpenVINO, NNCF is missing, the photos show no object, or the file in 8 bits
            is not faster or loses too much. Then nothing is written.
    """
    path, runtime = export.exportable_path(path, file_format), export.runtime_of(file_format)
    quantise_segment, ladder = (_by_nncf(), LADDER) if file_format == "openvino" else (_by_onnx_runtime, LADDER[1:])
    model, photos = export.exportable(model), [record.path for record in dataset.records]
    with export.replacing(path) as new_path, evaluating(model):
        float_path = new_path.with_name(f"{new_path.stem}_float32{new_path.suffix}")
        export.export_detector(model, float_path, file_format, photos[: export.EXPORT_PHOTOS])
        confidences = _confidences(float_path, runtime, photos)
        if reference is None:
            reference = detect(Predictor(float_path, runtime), dataset)
        if not dataset.labelled and not any((found["scores"] >= SCORE).any() for found in reference.values()):
            raise EarlyExitError(
                f"{path}: 8 bits are refused: nothing is detected in {len(photos)} photos (score {SCORE:g}), "
                "so the loss of AP50 is undefined; give photos that show objects"
            )
        segments = export.build_segments(model)
        inputs: dict[str, list[dict[str, np.ndarray]]] = {part.name: [] for part in segments if part.of_photo}
        for photo in map(read_image, _sample(photos)):
            for segment in segments:
                if segment.of_photo:
                    inputs[segment.name].append(export.photo_inputs(model, segment, photo))
        ladder = [*ladder, *([GLANCES_ONLY] if any(segment.pixels is not None for segment in segments) else [])]
        for step, layers in enumerate(ladder):
            quantised = _quantised(quantise_segment, segments, inputs, layers)
            trial = new_path.with_name(f"{new_path.stem}_trial{step}{new_path.suffix}")
            export.write_segments(model, quantised, trial, file_format)
            thresholds = _thresholds(model, confidences, _confidences(trial, runtime, photos))
            predictors = Predictor(float_path, runtime), Predictor(trial, runtime, thresholds=thresholds)
            blocks, with_ap = blocks_of(dataset, block), coco_ap_drop is not None
            figures = _compare(*predictors, reference, dataset, layers, delta, with_ap, blocks)
            figures = dataclasses.replace(figures, path=path)
            logger.info("%s", figures)
            speed = figures.speed  # more layers in 32 bits would not make it faster
            if (speed.value if speed.low is None else speed.low) <= 1:
                raise EarlyExitError(f"{path}: 8 bits are refused: {figures.speed_text}; export without --int8")
            if figures.lost_bound <= ap_drop and (coco_ap_drop is None or figures.AP_lost_bound <= coco_ap_drop):
                break
        else:
            raise EarlyExitError(
                f"{path}: 8 bits are refused: {figures.bound_text} on {len(photos)} photos, even with "
                f"{figures.float_layers}; allow more than {ap_drop:g} (--ap-drop), or export without --int8"
            )
        if model.router is not None:
            model.router.thresholds = [thresholds.get(name, CLOSED) for name in model.exit_names[:-1]]
            model.router.certificate = None
        export.write_segments(model, quantised, new_path, file_format)
    return dataclasses.replace(figures, size=export.size_of(path))


def photos_to_quantise_on(
    folder: str | os.PathLike[str], annotations: str | os.PathLike[str] | None, classes: Sequence[str]
) -> DetectionDataset:
    """Return a data set of the photos of a folder, with the labels of the detector's ``classes`` in the file
    ``annotations`` (a format of DATA.DATASETS; None: no labels). Raise DataError if a file is unusable, or has none of
    the detector's classes."""
    flags = ((folder, "--photos takes a folder"), (annotations, "--annotations takes a COCO JSON file"))
    for path, expected in flags:
        if path and not os.path.exists(path):
            raise DataError(f"{path}: it does not exist; {expected}")
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: it is no folder; --photos takes one folder of photos with --int8")
    paths = [os.path.abspath(annotations) if annotations else "", os.path.abspath(folder)]
    cfg = with_values(get_cfg(), {"DATA.DATASETS": [("--photos", *paths)]})  # the name is for messages
    classes = [name for name in dict.fromkeys(classes) if name != "N/A"]  # output for an unused id of COCO
    if annotations:
        labelled = [canonical(name) for name in read_dataset(cfg, "--photos").classes]
        classes = [name for name in classes if canonical(name) in labelled]
        if not classes:
            names = ", ".join(labelled)[:100]
            raise DataError(
                f"{annotations}: none of its classes ({names}) is the detector's; give labels of the detector's classes"
            )
    cfg = with_values(cfg, {"DATA.CLASSES": classes})
    return load_dataset(cfg, "--photos", labels="required" if annotations else "replaced")


def _sample(photos: Sequence[str | os.PathLike[str]]) -> list[str | os.PathLike[str]]:
    """Return a seeded random sample of at most `RANGE_PHOTOS` photos."""
    indices = np.random.default_rng(0).permutation(len(photos))[:RANGE_PHOTOS]
    return [photos[index] for index in indices]


# Quantisation.


Inputs = Sequence[dict[str, np.ndarray]]  # of a segment, one dict for each photo
Quantise = Callable[[onnx.ModelProto, Inputs, FloatLayers], onnx.ModelProto]


def _quantised(
    quantise_segment: Quantise, segments: Sequence[Segment], photo_inputs: Mapping[str, Inputs], layers: FloatLayers
) -> list[Segment]:
    """Return the segments in 8 bits. ``photo_inputs``: name of a segment whose input is the photo -> its inputs."""
    segments_int8, inputs = [], ()
    for segment in progress(segments, desc="8 bits"):
        inputs = photo_inputs.get(segment.name, inputs)
        try:
            read = {value.name for value in segment.model.graph.input}  # a branch may ignore the context
            rows = [{name: value for name, value in photo.items() if name in read} for photo in inputs]
            unchanged = layers.full_size and segment.pixels is None
            quantised = segment.model if unchanged else quantise_segment(segment.model, rows, layers)
        except Exception as error:
            raise EarlyExitError(f"{segment.name} cannot be quantised ({one_line(str(error))[:200]})") from error
        segments_int8.append(dataclasses.replace(segment, model=quantised))
        if not segment.full:
            run = OnnxRuntime(segment.model.SerializeToString(), segment.name)
            inputs = [next_inputs(run(photo)) for photo in inputs]
    return segments_int8


def _by_onnx_runtime(model: onnx.ModelProto, inputs: Inputs, layers: FloatLayers) -> onnx.ModelProto:
    names, convolutions = [node.name for node in model.graph.node], _first_convolutions(model, layers.convolutions + 1)
    if len(convolutions) > layers.convolutions:
        del names[names.index(convolutions[-1]) :]
    before = {*names} if convolutions else set()

    def in_float(node: onnx.NodeProto) -> bool:
        of_function, _, _ = node.name.rpartition("/")  # `quantise` splits a HardSwish; its parts have names below its
        in_head = layers.heads and "head" in node.name
        return not _is_quantised(node) or in_head or bool(before & {node.name, of_function})

    return quantise(model, inputs, in_float)


def _by_nncf() -> Quantise:
    """Return the function that quantises by NNCF. Raise EarlyExitError if NNCF is missing."""
    os.environ.setdefault("NNCF_CI", "1")  # turns NNCF's telemetry off
    nncf = import_package("nncf")
    logging.getLogger("nncf").setLevel(logging.ERROR)  # NNCF's own function would silence the handlers of all loggers

    def quantise_segment(model: onnx.ModelProto, inputs: Inputs, layers: FloatLayers) -> onnx.ModelProto:
        in_float = [
            node.name
            for node in model.graph.node
            if not _is_quantised(node) or node.op_type == "Clip" or (layers.heads and "head" in node.name)
        ]
        in_float += _first_convolutions(model, layers.convolutions)
        with contextlib.redirect_stdout(sys.stderr):  # NNCF writes its progress bars to stdout
            return nncf.quantize(
                model,
                nncf.Dataset(inputs),
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(inputs),
                ignored_scope=nncf.IgnoredScope(names=in_float, validate=False),
            )

    return quantise_segment


def _first_convolutions(model: onnx.ModelProto, count: int) -> list[str]:
    """Return the names of the first ``count`` convolutions after the image; none if the input is no image."""
    if model.graph.input[0].type.tensor_type.shape.dim[1].dim_value != 3:
        return []
    return [node.name for node in model.graph.node if node.op_type == "Conv" and _is_quantised(node)][:count]


def _is_quantised(node: onnx.NodeProto) -> bool:
    """Return whether the operator of a node can be quantised, and the node is in a module that is no policy."""
    *modules, _ = node.name.strip("/").split("/")
    return node.op_type in (*OPERATORS, "HardSwish") and bool(modules) and modules[0] != "_policy"


# Measurement.


def detect(predictor: Predictor, dataset: DetectionDataset) -> DetectionsById:
    """Return a dict: image id -> detections of the data set's classes, with the data set's label numbers."""
    label_of, by_image = {name: label for label, name in enumerate(dataset.classes, 1)}, {}
    for record in progress(dataset.records, desc="detect"):
        detections = predictor(read_image(record.path))
        labels = np.array([label_of.get(name, 0) for name in detections.class_names], np.int64)
        values = {"boxes": detections.boxes, "scores": detections.scores, "labels": labels}
        by_image[record.image_id] = {key: torch.from_numpy(value[labels > 0]) for key, value in values.items()}
    return by_image


def _confidences(path: Path, runtime: str, photos: Sequence[Path]) -> dict[str, np.ndarray]:
    """Return a dict: open exit, shallow to deep -> confidences [n]. No photo leaves at an earlier exit."""
    names = [name for name, value in Predictor(path, runtime).thresholds.items() if value is not None]
    closed, by_exit = dict.fromkeys(names, CLOSED), {}
    for name in names:
        predictor = Predictor(path, runtime, thresholds={**closed, name: 0.0})
        confidences = [predictor(read_image(photo)).exit_confidence for photo in progress(photos, desc=name)]
        by_exit[name] = np.array(confidences)
    return by_exit


def _thresholds(
    model: EarlyExitDetector, before: dict[str, np.ndarray], after: dict[str, np.ndarray]
) -> dict[str, float]:
    """Return a dict: open exit -> threshold in 8 bits, from the confidences in 32 bits and in 8 bits."""
    by_exit = {}
    # photos that reach the exit, in 32 bits and in 8 bits
    arrive = arrive_int8 = np.ones_like(next(iter(before.values()), np.zeros(0)), bool)
    for name, confidences in before.items():
        threshold = float(model.router.thresholds[model.exit_names.index(name)])
        by_exit[name] = matching_threshold(threshold, confidences[arrive], after[name][arrive_int8])
        arrive, arrive_int8 = arrive & (confidences < threshold), arrive_int8 & (after[name] < by_exit[name])
    return by_exit


def matching_threshold(threshold: float, before: np.ndarray, after: np.ndarray) -> float:
    """Return a threshold at which as many photos leave with the confidences ``after`` as with ``before`` at
    ``threshold``. It is halfway between two confidences, unless no photo or every photo leaves."""
    leaving, ordered = int((before >= threshold).sum()), np.sort(after)[::-1]
    if not len(ordered):
        return threshold
    if leaving == 0:
        return max(threshold, min(1.0, float(np.nextafter(np.float32(ordered[0]), np.float32(2)))))
    if leaving >= len(ordered):
        return min(threshold, float(ordered[-1]))
    return float(ordered[leaving - 1 : leaving + 1].mean())


def _compare(
    unquantised: Predictor,
    quantised: Predictor,
    reference: DetectionsById,
    dataset: DetectionDataset,
    layers: FloatLayers,
    delta: float,
    with_ap: bool,
    blocks: np.ndarray | None,
) -> Int8Figures:
    """Compare the detections of ``quantised`` with ``reference``, and its time with that of ``unquantised``."""
    detections, template = detect(quantised, dataset), to_coco(dataset)
    truth = template if dataset.labelled else as_ground_truth(template, reference, SCORE)
    matches = exit_matches(truth, [reference, detections], IOU)
    choices = [np.full(matches.photos, index) for index in range(2)]  # the reference, then 8 bits, for all photos
    before, after = (ap_of_choice(matches, choice) for choice in choices)
    reference_draws, draws = bootstrap_choices(matches, choices, ap50_only=not with_ap, blocks=blocks)

    def loss_bound(figure: str) -> float:
        lost = getattr(reference_draws, figure) - getattr(draws, figure)
        return float(np.nanquantile(lost, 1 - delta))

    kept_objects = agreement(template, reference, detections, SCORE, IOU)
    return Int8Figures(
        path=quantised.path,
        size=export.size_of(quantised.path),
        float_layers=layers,
        photos=len(dataset),
        labelled=dataset.labelled,
        AP=(before.AP, after.AP),
        AP50=(before.AP50, after.AP50),
        lost_bound=loss_bound("AP50"),
        AP_lost_bound=loss_bound("AP") if with_ap else None,
        delta=delta,
        objects=kept_objects.objects,
        objects_kept=kept_objects.kept,
        speed=speed_of(quantised, unquantised, dataset),
        runtime=quantised.runtime,
    )


def speed_of(predictor: Predictor, against: Predictor, dataset: DetectionDataset) -> Ratio:
    """Return the speed of ``predictor`` relative to ``against``. They take turns on at most `RANGE_PHOTOS` photos, each
    photo once untimed, then timed, as in `time_modules`."""
    times = []
    for photo in map(read_image, _sample([record.path for record in dataset.records])):
        for each in (predictor, against):
            each(photo)
            times.append(each(photo).ms)
    columns = np.array(times).reshape(1, -1, 2)
    return ratio(columns[..., 1], columns[..., 0])
