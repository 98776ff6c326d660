"""Warn when the photos at run time no longer look like those that the router was calibrated on."""

from __future__ import annotations

import itertools
import logging
import threading
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Any, NamedTuple, TypedDict

import numpy as np

from earlyexit_ssd.errors import EarlyExitError, import_package, suggest_keywords
from earlyexit_ssd.plain import build, check_fields

logger = logging.getLogger(__name__)

Values = Any  # a tensor, an array or a list of numbers
QUANTILES = 21  # stored of the confidences at an exit: those at levels 0, 1/20, ..., 1
WINDOW = 200  # photos that are compared with those of calibration at a time
ALPHA = 0.001  # probability of a false alarm per check
DRAWS = 1000  # frames that a `DriftRecord` keeps
ADVICE = "calibrate again, the certificate speaks of other photos"


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
    """What the photos of calibration did, small enough for the certificate. An EarlyExitError for values that cannot
    come from one calibration.

    ``confidences`` are, per early exit, the `QUANTILES` quantiles of the confidences there of the photos that left
    there (each one of the confidences itself, not rounded); empty where none left.
    """

    photos: Annotated[int, 1, 2**63]
    exit_names: tuple[str, ...]  # shallow to deep, the full path last
    exit_counts: tuple[Annotated[int, 0, 2**63], ...]  # photos that left at each exit; they sum to photos
    confidences: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        check_fields(self)
        names, counts = self.exit_names, list(self.exit_counts)
        if len(names) < 2 or len(set(names)) < len(names):
            raise EarlyExitError(f"exit_names {names}: expected early exits and the full path, no name twice")
        if len(counts) != len(names) or sum(counts) != self.photos:
            raise EarlyExitError(
                f"exit_counts {counts}: expected one for each of {len(names)} exits, sum {self.photos}"
            )
        if len(self.confidences) != len(names) - 1:
            found = f"confidences of {len(self.confidences)} exits"
            raise EarlyExitError(f"{found}: expected the {len(names) - 1} early ones")
        for name, count, quantiles in zip(names, counts, self.confidences, strict=False):
            if len(quantiles) != (QUANTILES if count else 0):
                found = f"{len(quantiles)} quantiles for {count} photos"
                raise EarlyExitError(f"confidences of {name}: {found}, expected {QUANTILES}, or none for no photo")
            for before, value in itertools.pairwise(quantiles):
                if value < before:
                    raise EarlyExitError(f"confidences of {name} have {value}, expected numbers >= {before}")

    @classmethod
    def from_decisions(cls, exit_names: Sequence[str], exit_index: Values, confidences: Sequence[Values]) -> Reference:
        """From the exit that each photo took, int [n], and per early exit each photo's confidence there, [n], which is
        looked at only where the photo left."""
        taken = _exits(exit_index, exit_names)
        left = [_numbers(values, len(taken))[taken == index] for index, values in enumerate(confidences)]
        counts = np.bincount(taken, minlength=len(exit_names)).tolist()
        return cls(len(taken), tuple(exit_names), tuple(counts), tuple(map(sample_quantiles, left)))

    @property
    def exit_shares(self) -> dict[str, float]:
        """Exit name -> share of the photos that left there, in [0, 1]."""
        return self.shares_of(self.exit_counts)

    def shares_of(self, counts: Sequence[int]) -> dict[str, float]:
        """The same for any counts of photos by exit, not all 0."""
        return {name: count / sum(counts) for name, count in zip(self.exit_names, counts, strict=True)}

    @property
    def tests(self) -> int:
        """Number of tests: one for the share of each exit, and one for the confidences at each early exit."""
        return 2 * len(self.exit_names) - 1


def _exits(values: Values, names: Sequence[str]) -> np.ndarray:
    """Indices of exits, checked, int64 [m]."""
    array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):  # an empty list is a float to numpy
        found = f"exit_index {array.dtype} {array.shape}"
        raise EarlyExitError(f"{found}: expected whole numbers [m]; stack the detections'")
    for wrong in array[(array < 0) | (array >= len(names))][:1]:
        known = f"0 to {len(names) - 1}: {', '.join(names)}"
        raise EarlyExitError(f"exit_index has {wrong}, the reference knows {known}")
    return array.astype(np.int64)


def _numbers(values: Values, count: int) -> np.ndarray:
    """float64 [count]."""
    array = np.asarray(values.detach().cpu().double() if hasattr(values, "detach") else values, np.float64)
    if array.shape != (count,):
        raise EarlyExitError(f"confidence has shape {array.shape}, expected ({count},), one per exit_index")
    return array


# The tests.


def _stats() -> ModuleType:
    """scipy.stats; an EarlyExitError on a device that lacks scipy."""
    import_package("scipy")  # the name that pip knows
    return import_package("scipy.stats")


def fisher_p_value(count: int, photos: int, before: int, photos_before: int) -> float:
    """Two-sided p-value of Fisher's exact test: ``count`` of ``photos`` now, ``before`` of ``photos_before`` then."""
    table = [[count, photos - count], [before, photos_before - before]]
    return float(_stats().fisher_exact(table).pvalue)


def ks_test(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """The two-sample Kolmogorov-Smirnov distance of [n] and [m], at least one value each, and its p-value."""
    with warnings.catch_warnings():  # where rounding takes an exact p-value above 1, scipy takes the asymptotic one
        warnings.simplefilter("ignore", RuntimeWarning)
        result = _stats().ks_2samp(one, other)
    return float(result.statistic), float(result.pvalue)


class _Test(NamedTuple):
    cause: str
    statistic: float
    p_value: float
    text: str


def _tests(reference: Reference, taken: np.ndarray, confidence: np.ndarray, block: int = 1) -> list[_Test]:
    """The exit whose share has changed most (where one rises another falls), and the confidences at each early exit.

    ``taken`` and ``confidence`` [n] are the photos' exits and confidences there; ``block`` photos of calibration count
    as one.
    """
    photos, names = len(taken), reference.exit_names
    counts = np.bincount(taken, minlength=len(names)).tolist()
    known = [max(1, round(count / block)) if count else 0 for count in reference.exit_counts]
    p_values = [fisher_p_value(now, photos, past, sum(known)) for now, past in zip(counts, known, strict=True)]
    index = int(np.argmin(p_values))
    now, before = counts[index] / photos, reference.exit_counts[index] / reference.photos
    last = f"the last {photos} photos" if block == 1 else f"the last {photos} photos (1 frame in {block})"
    text = f"{names[index]} took {100 * now:.3g} % of {last}, {100 * before:.3g} % in calibration"
    found = [_Test("shares", abs(now - before), p_values[index], f"{text} ({_p_text(p_values[index])})")]
    for index, quantiles in enumerate(map(np.array, reference.confidences)):
        values, count = confidence[taken == index], known[index]
        if count and len(values):  # else nothing to compare; the shares tell
            statistic, p_value = ks_test(values, nearest_sample(values, quantiles, count))
            median = f"median {np.median(values):.3g} of {len(values)} among {last}"
            text = f"the confidences at {names[index]} have moved, {median}"
            text += f", {quantiles[QUANTILES // 2]:.3g} in calibration"
            found.append(_Test(f"confidences {index}", statistic, p_value, f"{text} ({_p_text(p_value)})"))
    return found


def _p_text(p_value: float) -> str:
    return "p < 1e-15" if p_value < 1e-15 else f"p = {p_value:.0e}".replace("e-0", "e-")


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
    def __init__(self, reference: Reference, window: int = WINDOW, alpha: float = ALPHA) -> None:
        if type(window) is not int or window < 1:
            raise EarlyExitError(f"window {window}: expected a whole number of photos, at least 1")
        if not 0 < alpha < 1:
            raise EarlyExitError(f"alpha {alpha}: expected a number in (0, 1), such as 0.001")
        self.reference, self.window, self.alpha = reference, window, alpha
        self._last: deque[tuple[int, float]] = deque(maxlen=window)
        self._photos, self._until_check = 0, window
        self._level = alpha / reference.tests
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
        taken = [exit_index for exit_index, _ in self._last]
        counts = [taken.count(index) for index in range(len(self.reference.exit_names))]
        return {
            "photos": self._photos,
            "in_window": len(taken),
            "shares": self.reference.shares_of(counts) if taken else None,
            "calibration_shares": self.reference.exit_shares,
            "warnings": list(self._active.values()),
        }

    def _check(self) -> dict[str, str]:
        """Compare, log, and return the warnings by cause."""
        self._until_check = (self.window + 1) // 2
        taken, confidence = (np.array(values) for values in zip(*self._last, strict=True))
        told = [test for test in _tests(self.reference, taken, confidence) if test.p_value <= self._level]
        self._active = {test.cause: f"drift: {test.text}: {ADVICE}" for test in told}
        for cause, warning in self._active.items():
            if self._photos - self._logged_at.get(cause, -self.window) >= self.window:
                self._logged_at[cause] = self._photos
                logger.warning(warning)
        return self._active


@dataclass(frozen=True)
class Drift:
    """The last photos held against those of calibration. The ``statistic`` of the test with the smallest p-value is
    the difference of an exit's shares, or the Kolmogorov-Smirnov distance of the confidences at an early exit."""

    photos: int  # compared, at least 1; of frames, one of each block
    shares: dict[str, float]  # exit name -> share of the photos that left there, in [0, 1]
    calibration_shares: dict[str, float]
    statistic: float  # in [0, 1]
    p_value: float  # of that test, times the number of tests (Bonferroni), at most 1
    drifted: bool  # p_value is at most ALPHA
    text: str  # one line; where it drifted, what has changed and what to do


class _Target(TypedDict, total=False):
    block: Annotated[int, 1, 2**31] | None


class _Certificate(TypedDict):
    drift: Reference
    target: _Target


class DriftRecord:
    """The decisions on the last frames of a detector, for a comparison on demand. Threads may share it.

    The tests are those of `DriftMonitor`, and take photos for independent draws. Frames of a video repeat: a hundred
    alike say as much as one, and the p-value would be far too small. So of each ``block`` frames (1 or more) only the
    first is kept, `DRAWS` of them at most, and ``block`` photos of calibration count as one. The p-value holds if
    blocks are independent. It is that of one comparison: who asks often meets a false alarm sooner.
    """

    def __init__(self, reference: Reference, block: int = 1) -> None:
        self.reference, self.block = reference, block
        self._kept: deque[tuple[int, float]] = deque(maxlen=DRAWS)
        self._frames, self._lock = 0, threading.Lock()

    @classmethod
    def of(cls, certificate: Any, exit_names: Sequence[str]) -> DriftRecord:
        """With the reference and the block of a certificate, given as its JSON; 1 where it has no block. An
        EarlyExitError for what is no certificate, or one for other exits than ``exit_names``."""
        read = build(_Certificate, certificate, "certificate")
        calibrated, own = (", ".join(names[:-1]) for names in (read["drift"].exit_names, exit_names))
        if calibrated != own:
            raise EarlyExitError(f"the certificate is for the exits {calibrated}, the detector has {own}")
        return cls(read["drift"], read["target"].get("block") or 1)

    def add(self, exit_index: int, confidence: float | None) -> None:
        """Take the next frame's decision; the confidence at the full path may be anything."""
        with self._lock:
            if self._frames % self.block == 0:
                self._kept.append((exit_index, np.nan if confidence is None else confidence))
            self._frames += 1

    def drift(self) -> Drift | None:
        """Compare what is kept with the calibration; None before the first frame."""
        with self._lock:
            kept = list(self._kept)
        if not kept:
            return None
        reference = self.reference
        taken, confidence = (np.array(values) for values in zip(*kept, strict=True))
        nearest = min(_tests(reference, taken, confidence, self.block), key=lambda test: test.p_value)
        p_value = min(1.0, reference.tests * nearest.p_value)
        shares = reference.shares_of(np.bincount(taken, minlength=len(reference.exit_names)).tolist())
        drifted = p_value <= ALPHA
        text = f"drift: {nearest.text}: {ADVICE}" if drifted else f"no drift in {len(kept)} photos (p = {p_value:.2g})"
        return Drift(len(kept), shares, reference.exit_shares, nearest.statistic, p_value, drifted, text)
