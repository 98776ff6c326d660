"""Broken records: each kind has one name, one repair and one counted warning."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any

from earlyexit_ssd.config.check import CHOICES
from earlyexit_ssd.errors import DataError, one_line

logger = logging.getLogger(__name__)

# What to do with broken records: repair them and count, refuse the first one, or skip their photos.
MODES = CHOICES["DATA.ON_BAD"]

# What `repair` does about each kind of problem; formats add their own.
REPAIRS = {
    "box outside the photo": "clipped, or dropped where nothing of it is inside",
    "box without area": "dropped",
    "box with NaN or infinity": "dropped",
    "malformed box": "dropped",
    "box in shares of the photo": "dropped; multiply it by width and height",
    "unusable flag": "taken as not set",
    "two names of one class": "joined",
    "one file under two ids": "copies dropped; all of them dropped where their objects differ",
    "photo outside the photo folder": "photo dropped; DATA.ALLOW_OUTSIDE True takes it",
    "two photos of one name": "photo dropped, since nobody knows whose boxes these are",
    "photo of another name than its annotations": "the one taken that <filename> names",
    "unknown label": "box dropped",
    "annotation without a needed key": "dropped",
    "annotation of an unknown photo": "dropped",
    "malformed annotation id": "its place in the file taken",
    "unusable area": "the box's own taken",
    "duplicate annotation id": "copies dropped, different boxes kept",
    "duplicate photo id": "copies dropped; dropped both where they are different photos",
    "malformed photo entry": "dropped",
    "photo without width and height": "taken from the file",
    "unreadable annotation file": "photo dropped",
    "missing photo file": "photo dropped",
    "unreadable photo file": "photo dropped",
    "photo of another size than annotated": "boxes scaled",
    "photo with width and height swapped": "swapped back, boxes as they are",
    "grey photo": "read as RGB",
    "palette photo": "read as RGB",
    "photo with transparency": "laid on white",
    "photo of more than 8 bits": "scaled to 8 bits",
    "CMYK photo": "read as RGB",
    "photo of other colours": "read as RGB",
    "EXIF-rotated photo": "turned as its annotated size says",
    # said of a data set and no fault in a record, so that it is never refused
    "photo without annotations": "left out",
    "file of another kind": "left out",
    "set with small boxes only": "taken as pixels; are they percent or thousandths of the photo?",
}


class Problems:
    """Collects the problems of one data set by kind.

    ``on_bad``: "repair" counts them (the caller repairs), "refuse" raises at the first, "skip" counts them and
    remembers their photos, which are then left out.
    """

    def __init__(self, on_bad: str = "repair") -> None:
        if on_bad not in MODES:
            raise DataError(f"DATA.ON_BAD is {on_bad!r}, expected one of {', '.join(MODES)}")
        self.on_bad = on_bad
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self._left_out: set[int] = set()
        self._skips: Counter[str] = Counter()

    def add(self, kind: str, message: str, image_id: int | None = None) -> None:
        """Note a problem of photo ``image_id`` (None: of no photo), in mode "refuse" as a DataError; ``message`` names
        file, record and value."""
        if self.on_bad == "refuse":
            raise DataError(f"{message}: {kind}; correct it, or set DATA.ON_BAD to repair or skip")
        self.note(kind, message)
        if self.on_bad == "skip" and image_id is not None:
            self._left_out.add(image_id)
            self._skips[kind] += 1

    def note(self, kind: str, message: str) -> None:
        """Count what is no fault of a record, in any mode."""
        self.counts[kind] += 1
        self.examples.setdefault(kind, message)

    def leave_out(self, image_id: int) -> None:
        """Drop this photo whatever the mode is: it cannot be repaired."""
        self._left_out.add(image_id)

    def keeps(self, image_id: int) -> bool:
        """Whether the photo stays in the data set."""
        return image_id not in self._left_out

    def kept(self, records: Iterable[Any]) -> tuple[Any, ...]:
        """The records of photos that stay."""
        return tuple(record for record in records if self.keeps(record.image_id))

    def log(self, name: str) -> None:
        """One warning per kind: how many, what was done, and the first of them. Forgets the counts."""
        for kind, count in self.counts.items():
            done = REPAIRS[kind]
            if skips := self._skips[kind]:
                done = "photo left out" + (f", or {done} where no photo is known" if skips < count else "")
            logger.warning("%s: %d x %s (%s); the first: %s", name, count, kind, done, one_line(self.examples[kind]))
        for notes in (self.counts, self.examples, self._skips):
            notes.clear()
