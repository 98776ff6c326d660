"""Warn when the photos at run time no longer look like those that the router was calibrated on."""

from __future__ import annotations

import logging
from collections import deque

import numpy as np

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.keywords import suggest_keywords
from earlyexit_ssd.routing.drift_reference import Reference, Values, exit_indices, numbers
from earlyexit_ssd.routing.two_sample import QUANTILES, distance_p_value, fisher_p_value, quantile_distance

logger = logging.getLogger(__name__)

WINDOW = 200
"""Photos that are compared with those of calibration at a time."""


class DriftMonitor:
    """Compare the last photos with those of calibration: how many leave at which exit, and how confident they are.

    When ``window`` photos are there, and again after every half window, two kinds of tests compare them with the
    reference. Both allow for the calibration having seen a finite sample too:

    - the share of each exit, by Fisher's exact test (:func:`fisher_p_value`);
    - the confidences of the photos that left at an early exit, by a Kolmogorov-Smirnov distance
      (:func:`quantile_distance`, :func:`distance_p_value`). Below 5 photos at the exit no distance is enough.

    **False alarms.** A check spends ``alpha``, split evenly over its tests (Bonferroni), so for photos like those of
    calibration the expected number of checks that warn is at most ``alpha`` each, or ``20,000 * alpha / window`` in
    10,000 photos: 0.1 by default, one in 100,000 photos. That windows overlap does not matter to an expectation. It is
    one over calibrations too: after an unlucky calibration false alarms come in bursts. And it holds for photos that
    are drawn independently. Neighbouring frames of a video repeat each other: pass on only some of them, seconds apart.

    Args:
        reference: of the calibration.
        window: photos that are compared, at least 1; fewer react faster and see only larger changes.
        alpha: probability of a false alarm per check, in (0, 1).

    Raises:
        EarlyExitError: a number that is not in its range.
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
            one line per cause that a check within these photos warned of. They are also logged, each cause at most
            once per ``window`` photos.

        Raises:
            EarlyExitError: decisions of another model, or not finite; none of the batch is taken then.
        """
        names = self.reference.exit_names
        taken = exit_indices(exit_index, names)
        confidence = numbers(confidence, len(taken))
        for photo in np.flatnonzero((taken < len(names) - 1) & ~np.isfinite(confidence)):
            where = f"confidence of photo {photo} at {names[taken[photo]]}"
            raise EarlyExitError(f"{where} is {confidence[photo]}, expected a finite number; look at photo and weights")
        found: dict[str, str] = {}
        for decision in zip(taken.tolist(), confidence.tolist(), strict=True):
            self._last.append(decision)
            self._photos += 1
            self._until_check -= 1
            if self._until_check == 0:
                found |= self._check()
        return list(found.values())

    def status(self) -> dict:
        """``photos`` seen, ``in_window`` of them kept, the exits' ``shares`` of these by name (None before the first
        photo), their ``calibration_shares``, and the ``warnings`` of the last check."""
        reference, size = self.reference, len(self._last)
        taken = [exit_index for exit_index, _ in self._last]
        now = {name: taken.count(index) for index, name in enumerate(reference.exit_names)}
        before = dict(zip(reference.exit_names, reference.exit_counts, strict=True))
        return {
            "photos": self._photos,
            "in_window": size,
            "shares": {name: count / size for name, count in now.items()} if size else None,
            "calibration_shares": {name: count / reference.photos for name, count in before.items()},
            "warnings": list(self._active.values()),
        }

    def _check(self) -> dict[str, str]:
        """Compare, log, and return the warnings by cause."""
        self._until_check = (self.window + 1) // 2
        taken = np.array([exit_index for exit_index, _ in self._last])
        confidence = np.array([value for _, value in self._last])
        causes = {"shares": self._share_warning(taken)}
        for index, name in enumerate(self.reference.exit_names[:-1]):
            causes[f"confidences at {name}"] = self._confidence_warning(index, confidence[taken == index])
        advice = "calibrate again, the certificate speaks of other photos"
        self._active = {cause: f"drift: {text}: {advice}" for cause, text in causes.items() if text}
        for cause, warning in self._active.items():
            if self._photos - self._logged_at.get(cause, -self.window) >= self.window:
                self._logged_at[cause] = self._photos
                logger.warning(warning)
        return self._active

    def _share_warning(self, taken: np.ndarray) -> str | None:
        """About the exit whose share [window] has changed most; where one rises another falls, so one line will do."""
        reference = self.reference
        counts = np.bincount(taken, minlength=len(reference.exit_names)).tolist()
        p_values = [
            fisher_p_value(count, self.window, before, reference.photos)
            for count, before in zip(counts, reference.exit_counts, strict=True)
        ]
        exit_index = int(np.argmin(p_values))
        if p_values[exit_index] > self._level:
            return None
        now, before = counts[exit_index] / self.window, reference.exit_counts[exit_index] / reference.photos
        return (
            f"{reference.exit_names[exit_index]} took {100 * now:.3g} % of the last {self.window} photos, "
            f"{100 * before:.3g} % in calibration ({_shown(p_values[exit_index])})"
        )

    def _confidence_warning(self, exit_index: int, confidence: np.ndarray) -> str | None:
        """About the confidences [n] of the photos in the window that left at an early exit."""
        name, count = self.reference.exit_names[exit_index], self.reference.exit_counts[exit_index]
        if not count or not len(confidence):  # nothing to compare; the shares tell
            return None
        quantiles = np.array(self.reference.confidences[exit_index])
        p_value = distance_p_value(quantile_distance(confidence, quantiles), len(confidence), count)
        if p_value > self._level:
            return None
        return (
            f"the confidences at {name} have moved, median {np.median(confidence):.3g} of {len(confidence)} among the "
            f"last {self.window} photos, {quantiles[QUANTILES // 2]:.3g} in calibration ({_shown(p_value)})"
        )


def _shown(p_value: float) -> str:
    return "p < 1e-15" if p_value < 1e-15 else f"p = {p_value:.0e}".replace("e-0", "e-")
