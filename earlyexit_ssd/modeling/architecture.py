"""A description of a model that builds it again: stored beside the weights, so that one file is enough."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torchvision.models.detection.ssd import SSD

from earlyexit_ssd.config import LARGEST_SIDE, MOST_CHANNELS, MOST_WIDTH
from earlyexit_ssd.errors import EarlyExitError, shown
from earlyexit_ssd.modeling.early_exit_ssd import EarlyExitSSDLite
from earlyexit_ssd.modeling.folding import FoldedClassificationHead, is_folded
from earlyexit_ssd.modeling.foreign import has_reduced_tail
from earlyexit_ssd.modeling.ssdlite import build_ssdlite
from earlyexit_ssd.modeling.validate import LEAST_SCORE
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
        folded_branches: the branches' heads are folded as the full path's is; otherwise they have the classes alone.
        exit_layers, channels, depth, copy, head_rank, empty: of the exits; see :class:`EarlyExitSSDLite`.
        score_thresh, nms_thresh, detections_per_img, topk_candidates: post-processing; the first may be by class.

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
    folded_branches: bool = False
    score_thresh: Share | dict[str, Share] = 0.001
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
    def of(cls, model: EarlyExitSSDLite) -> Architecture:
        """The description of a model as it is now.

        Raises:
            EarlyExitError: layers, default boxes or normalisation are not those that this description can build.
        """
        head, settings = model.head.classification_head, dict(model.branch_settings)
        if is_folded(head):
            branches = [part.head.classification_head for part in model.branches.values() if hasattr(part, "head")]
            settings |= {"head_outputs": head.num_columns, "folded_rows": head.wanted.tolist()}
            settings["folded_branches"] = any(map(is_folded, branches))
        for name in ("classes", "width", "score_thresh", "nms_thresh", "detections_per_img", "topk_candidates"):
            settings[name] = getattr(model, name)
        settings["image_size"] = model.transform.fixed_size[0]
        settings["reduced_tail"] = has_reduced_tail(model.state_dict(), model.width)
        settings["exit_layers"] = model.exit_layers[:-1]
        settings["empty"] = [layer for layer, empty in zip(model.exit_layers, model.empty, strict=False) if empty]
        architecture = cls(
            **{name: tuple(value) if isinstance(value, (list, tuple)) else value for name, value in settings.items()}
        )
        with torch.random.fork_rng(devices=[]):
            built = _fixed(architecture.build())
        own = _fixed(model)
        for name in {**built, **own}:
            if built.get(name) != own.get(name):
                raise EarlyExitError(
                    f"the model is not as it was built: {name:.80} is {own.get(name)!s:.60}, expected "
                    f"{built.get(name)!s:.60}; a file of it could not be read again: save its state_dict() instead"
                )
        return architecture

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
            score_thresh=self.lowest_score,
            nms_thresh=self.nms_thresh,
            detections_per_img=self.detections_per_img,
            topk_candidates=self.topk_candidates,
        )
        if self.folded_rows:
            head = detector.head
            head.classification_head = FoldedClassificationHead(head.classification_head, self.folded_rows)
        return detector

    @property
    def lowest_score(self) -> float:
        """Of ``score_thresh``: what a detector without names of classes can cut at."""
        cuts = self.score_thresh
        return min(cuts.get(name, LEAST_SCORE) for name in self.classes) if isinstance(cuts, Mapping) else cuts

    def add_exits(self, detector: SSD) -> EarlyExitSSDLite:
        """Exits on a detector of this architecture."""
        model = EarlyExitSSDLite(
            detector,
            exit_layers=self.exit_layers,
            channels=self.channels,
            depth=self.depth,
            copy=self.copy,
            head_rank=self.head_rank,
            empty=self.empty,
            classes=self.classes,
        )
        model.score_thresh = self.score_thresh
        return model

    def build(self) -> EarlyExitSSDLite:
        """The whole model, untrained."""
        if not self.folded_branches:
            return self.add_exits(self.build_detector())
        whole = tuple(f"class_{row}" for row in range(1, self.head_outputs))
        unfolded = {"classes": whole, "head_outputs": 0, "folded_rows": (), "folded_branches": False}
        model = dataclasses.replace(self, score_thresh=self.lowest_score, **unfolded).build()
        fold_model(model, self.classes, self.folded_rows)
        model.score_thresh = self.score_thresh
        return model


def fold_model(model: EarlyExitSSDLite, classes: Sequence[str], rows: Sequence[int]) -> None:
    """Give a model the ``classes`` in the ``rows`` of its heads, the full path's and the branches', and fold the others
    into background, so that every score stays what it was."""
    for part in (model, *model.branches.values()):
        if hasattr(part, "head"):
            part.head.classification_head = FoldedClassificationHead(part.head.classification_head, rows)
        else:
            part.num_classes = len(classes) + 1
    model.classes = tuple(classes)


def _fixed(model: EarlyExitSSDLite) -> dict[str, object]:
    """What a description fixes, by name."""
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items() if not key.startswith("router.")}
    normalisation = {name: list(getattr(model.transform, name)) for name in ("image_mean", "image_std", "fixed_size")}
    return {**shapes, **normalisation, "anchor_generator": repr(model.anchor_generator)}
