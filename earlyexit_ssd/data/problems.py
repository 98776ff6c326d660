"""Problems of photos and annotations: their kinds, their repairs, and one warning per kind."""

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any

from earlyexit_ssd.config.check import CHOICES
from earlyexit_ssd.errors import DataError, one_line, suggest

logger = logging.getLogger(__name__)

MODES = CHOICES["DATA.ON_BAD"]

# Kind of problem -> what mode "repair" does. Formats add their own kinds.
REPAIRS = {
    "box outside the photo": "clipped, or dropped if it is wholly outside",
    "box without area": "dropped",
    "box with NaN or infinity": "dropped",
    "malformed box": "dropped",
    "normalized box": "dropped; multiply it by the photo's width and height",
    "unusable flag": "treated as not set",
    "two names of one class": "merged into one class",
    "one file under two ids": "duplicates dropped, or all entries of the file if their objects differ",
    "photo outside the photo folder": "photo dropped; set DATA.ALLOW_OUTSIDE to True to read it",
    "two photos of one name": "photo dropped, because the boxes may belong to either file",
    "photo of another name than its annotations": "the photo in <filename> used",
    "unknown label": "box dropped",
    "annotation without a needed key": "dropped",
    "annotation of an unknown photo": "dropped",
    "malformed annotation id": "replaced by its index in the file",
    "unusable area": "area of the box used",
    "duplicate annotation id": "equal boxes dropped, different boxes kept",
    "duplicate photo id": "duplicates dropped, or all entries if their files differ",
    "malformed photo entry": "dropped",
    "photo without width and height": "read from the photo file",
    "unreadable annotation file": "photo dropped",
    "missing photo file": "photo dropped",
    "unreadable photo file": "photo dropped",
    "photo of another size than annotated": "boxes scaled",
    "photo with width and height swapped": "size corrected, boxes unchanged",
    "grey photo": "read as RGB",
    "palette photo": "read as RGB",
    "photo with transparency": "blended with white",
    "photo of more than 8 bits": "scaled to 8 bits",
    "CMYK photo": "read as RGB",
    "photo of other colours": "read as RGB",
    "EXIF-rotated photo": "rotated upright, unless its annotated size is that of the stored image",
    # for `Problems.note`: not an error of a record, so never refused
    "photo without annotations": "left out",
    "file of another kind": "left out",
    "set with small boxes only": "treated as pixels; check that they are not percent or thousandths of the photo",
}


class Problems:
    """The problems of one data set, counted by kind. Mode "repair" counts problems, and the caller repairs the records.
    "refuse" raises at the first problem. "skip" counts problems and leaves out their photos."""

    def __init__(self, on_bad: str = "repair") -> None:
        if on_bad not in MODES:
            raise DataError(f"DATA.ON_BAD is {on_bad!r}, expected one of {', '.join(MODES)}")
        self.on_bad = on_bad
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self._left_out: set[int] = set()
        self._skips: Counter[str] = Counter()

    def add(self, kind: str, message: str, image_id: int | None = None) -> None:
        """Count a problem of photo ``image_id`` (None: unknown). Raise DataError in mode "refuse".

        ``message`` has the file, the record and the value, for the error and as the example in the warning.
        """
        if self.on_bad == "refuse":
            raise DataError(f"{message}: {kind}; correct it, or set DATA.ON_BAD to repair or skip")
        self.note(kind, message)
        if self.on_bad == "skip" and image_id is not None:
            self._left_out.add(image_id)
            self._skips[kind] += 1

    def note(self, kind: str, message: str) -> None:
        """Count something that is not an error of a record. It is never refused, and no photo is left out. Raise
        DataError if the kind is none of `REPAIRS`."""
        if kind not in REPAIRS:
            fix = "name a kind of REPAIRS, or give its repair to register_format"
            raise DataError(f"{message}: {kind!r} is no kind of problem{suggest(kind, REPAIRS)}; {fix}")
        self.counts[kind] += 1
        self.examples.setdefault(kind, message)

    def leave_out(self, image_id: int) -> None:
        """Leave out a photo that cannot be repaired, in every mode."""
        self._left_out.add(image_id)

    def keeps(self, image_id: int) -> bool:
        """Return whether the photo stays in the data set."""
        return image_id not in self._left_out

    def kept(self, records: Iterable[Any]) -> tuple[Any, ...]:
        """Return the records of the photos that stay in the data set."""
        return tuple(record for record in records if self.keeps(record.image_id))

    def log(self, name: str) -> None:
        """Log one warning per kind with the count, the repair and the first example. Then reset the counts."""
        for kind, count in self.counts.items():
            repair = REPAIRS[kind]
            if skips := self._skips[kind]:
                repair = "photo left out" + (f", or {repair} if the photo is unknown" if skips < count else "")
            logger.warning("%s: %d x %s (%s); the first: %s", name, count, kind, repair, one_line(self.examples[kind]))
        self.counts.clear()
        self.examples.clear()
        self._skips.clear()
