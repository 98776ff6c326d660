"""Run exported detectors: from a photo as a numpy array to its detections, without importing PyTorch."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from earlyexit_ssd.drift import Drift, DriftRecord
from earlyexit_ssd.errors import EarlyExitError, import_package, nearest, shown
from earlyexit_ssd.runtimes import OnnxRuntime, OpenVino

FORMAT = "earlyexit_ssd detector/1"
MANIFEST = "manifest.json"
CLOSED = 2.0
"""A threshold that no confidence reaches. `config` has it too, but importing that needs packages a device may lack."""
RUNTIMES = ("onnxruntime", "openvino")

Array = np.ndarray


@dataclass(frozen=True)
class Detections:
    """Detections of one photo, by decreasing score.

    Attributes:
        boxes: float32 [n, 4] xyxy in the photo's pixels.
        labels, class_names: int64 [n] in 1..K, and the n class names.
        scores: float32 [n], in (0, 1].
        exit_index, exit_name: exit at which the photo left, from 0, and its name; ``full`` for the full path.
        exit_confidence: the router's confidence there, in [0, 1]; None if the file has no router.
        ms: milliseconds of the whole call.
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
        cls, detector: Any, found: tuple[Array, Array, Array], exit_index: int, sure: float, start: float
    ) -> Detections:
        """From boxes, labels and scores, the exit and its confidence (NaN: no router) of a ``detector`` with
        ``classes`` and ``exit_names``, and the ``time.perf_counter()`` at which the call started."""
        boxes, labels, scores = found
        names = [detector.classes[label - 1] for label in labels.tolist()]
        confidence, ms = None if math.isnan(sure) else sure, 1000 * (time.perf_counter() - start)
        return cls(boxes, labels, names, scores, exit_index, detector.exit_names[exit_index], confidence, ms)

    def __len__(self) -> int:
        return len(self.boxes)

    def to_supervision(self) -> Any:
        """``supervision.Detections`` with ``class_id`` as ``labels`` and ``data["class_name"]``.

        Raises:
            EarlyExitError: the package supervision is not installed.
        """
        supervision, names = import_package("supervision"), {"class_name": np.array(self.class_names, dtype=str)}
        return supervision.Detections(xyxy=self.boxes, confidence=self.scores, class_id=self.labels, data=names)


class Predictor:
    """An exported detector; ``predictor(photo)`` returns `Detections`. Several threads may share one predictor.

    Args:
        path: an ONNX file, a folder of staged files, or an OpenVINO model (.xml), written by ``earlyexit export``.
        runtime: ``onnxruntime`` or ``openvino``. A file in OpenVINO's own format needs the latter.
        threads: threads of the runtime.
        score_thresh: score threshold of the detections, one number or class name -> number (other classes keep the
            file's); None: the file's.
        thresholds: thresholds of the early exits instead of the file's: one for each, or exit name -> threshold. A
            confidence is at most 1, so 2.0 closes an exit.

    Attributes:
        classes: names of the labels 1..K.
        exit_names: shallow to deep, ``full`` last.
        thresholds: exit name -> threshold; None for an exit that was not exported.
        certificate: the calibration's certificate as JSON; None without one.
        versions: versions of the software that wrote the file.

    Raises:
        EarlyExitError: a file that was not exported by this project, is damaged, or which the runtime cannot run; a
            runtime that is not installed; a number out of its range.
    """

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
        if type(threads) is not int or threads < 1:
            raise EarlyExitError(f"threads {shown(threads)}: expected a whole number, at least 1")
        path = Path(path)
        if not path.exists():
            raise EarlyExitError(f"{path}: no such file; write it with earlyexit export")
        if path.suffix == ".xml" and runtime != "openvino":
            raise EarlyExitError(f"{path}: an OpenVINO model, the runtime is {runtime}; give runtime='openvino'")
        load = OpenVino if runtime == "openvino" else OnnxRuntime
        self._network = _Staged(path, load, threads) if path.is_dir() else _OneFile(load(path, threads=threads))
        try:
            self._read(self._network.metadata)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise EarlyExitError(f"{path}: not a file of earlyexit export ({reason}); export the model anew") from None
        self.path, self.runtime, self.threads = path, runtime, threads
        self.thresholds = dict(zip(self.exit_names, self._own_thresholds, strict=False))
        self.score_thresh = self._least_scores(score_thresh)
        self._set_thresholds(thresholds)
        if tuple(self.thresholds.values()) != self._own_thresholds:
            self._decisions = None

    def _read(self, metadata: Mapping[str, Any]) -> None:
        """Metadata (text by key, all JSON except the format). Raises KeyError, TypeError or ValueError."""
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {shown(metadata.get('format'))}, expected {FORMAT!r}")
        read = {key: json.loads(metadata[key]) for key in ("classes", "exit_names", "thresholds", "score_thresh")}
        self.classes: tuple[str, ...] = tuple(map(str, read["classes"]))
        self.exit_names: tuple[str, ...] = tuple(map(str, read["exit_names"]))
        self._own_thresholds = tuple(None if value is None else float(value) for value in read["thresholds"])
        self._own_scores = np.array(list(map(float, read["score_thresh"])), np.float32)
        self.certificate: dict[str, Any] | None = json.loads(metadata.get("certificate") or "null")
        self._decisions = (
            None if self.certificate is None else DriftRecord.from_certificate(self.certificate, self.exit_names)
        )
        self.versions: dict[str, str] = json.loads(metadata.get("versions") or "{}")
        if len(self._own_scores) != len(self.classes) or len(self._own_thresholds) != len(self.exit_names) - 1:
            raise ValueError("its numbers of classes, exits and thresholds do not fit each other")

    def __call__(self, image: Array) -> Detections:
        """Detect in one photo.

        Args:
            image: RGB uint8 [H, W, 3] of any size. Grey [H, W] becomes RGB, and RGBA [H, W, 4] is blended with white.
                Floats in [0, 1] are rounded to 8 bits.

        Raises:
            EarlyExitError: an array of another type, shape or range.
        """
        return self._routed(image, "image")

    def predict(self, images: Iterable[Array]) -> list[Detections]:
        """Detect in photos of any sizes, one by one, since each leaves at its own exit.

        Raises:
            EarlyExitError: an invalid photo; the message has its index.
        """
        if isinstance(images, np.ndarray) and images.ndim < 4:
            raise EarlyExitError(
                f"images {list(images.shape)}: expected a list of photos; call predictor(image) for one"
            )
        return [self._routed(image, f"image {place}") for place, image in enumerate(images)]

    def drift(self) -> Drift | None:
        """Compare the exits and confidences of the photos so far with those of calibration.

        The p-value is for independent photos. If the certificate has a block length (``--block`` of the calibration),
        one frame of each block is compared. Without a block length the test is too sensitive for video. See
        `earlyexit_ssd.drift.DriftRecord`.

        Returns:
            the comparison; None without a certificate, with other thresholds than the file's, and before the first
            photo.
        """
        return self._decisions and self._decisions.drift()

    def warm_up(self, runs: int = 2) -> None:
        """Run a blank photo, routed and through the full path, since the first calls are slower than later ones."""
        blank = np.zeros((480, 640, 3), np.uint8)
        for _ in range(runs):
            for thresholds in (self._thresholds, np.full_like(self._thresholds, CLOSED)):
                self._detect(blank, "image", thresholds)

    def _routed(self, image: Array, name: str) -> Detections:
        found = self._detect(image, name, self._thresholds)
        if self._decisions:
            self._decisions.add(found.exit_index, found.exit_confidence)
        return found

    def _detect(self, image: Array, name: str, thresholds: Array) -> Detections:
        start = time.perf_counter()
        feeds = {"image": as_photo(image, name), "thresholds": thresholds, "score_thresh": self.score_thresh}
        *found, exit_index, confidence = self._network(feeds)
        if self._network.fixed:
            _, labels, scores = found
            found = [values[scores > self.score_thresh[labels - 1]] for values in found]
        return Detections.of(self, tuple(found), int(exit_index), float(confidence), start)

    def _least_scores(self, given: float | Mapping[str, float] | None) -> Array:
        """Lowest score per class, float32 [K]."""
        scores = self._own_scores.copy()
        if isinstance(given, Mapping):
            for name, value in given.items():
                if name not in self.classes:
                    hint = nearest(str(name), self.classes) or f"; the classes are {', '.join(self.classes)[:100]}"
                    raise EarlyExitError(f"score_thresh names {shown(name)}, no class of the file{hint}")
                scores[self.classes.index(name)] = _share(f"score_thresh of {shown(name)}", value)
        elif given is not None:
            scores[:] = _share("score_thresh", given)
        if self._network.fixed and (scores < self._own_scores).any():
            least = self._own_scores.min()
            raise EarlyExitError(
                f"{self.path}: score_thresh below the file's {least:g}, which OpenVINO takes for a constant in an ONNX "
                "file; export with --format openvino"
            )
        return scores

    def _set_thresholds(self, given: Mapping[str, float] | Sequence[float] | None) -> None:
        if given is not None and not isinstance(given, Mapping):
            if not isinstance(given, (list, tuple)) or len(given) != len(self.thresholds):
                names = ", ".join(self.thresholds)
                raise EarlyExitError(f"thresholds {shown(given)}: expected one for each of {names}, or name -> number")
            given = dict(zip(self.thresholds, given, strict=True))
        for name, value in (given or {}).items():
            if name not in self.thresholds:
                hint = nearest(str(name), self.thresholds) or f"; they are {', '.join(self.thresholds)}"
                raise EarlyExitError(f"thresholds names {shown(name)}, no early exit of the file{hint}")
            value = CLOSED if value == CLOSED else _share(f"threshold of {name}", value)
            own = self.thresholds[name]
            if own is None and value < CLOSED:
                raise EarlyExitError(f"{self.path}: {name} was closed when the file was written; export it open")
            if own is not None and value != own:
                if self._network.fixed:
                    raise EarlyExitError(
                        f"{self.path}: OpenVINO takes thresholds of an ONNX file for constants; export with --format "
                        "openvino to change them"
                    )
                self.thresholds[name] = value
        values = [CLOSED if value is None else value for value in self.thresholds.values()]
        self._thresholds = np.array(values, np.float32)


def _share(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 1:
        raise EarlyExitError(f"{name} is {shown(value)}, expected a number in [0, 1]")
    return float(value)


def as_photo(image: object, name: str = "image") -> Array:
    """The photo as contiguous uint8 RGB [H, W, 3], see :meth:`Predictor.__call__`; ``name`` is for messages. An
    EarlyExitError for an invalid photo."""
    if not isinstance(image, np.ndarray):
        raise EarlyExitError(f"{name}: a {type(image).__name__}, expected a numpy array uint8 [H, W, 3] RGB")
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[..., 0]
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
        chw = image.ndim == 3 and image.shape[0] in (1, 3, 4)
        fix = "; channels come last: image.transpose(1, 2, 0)" if chw else ""
        raise EarlyExitError(f"{name}: {image.dtype} {list(image.shape)}, expected uint8 [H, W, 3] RGB{fix}")
    if not image.size:
        raise EarlyExitError(f"{name}: it has no pixel, its shape is {list(image.shape)}; expected uint8 [H, W, 3] RGB")
    if image.dtype != np.uint8:
        image = _as_bytes(image, name)
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    elif image.shape[2] == 4:
        opaque = image[..., 3:].astype(np.float32) / 255
        image = np.rint(image[..., :3] * opaque + 255 * (1 - opaque)).astype(np.uint8)
    return np.ascontiguousarray(image)


def _as_bytes(image: Array, name: str) -> Array:
    """Convert integers in 0..255 or floats in [0, 1] to uint8."""
    if image.dtype.kind not in "fiu":
        raise EarlyExitError(f"{name}: values of type {image.dtype}, expected uint8, or floats in [0, 1]")
    low, high = float(image.min()), float(image.max())
    largest = 1.0 if image.dtype.kind == "f" else 255.0
    if not (low >= 0 and high <= largest):  # NaN is neither
        raise EarlyExitError(
            f"{name}: {image.dtype} values from {low:g} to {high:g}, expected uint8, or floats in [0, 1] without NaN"
        )
    return np.rint(image.astype(np.float32) * 255).astype(np.uint8) if largest == 1 else image.astype(np.uint8)


# The network: one file, or one file per segment.

_NAMES = ("boxes", "labels", "scores", "exit_index", "exit_confidence")


class _OneFile:
    """A whole detector in one file. ``fixed``: its thresholds are constants of the file, not inputs."""

    def __init__(self, network: OnnxRuntime | OpenVino) -> None:
        self._network, self.metadata = network, network.metadata
        self.fixed = "score_thresh" not in network.inputs

    def __call__(self, feeds: Mapping[str, Array]) -> list[Array]:
        found = self._network(feeds)
        return [found[name] for name in _NAMES]


class _Staged:
    """A folder with one file per segment; a segment is run only if the photo does not leave before it."""

    fixed = False

    def __init__(self, folder: Path, load: type[OnnxRuntime | OpenVino], threads: int) -> None:
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            self.metadata = manifest["metadata"]
            self._segments = [(int(one["exit_index"]), bool(one["empty"])) for one in manifest["segments"]]
            files = [*(one["file"] for one in manifest["segments"]), manifest["detections"]]
            if any(Path(file).name != file for file in files):
                raise ValueError("a file outside the folder")
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise EarlyExitError(
                f"{folder}: its {MANIFEST} cannot be used ({reason}); write the folder with earlyexit export --format "
                "staged"
            ) from None
        *self._networks, self._detections = [load(folder / file, threads=threads) for file in files]

    def __call__(self, feeds: Mapping[str, Array]) -> list[Array]:
        state = {"image": feeds["image"]}
        for (index, empty), network in zip(self._segments, self._networks, strict=True):
            found = network(state)
            confidence = found["confidence"][0] if "confidence" in found else np.float32(np.nan)
            last = network is self._networks[-1]
            if not last and not confidence >= feeds["thresholds"][index]:
                # the names of `STATE` in graph.py, which imports onnx; this module runs without it
                state = {f"{name}_in": found[name] for name in ("x", "finest", "context") if name in found}
            elif empty and not last:
                nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32)
                return [*nothing, np.int64(index), confidence]
            else:
                size = np.array(feeds["image"].shape[:2], np.int64)
                answer = self._detections({**found, "photo_size": size, "score_thresh": feeds["score_thresh"]})
                return [*(answer[name] for name in _NAMES[:3]), np.int64(index), confidence]
        raise AssertionError("the last segment leaves")
