"""Photos that are no draws of their own: equal ones, near-equal ones, and the frames of one video.

What calibration promises is for independent draws. A photo that is there three times is one draw, so it counts once.
Frames of one video are not independent either, but no two of them are the same: these are taken block by block.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from earlyexit_ssd.data.dataset import DetectionDataset, photo_hashes
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.images import open_photo
from earlyexit_ssd.progress import progress

logger = logging.getLogger(__name__)

# Measured on 120 photos saved anew (JPEG at quality 30 to 90, WebP, half the size): at most 4 bits and 15 grey levels.
# Of different photos no two are nearer than 12 bits.
MOST_BITS = 4
MOST_GREY = 16
_GRID = 16
_BITS = np.array([bin(value).count("1") for value in range(256)], dtype=np.uint8)


def parse_block(text: str, fps: float | None = None) -> int:
    """How many consecutive photos of a folder make a block, at least 1: ``"25"``, or ``"5s"`` (seconds) where ``fps``
    says how many photos of the folder make one; else an EarlyExitError."""
    found = re.fullmatch(r"\s*(\d{1,6}|\d{0,6}\.?\d{1,6}(?=\s*s))\s*(s?)\s*", str(text))
    asked = f"block is {text!r:.60}"
    if found is None or not float(found[1]) > 0:
        raise EarlyExitError(f"{asked}, expected photos such as 25, or seconds such as 5s with --fps")
    if not found[2]:
        if fps is not None:
            raise EarlyExitError(f"{asked}, photos, so --fps has no part in it; give seconds, such as 5s")
        return int(found[1])
    if fps is None:
        raise EarlyExitError(
            f"{asked}, and photos do not say when they were taken: give --fps, the photos of the folder per "
            "second (of a video at 25 of which every fifth frame was kept: 5), or a number of photos"
        )
    if not 0 < fps < float("inf"):
        raise EarlyExitError(f"fps is {fps:g}, expected photos per second, above 0, such as 5")
    return max(1, round(float(found[1]) * fps))


def block_of_each(paths: Sequence[Path], photos: int) -> np.ndarray:
    """The block of every photo, numbered from 0: so many photos of a folder that follow each other by file name.

    Numbers in names count as numbers, so that 10 follows 9. The last block of a folder may be shorter.
    """

    def place(index: int) -> tuple[str, list[tuple[int, str]]]:
        parts = re.split(r"(\d+)", paths[index].name)
        return str(paths[index].parent), [(int(part), "") if part.isdigit() else (-1, part) for part in parts]

    blocks, count = np.zeros(len(paths), dtype=np.int64), 0
    for _, members in itertools.groupby(sorted(range(len(paths)), key=place), lambda index: paths[index].parent):
        indices = list(members)
        blocks[indices] = count + np.arange(len(indices)) // photos
        count = int(blocks[indices[-1]]) + 1
    return blocks


@dataclass(frozen=True)
class Repeats:
    """Photos that were left out, since another one stands for them."""

    equal: int = 0  # in content
    near: int = 0  # in looks
    near_sha256: tuple[str, ...] = ()  # contents of the latter


def distinct(dataset: DetectionDataset, near: bool = True) -> tuple[DetectionDataset, Repeats]:
    """The data set with each photo once, the first of those that are equal, and what was left out, which is logged.

    With ``near`` the same picture saved anew counts as the same too; this does not suit the frames of a video.
    """
    digests = [digest for _, digest in photo_hashes(dataset)]
    _, first = np.unique(digests, return_index=True)
    looks = Looks.of([record.path for record in dataset.records]) if near else None
    alone: list[int] = []
    alike: list[int] = []
    for index in sorted(first.tolist()):
        known = looks is not None and looks.has(looks.bits[index], looks.grey[index], alone)
        (alike if known else alone).append(index)
    found = Repeats(len(digests) - len(first), len(alike), tuple(digests[index] for index in alike))
    if found.near:
        advice = "if these are frames of a video, calibrate on blocks (--block) instead"
        logger.warning("%d of %d photos look like another one and count once; %s", found.near, len(first), advice)
    if found.equal:
        logger.warning("%d of %d photos are copies of another one and count once", found.equal, len(digests))
    return dataset.subset([dataset.records[index] for index in alone]), found


@dataclass(frozen=True)
class Looks:
    """What n photos look like.

    ``bits``, uint8 [n, 8], is a difference hash: a bit says whether the grey of a cell (9 x 8 of them) is below that of
    its right neighbour. Saved anew, a photo keeps nearly all bits. Where something small moves they stay too, but a
    cell of the small picture ``grey``, int16 [n, 16, 16], changes.
    """

    bits: np.ndarray
    grey: np.ndarray

    @classmethod
    def of(cls, paths: Sequence[Path]) -> Looks:
        """Of these files; a DataError if one cannot be read."""
        looks = cls(np.zeros((len(paths), 8), np.uint8), np.zeros((len(paths), _GRID, _GRID), np.int16))
        for index, path in enumerate(progress(paths, desc="compare photos")):
            with open_photo(path) as image:
                image.draft("L", (256, 256))  # JPEG is decoded no larger than needed
                pixels = image.convert("L")
            cells = np.asarray(pixels.resize((9, 8), Image.Resampling.BOX))
            looks.bits[index] = np.packbits(cells[:, 1:] > cells[:, :-1])
            looks.grey[index] = pixels.resize((_GRID, _GRID), Image.Resampling.BOX)
        return looks

    def has(self, bits: np.ndarray, grey: np.ndarray, among: Sequence[int] | None = None) -> bool:
        """Whether any of the photos (``among`` them) looks like the one with ``bits`` [8] and ``grey`` [16, 16]."""
        indices = np.arange(len(self.bits)) if among is None else np.array(among, np.int64)
        nearest = indices[_BITS[self.bits[indices] ^ bits].sum(1) <= MOST_BITS]
        return any(np.abs(self.grey[other] - grey).max() <= MOST_GREY for other in nearest)

    def like(self, others: Looks) -> np.ndarray:
        """Whether each of these photos looks like any of the ``others``, bool [n]."""
        return np.array([others.has(*one) for one in zip(self.bits, self.grey, strict=True)], bool)
