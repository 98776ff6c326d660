"""Duplicate photos, and blocks of consecutive video frames.

The guarantee of a calibration holds for independent photos. Duplicates are not independent, so each photo is used once.
Frames of a video are not independent either, so consecutive frames form a block, and blocks are treated as independent.
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

from earlyexit_ssd.console import progress
from earlyexit_ssd.data.dataset import DetectionDataset, photo_hashes
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.images import natural_order, open_photo, orientation_of, to_rgb, turned

logger = logging.getLogger(__name__)

# Largest differences between near-duplicates. 120 photos encoded again (JPEG at quality 30 to 90, WebP, half the size)
# differ by at most 4 bits and 15 grey levels. Different photos differ by 12 bits or more.
MAX_BITS = 4
MAX_GREY = 16
_GRID = 16
_BIT_COUNT = np.array([bin(value).count("1") for value in range(256)], dtype=np.uint8)  # of each uint8


def parse_block(text: str, fps: float | None = None) -> int:
    """Return the number of photos in a block, at least 1. ``text`` is a number of photos such as "25", or seconds such
    as "5s", which need ``fps``, the photos of a folder per second of video. Raise EarlyExitError if ``text`` or ``fps``
    is invalid, or ``fps`` is missing or not needed."""
    match = re.fullmatch(r"\s*(\d{1,6}|\d{0,6}\.?\d{1,6}(?=\s*s))\s*(s?)\s*", str(text))
    value = f"block is {text!r:.60}"
    if match is None or not float(match[1]) > 0:
        raise EarlyExitError(f"{value}, expected photos such as 25, or seconds such as 5s with --fps")
    if not match[2]:
        if fps is not None:
            raise EarlyExitError(f"{value}, a number of photos, but --fps needs seconds such as 5s; remove --fps")
        return int(match[1])
    if fps is None:
        fix = "give --fps, the photos of a folder per second (5 for every fifth frame of a video with 25 per second)"
        raise EarlyExitError(f"{value}, in seconds, but the frame rate is unknown; {fix}, or a number of photos")
    if not 0 < fps < float("inf"):
        raise EarlyExitError(f"fps is {fps:g}, expected photos per second, above 0, such as 5")
    return max(1, round(float(match[1]) * fps))


def block_of_each(paths: Sequence[Path], photos: int) -> np.ndarray:
    """Return the number of the block of each photo, from 0, int64 [len(paths)]. A block has ``photos`` consecutive
    photos of a folder, or fewer at its end. Photos are sorted by name, and numbers in names as numbers."""
    blocks, count = np.zeros(len(paths), dtype=np.int64), 0
    in_order = sorted(range(len(paths)), key=lambda index: natural_order(paths[index]))
    for _, members in itertools.groupby(in_order, lambda index: paths[index].parent):
        indices = list(members)
        blocks[indices] = count + np.arange(len(indices)) // photos
        count = int(blocks[indices[-1]]) + 1
    return blocks


def blocks_of(dataset: DetectionDataset, photos: int | None) -> np.ndarray | None:
    """Return the number of the block of each photo by increasing image id, int64 [n]; None if ``photos`` is None. See
    `block_of_each`."""
    if photos is None:
        return None
    records = sorted(dataset.records, key=lambda record: record.image_id)
    return block_of_each([record.path for record in records], photos)


@dataclass(frozen=True)
class Duplicates:
    """Number of duplicate photos that were left out."""

    equal: int = 0  # with the same content
    near: int = 0  # near-duplicates: the same picture, encoded again
    near_sha256: tuple[str, ...] = ()  # of the files of near-duplicates


def distinct(dataset: DetectionDataset, near: bool = True) -> tuple[DetectionDataset, Duplicates]:
    """Return the data set with the first of all photos that are duplicates of each other, and the number left out.
    ``near`` compares pictures too, not only files. Do not use it for frames of a video, which are similar."""
    digests = [digest for _, digest in photo_hashes(dataset)]
    _, first = np.unique(digests, return_index=True)
    hashes = PerceptualHashes.read([record.path for record in dataset.records]) if near else None
    kept: list[int] = []
    near_duplicates: list[int] = []
    for index in sorted(first.tolist()):
        duplicate = hashes is not None and hashes.has_duplicate_of(hashes.bits[index], hashes.grey[index], kept)
        (near_duplicates if duplicate else kept).append(index)
    near_sha256 = tuple(digests[index] for index in near_duplicates)
    duplicates = Duplicates(len(digests) - len(first), len(near_duplicates), near_sha256)
    if duplicates.near:
        advice = "for frames of a video, use blocks (--block) instead"
        logger.warning("%d of %d photos are near-duplicates and left out; %s", duplicates.near, len(first), advice)
    if duplicates.equal:
        logger.warning("%d of %d photos are duplicates and left out", duplicates.equal, len(digests))
    return dataset.subset([dataset.records[index] for index in kept]), duplicates


@dataclass(frozen=True)
class PerceptualHashes:
    """Difference hashes and grey thumbnails of n photos, to find near-duplicates.

    ``bits``, uint8 [n, 8], is computed from 9 x 8 grey cells. A bit is 1 if a cell is darker than its right neighbour.
    Encoding a photo again changes few bits. So does a small object that moves, but it also changes the thumbnails
    ``grey``, int16 [n, 16, 16].
    """

    bits: np.ndarray
    grey: np.ndarray

    @classmethod
    def read(cls, paths: Sequence[Path]) -> PerceptualHashes:
        """Compute the hashes of photo files. Raise DataError if a file cannot be read."""
        hashes = cls(np.zeros((len(paths), 8), np.uint8), np.zeros((len(paths), _GRID, _GRID), np.int16))
        for index, path in enumerate(progress(paths, desc="compare photos")):
            with open_photo(path) as image:
                image.draft("L", (256, 256))  # decodes a large JPEG at a smaller size
                # upright, with 16 bits scaled to 8, and with transparency blended
                pixels = turned(to_rgb(image), orientation_of(image)).convert("L")
            cells = np.asarray(pixels.resize((9, 8), Image.Resampling.BOX))
            hashes.bits[index] = np.packbits(cells[:, 1:] > cells[:, :-1])
            hashes.grey[index] = pixels.resize((_GRID, _GRID), Image.Resampling.BOX)
        return hashes

    def has_duplicate_of(self, bits: np.ndarray, grey: np.ndarray, among: Sequence[int] | None = None) -> bool:
        """Return whether a photo with ``bits`` [8] and ``grey`` [16, 16] is a near-duplicate of one of these photos.
        ``among`` are the indices of the photos to compare with; None: all."""
        indices = np.arange(len(self.bits)) if among is None else np.array(among, np.int64)
        candidates = indices[_BIT_COUNT[self.bits[indices] ^ bits].sum(1) <= MAX_BITS]
        return any(np.abs(self.grey[candidate] - grey).max() <= MAX_GREY for candidate in candidates)

    def duplicates_of(self, others: PerceptualHashes) -> np.ndarray:
        """Return whether each of these photos is a near-duplicate of any of ``others``, bool [n]."""
        return np.array([others.has_duplicate_of(*hashes) for hashes in zip(self.bits, self.grey, strict=True)], bool)
