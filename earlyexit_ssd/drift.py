"""Detect drift: photos in use leave at other exits, or with other confidences, than the calibration photos did."""

from __future__ import annotations

import itertools
import logging
import threading
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypedDict

import numpy as np

from earlyexit_ssd.errors import EarlyExitError, import_package, suggest_keywords
from earlyexit_ssd.plain import build, check_fields

logger = logging.getLogger(__name__)

Values = Any  # a tensor, an array or a list of numbers
QUANTILES = 21  # number of quantiles stored per early exit, at the levels 0, 1/20, ..., 1
WINDOW = 200  # photos per check
ALPHA = 0.001  # probability of a false alarm per check
MAX_FRAMES = 1000  # largest number of frames in a `DriftRecord`
ADVICE = "calibrate again, because the certificate is for other photos"


def _ranks(count: int) -> np.ndarray:
    """Return the indices [QUANTILES] of the quantiles in a sorted sample of ``count`` values. The quantile of level q
    is the smallest value that is at least as large as a share q of the sample."""
    steps = QUANTILES - 1
    return np.maximum((np.arange(QUANTILES) * count + steps - 1) // steps, 1) - 1  # exact, in integers


def sample_quantiles(values: np.ndarray) -> tuple[float, ...]:
    """Return `QUANTILES` quantiles of ``values`` [n]. Each is an element of the sample. An empty sample has none."""
    return tuple(np.sort(values)[_ranks(len(values))].tolist()) if len(values) else ()


def nearest_sample(values: np.ndarray, quantiles: np.ndarray, count: int) -> np.ndarray:
    """Return the sorted sample [count] that has these ``quantiles`` and is most similar to ``values`` [m].

    It replaces the calibration's sample, of which only the quantiles are stored. Each element is the quantile of
    ``values`` at its rank, clipped to the stored quantiles before and after it. Let D be the Kolmogorov-Smirnov
    distance of the calibration's sample to ``values``. The distance of the returned sample is at most
    max(D, 1 / (2 count)). So the test's p-value is conservative, also with ties. If a block of frames counts as one,
    ``count`` is the number of blocks. Then an element may have the rank of several quantiles, and is clipped to these.
    """
    ranks, stored = np.arange(count), _ranks(count)
    low = quantiles[np.searchsorted(stored, ranks, side="right") - 1]
    high = quantiles[np.searchsorted(stored, ranks, side="left")]
    bounds = np.sort([low, high], axis=0)  # several quantiles of one rank have low above high
    return np.clip(np.quantile(values, (ranks + 0.5) / count, method="inverted_cdf"), *bounds)


@dataclass(frozen=True)
class DriftReference:
    """Exits and confidences of the calibration photos in a certificate. Impossible values raise EarlyExitError."""

    photos: Annotated[int, 1, 2**63]
    exit_names: tuple[str, ...]  # shallow to deep, the full path last
    exit_counts: tuple[Annotated[int, 0, 2**63], ...]  # photos that left at each exit; the sum is photos
    confidences: tuple[tuple[float, ...], ...]  # per early exit: quantiles for the photos that left there, or ()

    def __post_init__(self) -> None:
        check_fields(self)
        names, counts = self.exit_names, list(self.exit_counts)
        if len(names) < 2 or len(set(names)) < len(names):
            raise EarlyExitError(f"exit_names {names}: expected early exits and the full path, no name twice")
        if len(counts) != len(names) or sum(counts) != self.photos:
            expected = f"expected one for each of {len(names)} exits, with the sum {self.photos}"
            raise EarlyExitError(f"exit_counts {counts}: {expected}")
        if len(self.confidences) != len(names) - 1:
            message = f"confidences has {len(self.confidences)} lists"
            raise EarlyExitError(f"{message}, expected one for each of {len(names) - 1} early exits")
        for name, count, quantiles in zip(names, counts, self.confidences, strict=False):
            if len(quantiles) != (QUANTILES if count else 0):
                message = f"confidences of {name}: {len(quantiles)} quantiles for {count} photos"
                raise EarlyExitError(f"{message}, expected {QUANTILES}, or 0 for 0 photos")
            for before, value in itertools.pairwise(quantiles):
                if value < before:
                    raise EarlyExitError(f"confidences of {name} have {value}, expected numbers >= {before}")

    @classmethod
    def from_decisions(
        cls, exit_names: Sequence[str], exit_index: Values, confidences: Sequence[Values]
    ) -> DriftReference:
        """Build the reference from the exit of each photo, int [n], and the confidences of all photos at each early
        exit, [n] each. Only the confidences at a photo's own exit are used."""
        taken = _exits(exit_index, exit_names)
        at_exit = [_numbers(values, len(taken))[taken == index] for index, values in enumerate(confidences)]
        counts = np.bincount(taken, minlength=len(exit_names)).tolist()
        return cls(len(taken), tuple(exit_names), tuple(counts), tuple(map(sample_quantiles, at_exit)))

    @property
    def exit_shares(self) -> dict[str, float]:
        """Exit name -> share of the calibration photos that left there, in [0, 1]."""
        return self.shares_of(self.exit_counts)

    def shares_of(self, counts: Sequence[int]) -> dict[str, float]:
        """Return exit name -> share of the photos, from the number of photos at each exit. The sum must not be 0."""
        return {name: count / sum(counts) for name, count in zip(self.exit_names, counts, strict=True)}

    @property
    def num_tests(self) -> int:
        """Number of tests of `_tests`: one of each exit's share, and one of the confidences at each early exit."""
        return 2 * len(self.exit_names) - 1


def _exits(values: Values, names: Sequence[str]) -> np.ndarray:
    """Convert exit indices to int64 [m], and check them."""
    array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):  # an empty list becomes float64
        message = f"exit_index is {array.dtype} {array.shape}"
        raise EarlyExitError(f"{message}, expected whole numbers [m]; stack exit_index of the detections")
    invalid = array[(array < 0) | (array >= len(names))]
    if invalid.size:
        expected = f"0 to {len(names) - 1} for {', '.join(names)}"
        raise EarlyExitError(f"exit_index has {invalid[0]}, expected {expected}")
    return array.astype(np.int64)


def _numbers(values: Values, count: int) -> np.ndarray:
    """Convert confidences to float64 [count]."""
    array = np.asarray(values.detach().cpu().double() if hasattr(values, "detach") else values, np.float64)
    if array.shape != (count,):
        raise EarlyExitError(f"confidence has shape {array.shape}, expected ({count},), one per exit_index")
    return array


class _Test(NamedTuple):
    name: str
    statistic: float
    p_value: float
    warning: str  # for the user, if the p-value is small


def _tests(reference: DriftReference, taken: np.ndarray, confidence: np.ndarray, block: int = 1) -> list[_Test]:
    """Test the shares of all exits, of which the smallest p-value is returned, and the confidences at each early exit.

    ``taken`` and ``confidence`` [n] are the exits of the photos and their confidences there. ``block`` calibration
    photos count as one, because neighbouring frames are alike.
    """
    import_package("scipy")  # so that a missing package is reported under the name that pip knows
    stats, photos, names = import_package("scipy.stats"), len(taken), reference.exit_names
    counts = np.bincount(taken, minlength=len(names)).tolist()
    past_counts = [max(1, round(count / block)) if count else 0 for count in reference.exit_counts]
    p_values = []
    for count, past in zip(counts, past_counts, strict=True):
        table = [[count, photos - count], [past, sum(past_counts) - past]]
        p_values.append(float(stats.fisher_exact(table).pvalue))
    index = int(np.argmin(p_values))
    now, before = counts[index] / photos, reference.exit_counts[index] / reference.photos
    last = f"the last {photos} photos" if block == 1 else f"the last {photos} photos (1 frame in {block})"
    text = f"{names[index]} took {100 * now:.3g} % of {last}, {100 * before:.3g} % in calibration"
    tests = [_Test("shares", abs(now - before), p_values[index], _warning(text, p_values[index]))]
    for index, quantiles in enumerate(map(np.array, reference.confidences)):
        values, past = confidence[taken == index], past_counts[index]
        if past and len(values):  # an exit that took no photo in one of both is in the test of the shares
            # scipy warns if rounding makes the exact p-value exceed 1, and then uses the asymptotic p-value
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                statistic, p_value = map(float, stats.ks_2samp(values, nearest_sample(values, quantiles, past)))
            median = f"median {np.median(values):.3g} for {len(values)} of {last}"
            text = f"the confidences at {names[index]} have changed, {median}"
            text += f", {quantiles[QUANTILES // 2]:.3g} in calibration"
            tests.append(_Test(f"confidences {index}", statistic, p_value, _warning(text, p_value)))
    return tests


def _warning(text: str, p_value: float) -> str:
    p_text = "p < 1e-15" if p_value < 1e-15 else f"p = {p_value:.0e}".replace("e-0", "e-")
    return f"drift: {text} ({p_text}): {ADVICE}"


class DriftMonitor:
    """Compare the exits and confidences of the last photos with those of the calibration photos.

    The first check runs after ``window`` photos, the others after each further half window. A check compares the share
    of each exit by Fisher's exact test, and the confidences of the photos that left at an early exit by a two-sample
    Kolmogorov-Smirnov test with `nearest_sample`. Both tests allow for the finite number of calibration photos.

    **False alarms.** The tests of a check share ``alpha`` equally (Bonferroni). So for photos like those of calibration
    the expected number of checks that warn is at most ``20,000 * alpha / window`` in 10,000 photos: 0.1 by default. It
    is a mean over calibrations: after an unlucky calibration, false alarms come in bursts. The photos must be drawn
    independently. Of a video, pass only frames that are seconds apart.

    Args:
        window: photos per check, at least 1. A smaller window reacts faster, and detects only larger changes.
        alpha: probability of a false alarm per check, in (0, 1).
    """

    @suggest_keywords
    def __init__(self, reference: DriftReference, window: int = WINDOW, alpha: float = ALPHA) -> None:
        if type(window) is not int or window < 1:
            raise EarlyExitError(f"window {window}: expected a whole number of photos, at least 1")
        if not 0 < alpha < 1:
            raise EarlyExitError(f"alpha {alpha}: expected a number in (0, 1), such as 0.001")
        self.reference, self.window, self.alpha = reference, window, alpha
        self._last: deque[tuple[int, float]] = deque(maxlen=window)
        self._photos, self._until_check = 0, window
        self._level = alpha / reference.num_tests
        self._active: dict[str, str] = {}
        self._logged_at: dict[str, int] = {}

    def update(self, exit_index: Values, confidence: Values) -> list[str]:
        """Add the decisions of a batch, in the order of the photos, and return one line per test that found drift.

        ``exit_index`` is int [m], and ``confidence`` [m] is the confidence of each photo at its exit. At the full path
        it may be NaN. The checks do not depend on the batch size. Each line is logged at most once per ``window``
        photos. An exit that the reference does not have, or another confidence that is not finite, raises
        EarlyExitError. Then no photo of the batch is added.
        """
        names = self.reference.exit_names
        taken = _exits(exit_index, names)
        confidence = _numbers(confidence, len(taken))
        for photo in np.flatnonzero((taken < len(names) - 1) & ~np.isfinite(confidence)):
            message = f"confidence of photo {photo} at {names[taken[photo]]} is {confidence[photo]}"
            raise EarlyExitError(f"{message}, expected a finite number; check the photo and the weights")
        warned: dict[str, str] = {}
        for decision in zip(taken.tolist(), confidence.tolist(), strict=True):
            self._last.append(decision)
            self._photos, self._until_check = self._photos + 1, self._until_check - 1
            if self._until_check == 0:
                warned |= self._check()
        return list(warned.values())

    def status(self) -> dict:
        """Return the number of ``photos`` so far and ``in_window``, the ``shares`` of the exits in the window by name
        (None before the first photo), the ``calibration_shares``, and the ``warnings`` of the last check."""
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
        """Run the tests, log their warnings, and return them by the name of the test."""
        self._until_check = (self.window + 1) // 2
        taken, confidence = (np.array(values) for values in zip(*self._last, strict=True))
        tests = _tests(self.reference, taken, confidence)
        self._active = {test.name: test.warning for test in tests if test.p_value <= self._level}
        for name, warning in self._active.items():
            if self._photos - self._logged_at.get(name, -self.window) >= self.window:
                self._logged_at[name] = self._photos
                logger.warning(warning)
        return self._active


@dataclass(frozen=True)
class Drift:
    """Comparison of the last photos with the calibration photos: the test with the smallest p-value. The ``statistic``
    is the difference of an exit's shares, or the Kolmogorov-Smirnov distance of the confidences at an early exit."""

    photos: int  # number of compared photos, at least 1; of a video, one frame per block
    shares: dict[str, float]  # exit name -> share of the photos that left there, in [0, 1]
    calibration_shares: dict[str, float]
    statistic: float  # in [0, 1]
    p_value: float  # times the number of tests (Bonferroni), at most 1
    drifted: bool  # whether p_value is at most ALPHA
    text: str  # one line; with drift it has the change and the advice


class _Target(TypedDict, total=False):
    block: Annotated[int, 1, 2**31] | None


class _Certificate(TypedDict):
    drift: DriftReference
    target: _Target


class DriftRecord:
    """Keep exit and confidence for the last frames of a detector, and compare them on demand. It is thread-safe.

    The tests are those of `DriftMonitor`, which assume independent photos. Frames of a video resemble each other, so
    the p-value would be far too small. Therefore only the first of each ``block`` frames (at least 1) is kept, up to
    `MAX_FRAMES` of them, and ``block`` calibration photos count as one. The p-value is valid if blocks are independent.
    It is for a single comparison. With many comparisons a false alarm is more likely.
    """

    def __init__(self, reference: DriftReference, block: int = 1) -> None:
        self.reference, self.block = reference, block
        self._kept: deque[tuple[int, float]] = deque(maxlen=MAX_FRAMES)
        self._frames, self._lock = 0, threading.Lock()

    @classmethod
    def from_certificate(cls, content: Any, exit_names: Sequence[str]) -> DriftRecord:
        """Build a record from the JSON ``content`` of a certificate. Without a block in it, ``block`` is 1. Raise
        EarlyExitError if it is not a certificate, or has other exits than ``exit_names``."""
        certificate = build(_Certificate, content, "certificate")
        calibrated, own = (", ".join(names[:-1]) for names in (certificate["drift"].exit_names, exit_names))
        if calibrated != own:
            raise EarlyExitError(f"the certificate is for the exits {calibrated}, the detector has {own}")
        return cls(certificate["drift"], certificate["target"].get("block") or 1)

    def add(self, exit_index: int, confidence: float | None) -> None:
        """Add the decision for the next frame. The confidence at the full path is not used."""
        with self._lock:
            if self._frames % self.block == 0:
                self._kept.append((exit_index, np.nan if confidence is None else confidence))
            self._frames += 1

    def drift(self) -> Drift | None:
        """Compare the kept decisions with the calibration. Return None before the first frame."""
        with self._lock:
            kept = list(self._kept)
        if not kept:
            return None
        reference = self.reference
        taken, confidence = (np.array(values) for values in zip(*kept, strict=True))
        test = min(_tests(reference, taken, confidence, self.block), key=lambda test: test.p_value)
        p_value = min(1.0, reference.num_tests * test.p_value)
        shares = reference.shares_of(np.bincount(taken, minlength=len(reference.exit_names)).tolist())
        drifted = p_value <= ALPHA
        text = test.warning if drifted else f"no drift in {len(kept)} photos (p = {p_value:.2g})"
        return Drift(len(kept), shares, reference.exit_shares, test.statistic, p_value, drifted, text)
