"""Another detector's classes as those that are evaluated."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from earlyexit_ssd.data import canonical
from earlyexit_ssd.errors import EarlyExitError, nearest

logger = logging.getLogger(__name__)


class WantedClasses(nn.Module):
    """A detector whose labels are those of ``wanted``; what it finds of other classes is dropped.

    Args:
        detector: list of photos to one dict each, with ``boxes`` [n, 4], ``scores`` [n] and ``labels`` [n] in 1..K.
        source: its K names.
        wanted: names of the labels 1.. that are evaluated; names are compared as data sets' are (VOC's, COCO's).
        name: of the detector, for messages.

    Raises:
        EarlyExitError: the detector knows none of the wanted classes.
    """

    def __init__(self, detector: nn.Module, source: Sequence[str], wanted: Sequence[str], name: str) -> None:
        super().__init__()
        labels = {canonical(one): label for label, one in enumerate(wanted, start=1)}
        lookup = [0, *(labels.get(canonical(one), 0) for one in source)]
        absent = [one for label, one in enumerate(wanted, start=1) if label not in lookup]
        if len(absent) == len(wanted):
            raise EarlyExitError(f"{name}: knows none of {', '.join(wanted)}{nearest(wanted[0], source)}")
        if absent:
            logger.warning("%s knows no %s: its AP there is 0", name, ", ".join(absent))
        self.detector = detector
        self.register_buffer("lookup", torch.tensor(lookup))

    def forward(self, photos: list[Tensor]) -> list[dict[str, Tensor]]:
        """Detections of the wanted classes, labelled 1.. in their order."""
        return [self._translate(found) for found in self.detector(photos)]

    def _translate(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        labels = self.lookup[found["labels"]]
        keep = labels > 0
        return {"boxes": found["boxes"][keep], "scores": found["scores"][keep], "labels": labels[keep]}
