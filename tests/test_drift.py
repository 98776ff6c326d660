"""The drift monitor: its rate of false alarms, and the changes that it must detect."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import fisher_exact, ks_2samp

from earlyexit_ssd.drift import (
    DriftMonitor,
    DriftRecord,
    DriftReference,
    nearest_sample,
    sample_quantiles,
)
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.plain import build

NAMES = ("exit8", "exit12", "full")
NAN = float("nan")


def decisions(seed, photos, shares=(0.42, 0.38, 0.2), power=1.0):
    """Return random exits [photos] and confidences [photos] in [0.5, 1]. These are uniform for ``power`` 1, and higher
    for a lower power. ``seed`` is an int or a generator."""
    generator = np.random.default_rng(seed)
    return generator.choice(3, photos, p=shares), 0.5 + 0.5 * generator.random(photos) ** power


def reference_of(exit_index, confidence):
    return DriftReference.from_decisions(NAMES, exit_index, [confidence, confidence])


@pytest.fixture
def reference():
    return reference_of(*decisions(0, 1000))


def two_exits(left: int, photos: int, confidence: float = 0.75) -> DriftReference:
    exits = [0] * left + [1] * (photos - left)
    return DriftReference.from_decisions(("exit8", "full"), exits, [np.full(photos, confidence)])


def warnings_of(monitor, exit_index, confidence, batch=50):
    """Return the warnings of each batch with warnings."""
    starts = range(0, len(exit_index), batch)
    per_batch = [monitor.update(exit_index[at : at + batch], confidence[at : at + batch]) for at in starts]
    return [warnings for warnings in per_batch if warnings]


def drift_of(reference, exits, confidences=None, block=1):
    record = DriftRecord(reference, block=block)
    for exit_index, confidence in zip(exits, [0.75] * len(exits) if confidences is None else confidences, strict=True):
        record.add(exit_index, None if exit_index == len(reference.exit_names) - 1 else confidence)
    return record.drift()


# Quantiles and references.


@pytest.mark.filterwarnings("ignore:ks_2samp")  # rounding takes an exact p-value above 1
@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=70), st.lists(st.integers(0, 9), min_size=1, max_size=70))
def test_nearest_sample_is_nearest_among_samples_with_the_quantiles(values, sample):
    values, sample = np.array(values), np.array(sample)
    stored = sample_quantiles(sample)
    nearest = nearest_sample(values, np.array(stored), len(sample))
    assert sample_quantiles(nearest) == stored and len(nearest) == len(sample)
    approximate, exact = ks_2samp(values, nearest), ks_2samp(values, sample)
    assert approximate.statistic <= max(exact.statistic, 1 / (2 * len(sample))) + 1e-9
    assert approximate.pvalue >= min(exact.pvalue, 0.999) - 1e-9


def test_between_the_quantiles_the_sample_follows_the_values():
    """Of 40 numbers, the quantiles determine the 1st, 2nd, 4th, 6th, ..., 40th."""
    nearest = nearest_sample(np.full(7, 10.7), np.array(sample_quantiles(np.arange(1.0, 41))), 40)
    assert nearest[[0, 1, 3, 9, 39]].tolist() == [1, 2, 4, 10, 40]
    assert nearest[[4, 10, 12]].tolist() == [6, 10.7, 12]


def test_blocks_are_spread_over_the_quantiles():
    """Of 100 numbers in two blocks, the lower half is one element and the upper half the other."""
    numbers = np.arange(100.0)
    assert nearest_sample(numbers, np.array(sample_quantiles(numbers)), 2).tolist() == [24, 74]
    assert nearest_sample(numbers, np.array(sample_quantiles(numbers)), 1).tolist() == [49]


def test_reference_by_hand():
    reference = DriftReference.from_decisions(NAMES, [0, 0, 1, 2], [[0.9, 0.8, NAN, 0.7], [NAN, 0.1, 0.6, 0.2]])
    assert (reference.photos, reference.exit_names, reference.exit_counts) == (4, NAMES, (2, 1, 1))
    # Half of the two values are at most 0.8, so levels 0 to 1/2 are 0.8.
    assert reference.confidences == ((0.8,) * 11 + (0.9,) * 10, (0.6,) * 21)
    # With 20 photos, each level is a whole number of photos.
    values = np.arange(1, 21) / 32
    assert DriftReference.from_decisions(("exit8", "full"), [0] * 20, [values]).confidences == ((1 / 32, *values),)
    assert DriftReference.from_decisions(NAMES, [2, 2], [[0.1, 0.2], [0.3, 0.2]]).confidences == ((), ())


GOOD = {
    "photos": 3,
    "exit_names": ["exit8", "exit12", "full"],
    "exit_counts": [2, 0, 1],
    "confidences": [[0.5] * 11 + [0.75] * 10, []],
}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"photos": 4}, r"exit_counts \[2, 0, 1\]: expected one for each of 3 exits, with the sum 4"),
        ({"exit_counts": [2, 1]}, "one for each of 3 exits"),
        ({"exit_counts": [4, 0, -1]}, r"exit_counts\[2\] is -1, expected 0 to"),
        ({"exit_names": ["full"]}, "expected early exits and the full path"),
        ({"exit_names": ["exit8", "exit8", "full"]}, "no name twice"),
        ({"confidences": [[0.75] * 11 + [0.5] * 10, []]}, "confidences of exit8 have 0.5, expected .* >= 0.75"),
        ({"confidences": [[0.5] * 20 + [NAN], []]}, r"\[0\]\[20\] is nan, expected a finite number"),
        ({"confidences": [[0.5] * 20, []]}, "exit8: 20 quantiles for 2 photos, expected 21"),
        ({"confidences": [[], []]}, "exit8: 0 quantiles for 2 photos"),
        ({"confidences": [[0.5] * 21, [0.5] * 21]}, "exit12: 21 quantiles for 0 photos, .* or 0 for 0 photos"),
        ({"confidences": [[0.5] * 21]}, "confidences has 1 lists, expected one for each of 2 early exits"),
    ],
)
def test_reference_in_json_is_checked(values, message):
    assert json.loads(json.dumps(asdict(build(DriftReference, GOOD, "drift")))) == GOOD
    with pytest.raises(EarlyExitError, match=message):
        build(DriftReference, {**GOOD, **values}, "drift")


@pytest.mark.parametrize(
    ("exit_index", "confidences", "message"),
    [
        ([0, 1], [[0.9, 0.9]], "confidences has 1 lists"),
        ([0, 1], [[0.9], [0.9]], "confidence has shape .1,., expected .2,."),
        ([0, 3], [[0.9, 0.9]] * 2, "exit_index has 3"),
        ([0, 1], [[NAN, 0.9]] * 2, r"confidences\[0\]\[0\] is nan"),
        ([], [[], []], "photos is 0"),
    ],
)
def test_invalid_calibration_decisions(exit_index, confidences, message):
    with pytest.raises(EarlyExitError, match=message):
        DriftReference.from_decisions(NAMES, exit_index, confidences)


# Monitor.


@pytest.mark.parametrize(
    ("alpha", "streams", "photos", "window", "most"),
    [
        (0.2, 30, 2000, 200, 120),  # 2 * alpha / window per photo are documented
        (0.2, 15, 400, 20, 120),
        (0.001, 50, 2000, 200, 4),  # 1 is documented, about 0.5 is true; 4 are three standard deviations above 1
    ],
)
def test_false_alarms_are_within_the_documented_rate(alpha, streams, photos, window, most):
    alarms = 0
    for seed in range(streams):
        generator = np.random.default_rng(seed)
        monitor = DriftMonitor(reference_of(*decisions(generator, 400)), window=window, alpha=alpha)
        alarms += len(warnings_of(monitor, *decisions(generator, photos), batch=window // 2))
    assert alarms <= most


def test_shifted_shares_are_detected_within_two_windows(reference, caplog):
    monitor = DriftMonitor(reference)
    assert warnings_of(monitor, *decisions(1, 1000)) == []
    with caplog.at_level(logging.WARNING):
        batches = warnings_of(monitor, *decisions(2, 400, shares=(0.7, 0.2, 0.1)))
    (warning,) = batches[-1]
    assert warning.startswith("drift: exit8 took ") and "% of the last 200 photos, " in warning
    assert monitor.status()["warnings"] == [warning]
    assert caplog.messages[-1].startswith("drift: exit8 took ")
    monitor.update(*decisions(3, 200))
    assert monitor.status()["warnings"] == []


def test_shifted_confidences_with_equal_shares_are_detected_within_two_windows(reference):
    monitor = DriftMonitor(reference)
    exit_index, confidence = decisions(2, 1400)
    confidence[1000:][exit_index[1000:] == 0] **= 0.4
    assert warnings_of(monitor, exit_index[:1000], confidence[:1000]) == []
    batches = warnings_of(monitor, exit_index[1000:], confidence[1000:])
    assert all(len(warnings) == 1 for warnings in batches)
    assert batches[-1][0].startswith("drift: the confidences at exit8 have changed, median 0.")


def test_each_cause_is_logged_once_per_window(reference, caplog):
    monitor = DriftMonitor(reference, window=100)
    with caplog.at_level(logging.WARNING):
        batches = warnings_of(monitor, np.zeros(400, int), np.full(400, 0.99))
    assert [len(warnings) for warnings in batches] == [2] * 7  # at 100, 150, ..., 400 photos
    assert len(caplog.messages) == 2 * 4
    assert {record.name for record in caplog.records} == {"earlyexit_ssd.drift"}


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 70), st.lists(st.integers(0, 40), min_size=1, max_size=12))
def test_result_does_not_depend_on_batch_sizes(window, sizes):
    exit_index, confidence = decisions(4, sum(sizes), shares=(0.1, 0.1, 0.8), power=0.1)
    reference = reference_of(*decisions(5, 300))
    whole, parts = (DriftMonitor(reference, window=window, alpha=0.1) for _ in range(2))
    warned, cut = whole.update(exit_index, confidence), np.cumsum(sizes)[:-1]
    batches = zip(np.split(exit_index, cut), np.split(confidence, cut), strict=True)
    assert set(warned) <= {warning for batch in batches for warning in parts.update(*batch)}
    assert whole.status() == parts.status()


@pytest.mark.parametrize("window", [1, 2, 3, 7])
def test_small_windows(reference, window):
    monitor = DriftMonitor(reference, window=window)
    warnings_of(monitor, *decisions(6, 50), batch=4)
    assert monitor.status()["in_window"] == window
    # all seven photos take an exit with the calibration share 0.2: 0.2 ** 7 is below 0.001 / 5
    assert bool(monitor.update([2] * 2 * window, [0.0] * 2 * window)) == (window == 7)


@pytest.mark.filterwarnings("error")  # numpy divides by no photos in silence otherwise
def test_exit_without_calibration_photos():
    reference = DriftReference.from_decisions(NAMES, [0, 2] * 200, [np.linspace(0.5, 1, 400)] * 2)
    assert reference.exit_counts == (200, 0, 200)
    (warning,) = DriftMonitor(reference).update([1, 2] * 100, [0.9] * 200)
    assert warning.startswith("drift: exit")
    assert DriftMonitor(reference).update([1] * 2 + [0, 2] * 99, np.linspace(0.5, 1, 200)) == []


def test_full_path_alone():
    reference = DriftReference.from_decisions(NAMES, [2] * 300, [np.zeros(300)] * 2)
    monitor = DriftMonitor(reference)
    assert monitor.update([2] * 200, [NAN] * 200) == []  # the confidence at the full path is not looked at
    assert monitor.update([0] * 100, [0.9] * 100)[0].startswith("drift: exit8 took 50 % of the last 200 photos, 0 % in")


def test_one_confidence_for_all_photos():
    reference = two_exits(200, 400, confidence=0)
    assert DriftMonitor(reference).update([0, 1] * 100, np.zeros(200)) == []
    (warning,) = DriftMonitor(reference).update([0, 1] * 100, np.full(200, 1e-6))
    assert warning.startswith("drift: the confidences at exit8 have changed, median 1e-06 for 100 of the last 200")
    assert "0 in calibration (p < 1e-15)" in warning


def test_status(reference):
    monitor = DriftMonitor(reference, window=4)
    shares = dict(zip(NAMES, [count / 1000 for count in reference.exit_counts], strict=True))
    empty = {"photos": 0, "in_window": 0, "shares": None, "calibration_shares": shares, "warnings": []}
    assert monitor.status() == empty
    monitor.update([2, 2, 0, 0, 1, 0], [0.9] * 6)
    now = {"exit8": 0.75, "exit12": 0.25, "full": 0.0}
    assert monitor.status() == {**empty, "photos": 6, "in_window": 4, "shares": now}


def test_update_accepts_tensors_of_the_model(reference):
    monitor = DriftMonitor(reference, window=4)
    monitor.update(torch.tensor([0, 2]), torch.tensor([0.5, 0.5], dtype=torch.bfloat16, requires_grad=True))
    assert monitor.update(torch.tensor([], dtype=torch.long), torch.tensor([])) == monitor.update([], []) == []
    assert monitor.status()["photos"] == 2


@pytest.mark.parametrize(
    ("exit_index", "confidence", "message"),
    [
        ([0, 3], [0.9, 0.9], "exit_index has 3, expected 0 to 2 for exit8, exit12, full"),
        ([-1], [0.9], "exit_index has -1"),
        ([0.0], [0.9], "float64 .1,., expected whole numbers"),
        (0, 0.9, "expected whole numbers .m."),
        ([0, 1], [0.9], "confidence has shape .1,., expected .2,."),
        ([2, 0], [0.9, NAN], "confidence of photo 1 at exit8 is nan, expected a finite number"),
        ([1], [float("inf")], "confidence of photo 0 at exit12 is inf"),
    ],
)
def test_invalid_decisions(reference, exit_index, confidence, message):
    monitor = DriftMonitor(reference)
    with pytest.raises(EarlyExitError, match=message):
        monitor.update(exit_index, confidence)
    assert monitor.status()["photos"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window 0: expected a whole number of photos"),
        ({"window": 1.5}, "window 1.5"),
        ({"alpha": 0.0}, "alpha 0.0: expected a number in"),
        ({"alpha": NAN}, "alpha nan"),
    ],
)
def test_invalid_settings(reference, arguments, message):
    with pytest.raises(EarlyExitError, match=message):
        DriftMonitor(reference, **arguments)
    with pytest.raises(TypeError, match="did you mean 'window'"):
        DriftMonitor(reference, windows=100)


# Tests and records.


def test_drift_by_hand():
    reference, exits = two_exits(42, 100), [0] * 71 + [1] * 29
    found, p_value = drift_of(reference, exits), fisher_exact([[71, 29], [42, 58]]).pvalue
    assert (found.photos, found.shares) == (100, {"exit8": 0.71, "full": 0.29})
    assert found.calibration_shares == {"exit8": 0.42, "full": 0.58}
    assert found.statistic == pytest.approx(0.29) and found.p_value == pytest.approx(3 * p_value)  # three tests
    assert 1e-5 < p_value < 1e-4
    assert found.drifted and found.text == (
        f"drift: exit8 took 71 % of the last 100 photos, 42 % in calibration (p = {p_value * 1e5:.0f}e-5): "
        "calibrate again, because the certificate is for other photos"
    )
    assert DriftMonitor(reference, window=100).update(exits, np.full(100, 0.75)) == [found.text]
    assert DriftRecord(reference).drift() is None


def test_stream_from_the_calibration_distribution_does_not_drift(reference):
    found = drift_of(reference, *decisions(7, 1200))
    assert found.photos == 1000 and not found.drifted and found.text.startswith("no drift in 1000 photos (p = ")


def test_changed_confidences_drift(reference):
    found = drift_of(reference, *decisions(8, 400, power=0.4))
    assert found.drifted and found.text.startswith("drift: the confidences at exit")
    assert 0.2 < found.statistic < 0.5


def test_block_of_frames_counts_as_one_photo():
    """As independent photos, these frames would count as drift. As four blocks, compared with ten, they do not."""
    reference = two_exits(100, 250)
    alone, blocks = drift_of(reference, [1] * 100), drift_of(reference, [1] * 100, block=25)
    assert alone.drifted and alone.photos == 100
    assert blocks.photos == 4 and not blocks.drifted
    # for 0 of 4 and 4 of 10, the tables with 0 and 4 of 4 are equally likely or less likely
    assert blocks.p_value == pytest.approx(min(1, 3 * fisher_exact([[0, 4], [4, 6]]).pvalue))
    assert drift_of(reference, ([0] * 25 + [1] * 25) * 2, block=25).shares == {"exit8": 0.5, "full": 0.5}


def test_block_is_read_from_the_certificate():
    content = {"drift": asdict(two_exits(1, 2)), "target": {"kind": "risk", "block": 7}}
    for target, block in ((content["target"], 7), ({"block": None}, 1), ({}, 1)):
        assert DriftRecord.from_certificate({**content, "target": target}, ("exit8", "full")).block == block
    for changes, name, message in (
        ({}, "exit9", "is for the exits exit8, the detector has exit9"),
        ({"drift": {}}, "exit8", "certificate.drift: the key 'confidences' is missing"),
        ({"target": {"block": 0}}, "exit8", "certificate.target.block is 0, expected 1 to"),
    ):
        with pytest.raises(EarlyExitError, match=message):
            DriftRecord.from_certificate({**content, **changes}, (name, "full"))


def test_record_is_thread_safe():
    record = DriftRecord(two_exits(1, 2), block=8)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: record.add(0, 0.75), range(4000)))
        assert record.drift().photos == 500
