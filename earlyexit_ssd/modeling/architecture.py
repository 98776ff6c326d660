"""A description of a model that builds it again: stored beside the weights, so that one file is enough."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated

from torchvision.models.detection.ssd import SSD

from earlyexit_ssd.config import LARGEST_SIDE, MOST_CHANNELS, MOST_WIDTH
from earlyexit_ssd.errors import EarlyExitError, shown
from earlyexit_ssd.modeling.early_exit_ssd import EarlyExitSSDLite
from earlyexit_ssd.modeling.folding import FoldedClassificationHead
from earlyexit_ssd.modeling.ssdlite import build_ssdlite
from earlyexit_ssd.plain import build, check_fields

Channels = Annotated[int, 0, MOST_CHANNELS]
Rows = Annotated[int, 0, 100_000]
Share = Annotated[float, 0, 1]
Count = Annotated[int, 1, 2**31]


@dataclass(frozen=True)
class Architecture:
    """Everything that fixes the shapes and the post-processing of an :class:`EarlyExitSSDLite`.

    Attributes:
        classes: names of the labels 1..K.
        image_size: side of the network input, pixels.
        width, reduced_tail: of the trunk; see :func:`build_ssdlite`.
        head_outputs, folded_rows: outputs per default box of a folded head, and the rows of ``classes`` in it;
            0 and empty where the head has the classes' own rows.
        exit_layers, channels, depth, copy, head_rank, empty: of the exits; see :class:`EarlyExitSSDLite`.
        score_thresh, nms_thresh, detections_per_img, topk_candidates: post-processing.

    Raises:
        EarlyExitError: a field of another type or out of its range.
    """

    classes: tuple[str, ...]
    image_size: Annotated[int, 1, LARGEST_SIDE] = 320
    width: Annotated[float, 0.01, MOST_WIDTH] = 1.0
    reduced_tail: bool = True
    head_outputs: Rows = 0
    folded_rows: tuple[Rows, ...] = ()
    exit_layers: tuple[int, ...] = (8, 12)
    channels: Channels = 0
    depth: tuple[int, ...] = (2,)
    copy: tuple[float, ...] = (0.5,)
    head_rank: Channels = 0
    empty: tuple[int, ...] = ()
    score_thresh: Share = 0.001
    nms_thresh: Share = 0.55
    detections_per_img: Count = 300
    topk_candidates: Count = 300

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.classes:
            raise EarlyExitError("classes is empty, expected at least one name")
        rows, classes = self.folded_rows, len(self.classes)
        fits = len(rows) == len(set(rows)) == classes and all(1 <= row < self.head_outputs for row in rows)
        if bool(self.head_outputs) != bool(rows) or (rows and not fits):
            raise EarlyExitError(
                f"folded_rows is {shown(rows)} of {self.head_outputs} head_outputs, expected a row from 1 on for each "
                f"of {classes} classes, or none"
            )

    def to_dict(self) -> dict:
        """Plain types only, for JSON and for files that are read with ``weights_only=True``."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: dict) -> Architecture:
        """The inverse of :meth:`to_dict`; unknown keys and wrong types are errors."""
        values = dict(values)
        older = {key: values.pop(key) for key in ("attention", "cascade") if key in values}
        described = build(cls, values)
        new_layers = older.get("attention") is not None and not all(values.get("copy", [0.0]))
        cascade = older.get("cascade", False) and len(described.exit_layers) - len(described.empty) > 1
        if new_layers or cascade:
            raise EarlyExitError(
                "its branches have layers (attention, or a cascade from exit to exit) that this version has not: "
                "train the exits again from its full path (MODEL.WEIGHTS, minutes)"
            )
        return described

    @classmethod
    def of_full_path(cls, values: dict) -> Architecture:
        """The description of a model as far as its full path goes; its branches may be those of an older version."""
        branches = {"exit_layers", "channels", "depth", "copy", "cascade", "head_rank", "empty", "attention"}
        return cls.from_dict({key: value for key, value in values.items() if key not in branches})

    def build_detector(self) -> SSD:
        """The torchvision detector under the exits, untrained."""
        detector = build_ssdlite(
            num_classes=self.head_outputs or len(self.classes) + 1,
            image_size=self.image_size,
            width=self.width,
            reduced_tail=self.reduced_tail,
            score_thresh=self.score_thresh,
            nms_thresh=self.nms_thresh,
            detections_per_img=self.detections_per_img,
            topk_candidates=self.topk_candidates,
        )
        if self.folded_rows:
            head = detector.head
            head.classification_head = FoldedClassificationHead(head.classification_head, self.folded_rows)
        return detector

    def add_exits(self, detector: SSD) -> EarlyExitSSDLite:
        """Exits on a detector of this architecture."""
        return EarlyExitSSDLite(
            detector,
            exit_layers=self.exit_layers,
            channels=self.channels,
            depth=self.depth,
            copy=self.copy,
            head_rank=self.head_rank,
            empty=self.empty,
            classes=self.classes,
        )

    def build(self) -> EarlyExitSSDLite:
        """The whole model, untrained."""
        return self.add_exits(self.build_detector())
