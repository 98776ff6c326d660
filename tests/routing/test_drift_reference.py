"""What calibration leaves for the drift check."""

import json

import numpy as np
import pytest

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.routing.drift_reference import Reference
from tests.routing.test_drift import NAMES, decisions, reference_of

GOOD = {
    "photos": 3,
    "exit_names": ["exit8", "exit12", "full"],
    "exit_counts": [2, 0, 1],
    "confidences": [[0.5] * 11 + [0.75] * 10, []],
}


def test_reference_by_hand():
    confidences = [[0.9, 0.8, float("nan"), 0.7], [float("nan"), 0.1, 0.6, 0.2]]
    reference = Reference.from_decisions(NAMES, [0, 0, 1, 2], confidences)
    assert (reference.photos, reference.exit_names, reference.exit_counts) == (4, NAMES, (2, 1, 1))
    # Half of the two values are at most 0.8, so levels 0 to 1/2 are 0.8.
    assert reference.confidences == ((0.8,) * 11 + (0.9,) * 10, (0.6,) * 21)


def test_quantiles_are_exact_where_a_level_is_a_whole_number_of_photos():
    values = np.arange(1, 21) / 32
    reference = Reference.from_decisions(("exit8", "full"), np.zeros(20, int), [values])
    assert reference.confidences == ((1 / 32, *values),)


def test_reference_goes_through_json():
    reference = reference_of(*decisions(np.random.default_rng(0), 1000))
    assert Reference.from_dict(json.loads(json.dumps(reference.to_dict()))) == reference
    nobody_left = Reference.from_decisions(NAMES, [2, 2], [[0.1, 0.2], [0.3, 0.2]])
    assert nobody_left.confidences == ((), ())
    assert Reference.from_dict(json.loads(json.dumps(nobody_left.to_dict()))) == nobody_left


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"photos": 4}, r"exit_counts \[2, 0, 1\]: expected one for each of 3 exits, sum 4"),
        ({"photos": "3"}, "photos is '3', expected a whole number"),
        ({"photos": 0, "exit_counts": [0, 0, 0]}, "photos is 0, expected 1 to"),
        ({"exit_counts": [2, 1]}, "one for each of 3 exits"),
        ({"exit_counts": [4, 0, -1]}, r"exit_counts\[2\] is -1, expected 0 to"),
        ({"exit_counts": [2.0, 0, 1]}, r"exit_counts\[0\] is 2.0, expected a whole number"),
        ({"exit_counts": 3}, "cannot be read .*calibrate again"),
        ({"exit_names": ["full"]}, "expected early exits and the full path"),
        ({"exit_names": ["exit8", "exit8", "full"]}, "no name twice"),
        ({"confidences": [[0.75] * 11 + [0.5] * 10, []]}, "confidences of exit8 have 0.5, expected .* >= 0.75"),
        (
            {"confidences": [[0.5] * 20 + [float("nan")], []]},
            r"\[0\]\[20\] is nan, expected a finite number",
        ),
        ({"confidences": [[float("-inf")] + [0.5] * 20, []]}, r"confidences\[0\]\[0\] is -inf"),
        ({"confidences": [["0.5"] * 21, []]}, "cannot be read"),
        ({"confidences": [[0.5] * 20, []]}, "exit8: 20 quantiles for 2 photos, expected 21"),
        ({"confidences": [[], []]}, "exit8: 0 quantiles for 2 photos"),
        ({"confidences": [[0.5] * 21, [0.5] * 21]}, "exit12: 21 quantiles for 0 photos, .* or none for no photo"),
        ({"confidences": [[0.5] * 21]}, "confidences of 1 exits: expected the 2 early ones"),
        ({"confidences": None}, "cannot be read"),
        ({"window": 200}, "cannot be read .*window"),
    ],
)
def test_impossible_references(values, message):
    assert Reference.from_dict(GOOD).to_dict() == GOOD
    with pytest.raises(EarlyExitError, match=message):
        Reference.from_dict({**GOOD, **values})


@pytest.mark.parametrize("values", [None, [], {}, {"photos": 3}])
def test_no_reference(values):
    with pytest.raises(EarlyExitError, match="drift reference cannot be read"):
        Reference.from_dict(values)


@pytest.mark.parametrize(
    ("exit_index", "confidences", "message"),
    [
        ([0, 1], [[0.9, 0.9]], "confidences of 1 exits"),
        ([0, 1], [[0.9], [0.9]], "confidence has shape .1,., expected .2,."),
        ([0, 3], [[0.9, 0.9]] * 2, "exit_index has 3"),
        ([0, 1], [[float("nan"), 0.9]] * 2, r"confidences\[0\]\[0\] is nan"),
        ([], [[], []], "photos is 0"),
    ],
)
def test_impossible_calibrations(exit_index, confidences, message):
    with pytest.raises(EarlyExitError, match=message):
        Reference.from_decisions(NAMES, exit_index, confidences)
