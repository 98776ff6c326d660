"""Warn when the photos at run time no longer look like those that the router was calibrated on."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from scipy.stats import fisher_exact, ks_2samp
from torch import Tensor

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.keywords import suggest_keywords
from earlyexit_ssd.plain import check_fields

logger = logging.getLogger(__name__)

Values = Tensor | np.ndarray | Sequence[float]

QUANTILES = 21
"""Stored of the confidences at an exit: those at levels 0, 1/20, ..., 1."""

WINDOW = 200
"""Photos that are compared with those of calibration at a time."""


def _ranks(count: int) -> np.ndarray:
    """The place of each quantile in a sorted sample of ``count``: of level j / 20 the smallest value that at least this
    share does not exceed."""
    steps = QUANTILES - 1
    return np.maximum((np.arange(QUANTILES) * count + steps - 1) // steps, 1) - 1  # whole numbers, to be exact


def sample_quantiles(values: np.ndarray) -> tuple[float, ...]:
    """The `QUANTILES` quantiles of [n], each one of the values; none of an empty sample."""
    return tuple(np.sort(values)[_ranks(len(values))].tolist()) if len(values) else ()


def nearest_sample(values: np.ndarray, quantiles: np.ndarray, count: int) -> np.ndarray:
    """A sorted sample [count] that has these ``quantiles`` and is otherwise as like ``values`` [m] as they allow.

    Each place is filled with the value at that level of ``values``, moved into the quantiles before and after it. Its
    Kolmogorov-Smirnov distance from ``values`` is at most the larger of 1 / (2 count) and that of the sample which the
    quantiles are from, so its p-value is conservative, with ties too.
    """
    places, known = np.arange(count), _ranks(count)
    low = quantiles[np.searchsorted(known, places, side="right") - 1]
    high = quantiles[np.searchsorted(known, places, side="left")]
    return np.clip(np.quantile(values, (places + 0.5) / count, method="inverted_cdf"), low, high)


@dataclass(frozen=True)
class Reference:
    """What the photos of calibration did, small enough for the certificate.

    Attributes:
        photos: how many there were, at least 1; exit_names: shallow to deep, the full path last.
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
        names, counts = self.exit_names, list(self.exit_counts)
        if len(names) < 2 or len(set(names)) < len(names):
            raise EarlyExitError(f"exit_names {names}: expected early exits and the full path, no name twice")
        if len(counts) != len(names) or sum(counts) != self.photos:
            expected = f"expected one for each of {len(names)} exits, sum {self.photos}"
            raise EarlyExitError(f"exit_counts {counts}: {expected}")
        early = len(self.confidences)
        if early != len(names) - 1:
            raise EarlyExitError(f"confidences of {early} exits: expected the {len(names) - 1} early ones")
        for name, count, quantiles in zip(names, counts, self.confidences, strict=False):
            if len(quantiles) != (QUANTILES if count else 0):
                found = f"{len(quantiles)} quantiles for {count} photos"
                raise EarlyExitError(f"confidences of {name}: {found}, expected {QUANTILES}, or none for no photo")
            for before, value in itertools.pairwise(quantiles):
                if value < before:
                    raise EarlyExitError(f"confidences of {name} have {value}, expected numbers >= {before}")

    @classmethod
    def from_decisions(cls, exit_names: Sequence[str], exit_index: Values, confidences: Sequence[Values]) -> Reference:
        """What the decisions on the photos of calibration say.

        Args:
            exit_names: shallow to deep, the full path last.
            exit_index: int [n], the exit that each photo took.
            confidences: per early exit [n], each photo's confidence there; looked at only where the photo left.

        """
        taken = _exits(exit_index, exit_names)
        left = [_numbers(values, len(taken))[taken == index] for index, values in enumerate(confidences)]
        counts = np.bincount(taken, minlength=len(exit_names)).tolist()
        return cls(len(taken), tuple(exit_names), tuple(counts), tuple(map(sample_quantiles, left)))


def _exits(values: Values, names: Sequence[str]) -> np.ndarray:
    """Indices of exits, checked, int64 [m]."""
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):  # an empty list is a float to numpy
        found = f"exit_index {array.dtype} {array.shape}"
        raise EarlyExitError(f"{found}: expected whole numbers [m]; stack the detections'")
    for wrong in array[(array < 0) | (array >= len(names))][:1]:
        known = f"0 to {len(names) - 1}: {', '.join(names)}"
        raise EarlyExitError(f"exit_index has {wrong}, the reference knows {known}")
    return array.astype(np.int64)


def _numbers(values: Values, count: int) -> np.ndarray:
    """float64 [count]."""
    array = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values, np.float64)
    if array.shape != (count,):
        raise EarlyExitError(f"confidence has shape {array.shape}, expected ({count},), one per exit_index")
    return array


class DriftMonitor:
    """Compare the last photos with those of calibration: how many leave at which exit, and how confident they are.

    When ``window`` photos are there, and again after every half window, the share of each exit is compared by Fisher's
    exact test, and the confidences of the photos that left at an early exit by a two-sample Kolmogorov-Smirnov test
    against :func:`nearest_sample`. Both allow for the calibration having seen a finite sample too.

    **False alarms.** A check spends ``alpha``, split evenly over its tests (Bonferroni), so for photos like those of
    calibration the expected number of checks that warn is at most ``20,000 * alpha / window`` in 10,000 photos: 0.1 by
    default. It is an expectation over calibrations too: after an unlucky one false alarms come in bursts. It holds for
    photos that are drawn independently. Of the frames of a video pass on only some, seconds apart.

    Args:
        window: photos that are compared, at least 1; fewer react faster and see only larger changes.
        alpha: probability of a false alarm per check, in (0, 1).
    """

    @suggest_keywords
    def __init__(self, reference: Reference, window: int = WINDOW, alpha: float = 0.001) -> None:
        if type(window) is not int or window < 1:
            raise EarlyExitError(f"window {window}: expected a whole number of photos, at least 1")
        if not 0 < alpha < 1:
            raise EarlyExitError(f"alpha {alpha}: expected a number in (0, 1), such as 0.001")
        self.reference, self.window, self.alpha = reference, window, alpha
        self._last: deque[tuple[int, float]] = deque(maxlen=window)
        self._photos, self._until_check = 0, window
        self._level = alpha / (2 * len(reference.exit_names) - 1)  # a test per share and per early exit's confidences
        self._active: dict[str, str] = {}
        self._logged_at: dict[str, int] = {}

    def update(self, exit_index: Values, confidence: Values) -> list[str]:
        """Take the decisions of a batch, in the order of the photos; how they are cut into batches changes no test.

        Args:
            exit_index: int [m], the exit that each photo took.
            confidence: [m], its confidence there; at the full path it may be anything, also NaN.

        Returns:
            one line per cause that a check within these photos warned of; each is logged once per ``window`` photos.

        Raises:
            EarlyExitError: decisions of another model, or not finite; none of the batch is taken then.
        """
        names = self.reference.exit_names
        taken = _exits(exit_index, names)
        confidence = _numbers(confidence, len(taken))
        for photo in np.flatnonzero((taken < len(names) - 1) & ~np.isfinite(confidence)):
            where = f"confidence of photo {photo} at {names[taken[photo]]}"
            raise EarlyExitError(f"{where} is {confidence[photo]}, expected a finite number; look at photo and weights")
        found: dict[str, str] = {}
        for decision in zip(taken.tolist(), confidence.tolist(), strict=True):
            self._last.append(decision)
            self._photos, self._until_check = self._photos + 1, self._until_check - 1
            if self._until_check == 0:
                found |= self._check()
        return list(found.values())

    def status(self) -> dict:
        """``photos`` seen, ``in_window`` of them kept, the exits' ``shares`` of these by name (None before the first
        photo), their ``calibration_shares``, and the ``warnings`` of the last check."""
        reference, size = self.reference, len(self._last)
        taken = [exit_index for exit_index, _ in self._last]
        shares = {name: taken.count(index) / size for index, name in enumerate(reference.exit_names)} if size else None
        before = zip(reference.exit_names, reference.exit_counts, strict=True)
        return {
            "photos": self._photos,
            "in_window": size,
            "shares": shares,
            "calibration_shares": {name: count / reference.photos for name, count in before},
            "warnings": list(self._active.values()),
        }

    def _check(self) -> dict[str, str]:
        """Compare, log, and return the warnings by cause."""
        self._until_check = (self.window + 1) // 2
        taken, confidence = (np.array(values) for values in zip(*self._last, strict=True))
        causes = {"shares": self._share_warning(taken)}
        for index in range(len(self.reference.confidences)):
            causes[f"confidences {index}"] = self._confidence_warning(index, confidence[taken == index])
        advice = "calibrate again, the certificate speaks of other photos"
        self._active = {cause: f"drift: {text}: {advice}" for cause, text in causes.items() if text}
        for cause, warning in self._active.items():
            if self._photos - self._logged_at.get(cause, -self.window) >= self.window:
                self._logged_at[cause] = self._photos
                logger.warning(warning)
        return self._active

    def _share_warning(self, taken: np.ndarray) -> str | None:
        """About the exit whose share [window] has changed most; where one rises another falls, so one line will do."""
        reference, window = self.reference, self.window
        counts = np.bincount(taken, minlength=len(reference.exit_names)).tolist()
        p_values = [
            fisher_exact([[count, window - count], [before, reference.photos - before]]).pvalue
            for count, before in zip(counts, reference.exit_counts, strict=True)
        ]
        index = int(np.argmin(p_values))
        if p_values[index] > self._level:
            return None
        now, before = counts[index] / window, reference.exit_counts[index] / reference.photos
        took = f"{reference.exit_names[index]} took {100 * now:.3g} % of the last {window} photos"
        return f"{took}, {100 * before:.3g} % in calibration ({_p_text(p_values[index])})"

    def _confidence_warning(self, index: int, confidence: np.ndarray) -> str | None:
        """About the confidences [n] of the photos in the window that left at an early exit."""
        name, count = self.reference.exit_names[index], self.reference.exit_counts[index]
        if not count or not len(confidence):  # nothing to compare; the shares tell
            return None
        quantiles = np.array(self.reference.confidences[index])
        with warnings.catch_warnings():  # where rounding takes an exact p-value above 1, scipy takes the asymptotic one
            warnings.simplefilter("ignore", RuntimeWarning)
            p_value = ks_2samp(confidence, nearest_sample(confidence, quantiles, count)).pvalue
        if p_value > self._level:
            return None
        now = f"median {np.median(confidence):.3g} of {len(confidence)} among the last {self.window} photos"
        before = f"{quantiles[QUANTILES // 2]:.3g} in calibration ({_p_text(p_value)})"
        return f"the confidences at {name} have moved, {now}, {before}"


def _p_text(p_value: float) -> str:
    return "p < 1e-15" if p_value < 1e-15 else f"p = {p_value:.0e}".replace("e-0", "e-")
