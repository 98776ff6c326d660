"""What the photos of calibration did, for the certificate, and the checks of such decisions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from torch import Tensor

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.plain import build, check_fields
from earlyexit_ssd.routing.two_sample import QUANTILES, sample_quantiles

Values = Tensor | np.ndarray | Sequence[float]


@dataclass(frozen=True)
class Reference:
    """What the photos of calibration did, small enough for the certificate.

    Attributes:
        photos: how many there were, at least 1.
        exit_names: shallow to deep, the full path last.
        exit_counts: photos that left at each exit, the full path last; they sum to ``photos``.
        confidences: per early exit, of the confidences there of the photos that left there, the :data:`QUANTILES`
            quantiles (each one of the confidences itself, not rounded); empty where none left.

    Raises:
        EarlyExitError: values that cannot come from one calibration.
    """

    photos: Annotated[int, 1, 2**63]
    exit_names: tuple[str, ...]
    exit_counts: tuple[Annotated[int, 0, 2**63], ...]
    confidences: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        check_fields(self)
        exits, counts = len(self.exit_names), list(self.exit_counts)
        if exits < 2 or len(set(self.exit_names)) < exits:
            raise EarlyExitError(f"exit_names {self.exit_names}: expected early exits and the full path, no name twice")
        if len(counts) != exits or sum(counts) != self.photos:
            raise EarlyExitError(f"exit_counts {counts}: expected one for each of {exits} exits, sum {self.photos}")
        if len(self.confidences) != exits - 1:
            raise EarlyExitError(f"confidences of {len(self.confidences)} exits: expected the {exits - 1} early ones")
        for name, count, quantiles in zip(self.exit_names, counts, self.confidences, strict=False):
            if len(quantiles) != (QUANTILES if count else 0):
                found = f"{len(quantiles)} quantiles for {count} photos"
                raise EarlyExitError(f"confidences of {name}: {found}, expected {QUANTILES}, or none for no photo")
            for before, value in zip((-math.inf, *quantiles), quantiles, strict=False):
                if value < before:
                    raise EarlyExitError(f"confidences of {name} have {value}, expected numbers >= {before}")

    @classmethod
    def from_decisions(cls, exit_names: Sequence[str], exit_index: Values, confidences: Sequence[Values]) -> Reference:
        """Of the decisions on the photos of calibration.

        Args:
            exit_names: shallow to deep, the full path last.
            exit_index: int [n], the exit that each photo took; the full path is the last name's index.
            confidences: per early exit [n], each photo's confidence there; looked at only where the photo left.

        Raises:
            EarlyExitError: shapes that do not fit, an exit that has no name, a confidence that is no finite number.
        """
        taken = exit_indices(exit_index, exit_names)
        left = [numbers(values, len(taken))[taken == index] for index, values in enumerate(confidences)]
        counts = np.bincount(taken, minlength=len(exit_names)).tolist()
        return cls(len(taken), tuple(exit_names), tuple(counts), tuple(map(sample_quantiles, left)))

    def to_dict(self) -> dict:
        """Plain types for JSON."""
        return {
            "photos": self.photos,
            "exit_names": list(self.exit_names),
            "exit_counts": list(self.exit_counts),
            "confidences": [list(quantiles) for quantiles in self.confidences],
        }

    @classmethod
    def from_dict(cls, values: dict) -> Reference:
        """The reference that :meth:`to_dict` wrote.

        Raises:
            EarlyExitError: other keys, types or values; the certificate is damaged or of another kind.
        """
        try:
            return build(cls, values, "drift")
        except EarlyExitError as error:
            raise EarlyExitError(f"drift reference cannot be read ({error}); calibrate again") from None


def exit_indices(values: Values, names: Sequence[str]) -> np.ndarray:
    """Indices of exits, checked, int64 [m]."""
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):  # an empty list is a float to numpy
        raise EarlyExitError(
            f"exit_index {array.dtype} {array.shape}: expected whole numbers [m]; stack the detections'"
        )
    wrong = array[(array < 0) | (array >= len(names))]
    if wrong.size:
        raise EarlyExitError(
            f"exit_index has {wrong[0]}, the reference knows 0 to {len(names) - 1}: {', '.join(names)}"
        )
    return array.astype(np.int64)


def numbers(values: Values, count: int) -> np.ndarray:
    """float64 [count]."""
    array = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values, np.float64)
    if array.shape != (count,):
        raise EarlyExitError(f"confidence has shape {array.shape}, expected ({count},), one per exit_index")
    return array
