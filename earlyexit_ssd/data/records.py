"""What a data set is once it is read: photos with boxes, whatever the file format was."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Annotation:
    """One object.

    Attributes:
        box: x1, y1, x2, y2 in absolute pixels of the photo, 0-based; width is ``x2 - x1``.
        label: 1..K, the class's place in the list of classes plus one; 0 is no class.
        ignore: COCO crowd or VOC difficult: never a training target, and detections on it are not counted.
        area: area in square pixels that sorts the object into small, medium and large; None: the box's own.
            (COCO gives the area of the object's outline, which is smaller.)
        id: the number of this object in its file, for messages.
    """

    box: tuple[float, float, float, float]
    label: int
    ignore: bool = False
    area: float | None = None
    id: int | str = 0


@dataclass(frozen=True, slots=True)
class Record:
    """One photo with its objects; ``width`` and ``height`` are those of the picture that the boxes refer to.

    ``source`` is the file that the annotations came from, for messages.
    """

    image_id: int
    path: Path
    width: int
    height: int
    annotations: tuple[Annotation, ...] = ()
    source: Path | None = None

    @property
    def has_targets(self) -> bool:
        """Whether any object is a training target; crowds and difficult objects are not."""
        return any(not annotation.ignore for annotation in self.annotations)


@dataclass(frozen=True)
class RawDataset:
    """What a reader returns, before checks and class filter; labels index ``classes``.

    ``open_classes``: the format declares no classes, so that ``classes`` are those that occur and others may not.
    ``labelled``: False for photos that nobody has looked at: that no box is there says nothing about them.
    """

    name: str
    classes: tuple[str, ...]
    records: tuple[Record, ...]
    open_classes: bool = False
    labelled: bool = True
