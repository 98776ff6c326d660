"""Run exported detectors on photos that are numpy arrays. PyTorch is not imported."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from earlyexit_ssd.drift import Drift, DriftRecord
from earlyexit_ssd.errors import EarlyExitError, import_package, shown, suggest, suggest_keywords
from earlyexit_ssd.files import sha256
from earlyexit_ssd.runtimes import OnnxRuntime, OpenVino

FORMAT = "earlyexit_ssd detector/1"
MANIFEST = "manifest.json"
CLOSED = 2.0
"""Threshold that no confidence reaches. It equals ``earlyexit_ssd.config.CLOSED``, whose import needs more packages."""
RUNTIMES = ("onnxruntime", "openvino")

Array = np.ndarray


@dataclass(frozen=True)
class Detections:
    """Detections of one photo, by decreasing score.

    Attributes:
        boxes: float32 [n, 4] xyxy in the photo's pixels.
        labels: int64 [n] in 1..K.
        class_names: names of the labels, n of them.
        scores: float32 [n] in (0, 1].
        exit_index: index of the exit at which the photo left, from 0. The full path has the last index.
        exit_name: name of this exit; ``full`` for the full path.
        exit_confidence: confidence of the router at this exit, in [0, 1]; None without a router.
        ms: duration of the call in milliseconds.
    """

    boxes: Array
    labels: Array
    class_names: list[str]
    scores: Array
    exit_index: int
    exit_name: str
    exit_confidence: float | None
    ms: float

    @classmethod
    def of(
        cls, detector: Any, outputs: tuple[Array, Array, Array], exit_index: int, confidence: float, start: float
    ) -> Detections:
        """Add names and the duration to ``outputs`` (boxes, labels, scores) of a detector with ``classes`` and
        ``exit_names``. ``confidence`` is NaN without a router. ``start`` is a ``time.perf_counter()``."""
        boxes, labels, scores = outputs
        names = [detector.classes[label - 1] for label in labels.tolist()]
        confidence, ms = None if math.isnan(confidence) else confidence, 1000 * (time.perf_counter() - start)
        return cls(boxes, labels, names, scores, exit_index, detector.exit_names[exit_index], confidence, ms)

    def __len__(self) -> int:
        return len(self.boxes)

    def to_supervision(self) -> Any:
        """Return ``supervision.Detections``. ``class_id`` has the labels, ``data["class_name"]`` the class names. Raise
        EarlyExitError if the package supervision is not installed."""
        supervision, data = import_package("supervision"), {"class_name": np.array(self.class_names, dtype=str)}
        return supervision.Detections(xyxy=self.boxes, confidence=self.scores, class_id=self.labels, data=data)


class Predictor:
    """An exported detector; ``predictor(photo)`` returns `Detections`. Several threads may share one predictor.

    Args:
        path: ONNX file, folder of staged files, or OpenVINO model (.xml), written by ``earlyexit export``.
        runtime: ``onnxruntime`` or ``openvino``. An .xml file needs ``openvino``.
        threads: number of threads of the runtime.
        score_thresh: score threshold of the detections: one number, or class name -> number. Other classes keep the
            file's score threshold. By default all classes do.
        thresholds: thresholds of the early exits: one number for each, or exit name -> number. Other exits keep the
            file's threshold. A confidence is at most 1, and 2.0 closes an exit.

    Attributes:
        classes: names of the labels 1..K.
        exit_names: names of the exits, shallow to deep, ``full`` last.
        stored_score_thresh: score threshold per class that the file has, float32 [K].
        certificate: certificate of the calibration, as JSON; None without one.
        versions: versions of the software that wrote the file.

    Raises:
        EarlyExitError: the file is damaged or not from ``earlyexit export``, the runtime is not installed or cannot
            run the file, or a number is out of its range.
    """

    @suggest_keywords
    def __init__(
        self,
        path: str | os.PathLike[str],
        runtime: str = "onnxruntime",
        threads: int = 1,
        score_thresh: float | Mapping[str, float] | None = None,
        thresholds: Mapping[str, float] | Sequence[float] | None = None,
    ) -> None:
        if runtime not in RUNTIMES:
            raise EarlyExitError(f"runtime {shown(runtime)}: expected one of {', '.join(RUNTIMES)}")
        if type(threads) is not int or not 1 <= threads <= 1024:
            raise EarlyExitError(f"threads {shown(threads)}: expected a whole number from 1 to 1024")
        path = Path(path)
        if not path.exists():
            raise EarlyExitError(f"{path}: no such file; write it with earlyexit export")
        if path.suffix == ".xml" and runtime != "openvino":
            fix = "add --runtime openvino to the command, or runtime='openvino' in Python"
            raise EarlyExitError(f"{path}: an OpenVINO model does not run in {runtime}; {fix}")
        load = OpenVino if runtime == "openvino" else OnnxRuntime
        self._network = _Staged(path, load, threads) if path.is_dir() else load(path, threads=threads)
        # OpenVINO reads the defaults of an ONNX file as constants, so the file has no inputs for thresholds then
        self._fixed_thresholds = "thresholds" not in self._network.inputs
        self._fixed_score_thresh = "score_thresh" not in self._network.inputs
        try:
            self._read_metadata(self._network.metadata)
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise EarlyExitError(f"{path}: not a file of earlyexit export ({reason}); export the model again") from None
        self.path, self.runtime, self.threads = path, runtime, threads
        self.score_thresh = score_thresh
        self.thresholds = thresholds

    def _read_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Set attributes from metadata (JSON text by key). Raise AttributeError, KeyError, TypeError or ValueError if
        it is wrong."""
        if metadata.get("format") != FORMAT:
            raise ValueError(f"the format is {shown(metadata.get('format'))}, expected {FORMAT!r}")
        values = {key: json.loads(metadata[key]) for key in ("classes", "exit_names", "thresholds", "score_thresh")}
        self.classes: tuple[str, ...] = tuple(map(str, values["classes"]))
        self.exit_names: tuple[str, ...] = tuple(map(str, values["exit_names"]))
        thresholds = [None if value is None else float(value) for value in values["thresholds"]]
        self.stored_score_thresh = self._score_thresh = np.array([*map(float, values["score_thresh"])], np.float32)
        self.certificate: dict[str, Any] | None = json.loads(metadata.get("certificate") or "null")
        self._drift_record: DriftRecord | None = None
        if self.certificate is not None:
            self._drift_record = DriftRecord.from_certificate(self.certificate, self.exit_names)
        self.versions: dict[str, str] = json.loads(metadata.get("versions") or "{}")
        if len(self._score_thresh) != len(self.classes):
            raise ValueError(f"{len(self._score_thresh)} score thresholds for {len(self.classes)} classes")
        if not all(0 <= value <= 1 for value in self._score_thresh):
            raise ValueError(f"score thresholds {shown(values['score_thresh'])}, expected numbers in [0, 1]")
        if not all(value is None or 0 <= value <= 1 or value == CLOSED for value in thresholds):
            raise ValueError(f"thresholds {shown(thresholds)}, expected numbers in [0, 1], {CLOSED:g} or null")
        if len(set(self.exit_names)) < len(self.exit_names) or self.exit_names[-1] != "full":
            raise ValueError(f"exit_names {shown(self.exit_names)}, expected different names, the last full")
        if len(thresholds) != len(self.exit_names) - 1:
            raise ValueError(f"{len(thresholds)} thresholds for {len(self.exit_names) - 1} early exits")
        self._threshold_of = dict(zip(self.exit_names, thresholds, strict=False))

    def __call__(self, image: Array) -> Detections:
        """Detect in one photo.

        Args:
            image: RGB uint8 [H, W, 3] of any size. Grey [H, W] or [H, W, 1] becomes RGB. RGBA [H, W, 4] is blended
                with white. Other integers in 0..255 are converted to uint8. Floats in [0, 1] are rounded to 8 bits.

        Raises:
            EarlyExitError: an array of another type, shape or range.
        """
        return self._detect_and_record(image, "image")

    def predict(self, images: Iterable[Array]) -> list[Detections]:
        """Detect in photos of any sizes, one after another, since each leaves at its own exit. The EarlyExitError for
        an invalid photo has its index."""
        if isinstance(images, np.ndarray) and images.ndim < 4:
            expected = "expected a list of photos; call predictor(image) for one"
            raise EarlyExitError(f"images {list(images.shape)}: {expected}")
        return [self._detect_and_record(image, f"image {index}") for index, image in enumerate(images)]

    def drift(self) -> Drift | None:
        """Compare the exits and confidences of the last photos with those of the calibration photos.

        The p-value is for independent photos. If the certificate has a block length (``--block`` of the calibration),
        one frame of each block is compared. Without a block length the test is too sensitive for video. See
        `earlyexit_ssd.drift.DriftRecord`. Return None without a certificate, with other thresholds than the file's, or
        before the first photo.
        """
        return self._drift_record and self._drift_record.drift()

    @property
    def digest(self) -> str:
        """SHA-256 of the files and of the exits' thresholds, which identifies the detector."""
        files = [self.path, self.path.with_suffix(".bin")] if self.path.suffix == ".xml" else [self.path]
        files = sorted(self.path.glob("[!.]*")) if self.path.is_dir() else files
        return hashlib.sha256(repr([*map(sha256, files), self._threshold_of]).encode()).hexdigest()

    def warm_up(self) -> None:
        """Run a blank photo twice, routed and through the full path, since the first calls are slower."""
        blank = np.zeros((480, 640, 3), np.uint8)
        for thresholds in 2 * (self._thresholds, np.full_like(self._thresholds, CLOSED)):
            self._detect(blank, "image", thresholds)

    def _detect_and_record(self, image: Array, name: str) -> Detections:
        detections = self._detect(image, name, self._thresholds)
        if self._drift_record:
            self._drift_record.add(detections.exit_index, detections.exit_confidence)
        return detections

    def _detect(self, image: Array, name: str, thresholds: Array) -> Detections:
        start = time.perf_counter()
        feeds = {"image": as_photo(image, name), "thresholds": thresholds, "score_thresh": self._score_thresh}
        outputs = self._network(feeds)
        boxes, labels, scores = (outputs[name] for name in ("boxes", "labels", "scores"))
        if self._fixed_score_thresh:
            keep = scores > self._score_thresh[labels - 1]
            boxes, labels, scores = boxes[keep], labels[keep], scores[keep]
        exit_index, confidence = int(outputs["exit_index"]), float(outputs["exit_confidence"])
        return Detections.of(self, (boxes, labels, scores), exit_index, confidence, start)

    @property
    def score_thresh(self) -> Array:
        """Score thresholds of the classes, float32 [classes]. Set one number, or class name -> number."""
        return self._score_thresh

    @score_thresh.setter
    def score_thresh(self, score_thresh: float | Mapping[str, float] | None) -> None:
        stored, values = self.stored_score_thresh, self._score_thresh.copy()
        if isinstance(score_thresh, Mapping):
            for name, value in score_thresh.items():
                if name not in self.classes:
                    hint = suggest(str(name), self.classes) or f"; the classes are {', '.join(self.classes)[:100]}"
                    raise EarlyExitError(f"score_thresh has {shown(name)}, which is not a class of the file{hint}")
                same_name = [each == name for each in self.classes]  # COCO's unused ids share the name "N/A"
                values[same_name] = _number_in_0_1(f"score_thresh of {shown(name)}", value)
        elif score_thresh is not None:
            values[:] = _number_in_0_1("score_thresh", score_thresh)
        lowered = np.flatnonzero(values < stored)
        if self._fixed_score_thresh and len(lowered):
            index = lowered[0]
            value = f"score_thresh of {shown(self.classes[index])} is {values[index]:g}"
            fix = f"OpenVINO cannot lower the {stored[index]:g} in an ONNX file; export with --format openvino"
            raise EarlyExitError(f"{self.path}: {value}, but {fix}")
        values.flags.writeable = False
        self._score_thresh = values

    @property
    def thresholds(self) -> Mapping[str, float | None]:
        """Threshold by early exit; None: closed when the file was written. Set a list, or exit name -> number."""
        return MappingProxyType(self._threshold_of)

    @thresholds.setter
    def thresholds(self, thresholds: Mapping[str, float] | Sequence[float] | None) -> None:
        if thresholds is not None and not isinstance(thresholds, Mapping):
            if not isinstance(thresholds, (list, tuple)) or len(thresholds) != len(self._threshold_of):
                names = ", ".join(self._threshold_of)
                expected = f"a number for each of {names}, or exit name -> number" if names else "none, without exits"
                raise EarlyExitError(f"thresholds {shown(thresholds)}: expected {expected}")
            thresholds = dict(zip(self._threshold_of, thresholds, strict=True))
        threshold_of = dict(self._threshold_of)
        for name, value in (thresholds or {}).items():
            if name not in self._threshold_of:
                exits = ", ".join(self._threshold_of) or "none"
                hint = suggest(str(name), self._threshold_of) or f"; its early exits are: {exits}"
                raise EarlyExitError(f"thresholds has {shown(name)}, which is not an early exit of the file{hint}")
            value = CLOSED if value == CLOSED else _number_in_0_1(f"threshold of {name}", value)
            stored = self._threshold_of[name]
            if stored is None and value < CLOSED:
                fix = f"export the model with {name} open"
                raise EarlyExitError(f"{self.path}: {name} was closed when the file was written; {fix}")
            if stored is not None and value != stored:
                if self._fixed_thresholds:
                    problem = f"OpenVINO cannot change the threshold of {name} in an ONNX file"
                    raise EarlyExitError(f"{self.path}: {problem}; export with --format openvino")
                threshold_of[name] = value
        if threshold_of != self._threshold_of:
            self._drift_record = None  # the certificate is for the stored thresholds
        self._threshold_of = threshold_of
        values = [CLOSED if value is None else value for value in self._threshold_of.values()]
        self._thresholds = np.array(values, np.float32)


def _number_in_0_1(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 1:
        raise EarlyExitError(f"{name} is {shown(value)}, expected a number in [0, 1]")
    return float(value)


def as_photo(image: object, name: str = "image") -> Array:
    """Convert an image that :meth:`Predictor.__call__` accepts to contiguous uint8 RGB [H, W, 3]. Raise an
    EarlyExitError that starts with ``name`` for an array of another type, shape or range."""
    if not isinstance(image, np.ndarray):
        raise EarlyExitError(f"{name}: a {type(image).__name__}, expected a numpy array uint8 [H, W, 3] RGB")
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[..., 0]
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
        channels_first = image.ndim == 3 and image.shape[0] in (1, 3, 4)
        fix = "; channels must come last: image.transpose(1, 2, 0)" if channels_first else ""
        raise EarlyExitError(f"{name}: {image.dtype} {list(image.shape)}, expected uint8 [H, W, 3] RGB{fix}")
    if not image.size:
        raise EarlyExitError(f"{name}: shape {list(image.shape)} has no pixels, expected uint8 [H, W, 3] RGB")
    if image.dtype != np.uint8:
        image = _as_uint8(image, name)
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    elif image.shape[2] == 4:
        alpha = image[..., 3:].astype(np.float32) / 255
        image = np.rint(image[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    return np.ascontiguousarray(image)


def _as_uint8(image: Array, name: str) -> Array:
    """Convert integers in 0..255 or floats in [0, 1] to uint8."""
    if image.dtype.kind not in "fiu":
        raise EarlyExitError(f"{name}: values of type {image.dtype}, expected uint8, or floats in [0, 1]")
    low, high = float(image.min()), float(image.max())
    limit = 1.0 if image.dtype.kind == "f" else 255.0
    if not (low >= 0 and high <= limit):  # also true for NaN
        expected = "expected uint8, or floats in [0, 1] without NaN"
        raise EarlyExitError(f"{name}: {image.dtype} values from {low:g} to {high:g}, {expected}")
    return np.rint(image.astype(np.float32) * 255).astype(np.uint8) if limit == 1 else image.astype(np.uint8)


class _Staged:
    """A detector in a folder with one file per segment, with the interface of `OnnxRuntime`. A segment is the part of
    the network between two exits. Segments after the exit of a photo are not run."""

    def __init__(self, folder: Path, load: type[OnnxRuntime | OpenVino], threads: int) -> None:
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            self.metadata = manifest["metadata"]
            segments = manifest["segments"]
            if not segments:
                raise ValueError("segments is empty")
            self._stages = [(int(segment["exit_index"]), segment["empty"]) for segment in segments]
            if {type(empty) for _, empty in self._stages} != {bool} or self._stages[-1][1]:
                raise ValueError("empty is not true or false, or true for the full path")
            indices = [-1, *(index for index, _ in self._stages)]
            if indices != sorted(set(indices)) or indices[-1] != len(json.loads(self.metadata["exit_names"])) - 1:
                raise ValueError(f"exit_index {indices[1:]} does not fit exit_names")
            files = [*(segment["file"] for segment in segments), manifest["detections"]]
            if any(Path(file).name != file for file in files):
                raise ValueError("a file outside the folder")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
            fix = "write the folder with earlyexit export --format staged"
            raise EarlyExitError(f"{folder}: its {MANIFEST} cannot be used ({reason}); {fix}") from None
        *self._networks, self._postprocess = [load(folder / file, threads=threads) for file in files]
        self.inputs = ["thresholds", *self._postprocess.inputs]

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        values: dict[str, Array] = {"image": feeds["image"]}
        for stage, network in zip(self._stages, self._networks, strict=True):
            index, is_empty = stage
            outputs = network(values)
            confidence = outputs["confidence"][0] if "confidence" in outputs else np.float32(np.nan)
            if network is self._networks[-1] or confidence >= feeds["thresholds"][index]:
                break
            # the names of `STATE` in graph.py, which needs the package onnx
            values |= {f"{name}_in": outputs[name] for name in ("x", "finest", "context") if name in outputs}
        if is_empty:
            boxes, labels, scores = np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32)
            detections = {"boxes": boxes, "labels": labels, "scores": scores}
        else:
            size = np.array(feeds["image"].shape[:2], np.int64)
            detections = self._postprocess({**outputs, "photo_size": size, "score_thresh": feeds["score_thresh"]})
        return {**detections, "exit_index": index, "exit_confidence": confidence}
