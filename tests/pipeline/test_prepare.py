"""Whether photos without a label may teach."""

import pytest

from earlyexit_ssd.config import load_config
from earlyexit_ssd.pipeline.prepare import learns_from_labels

TEACHER = ("LOSS.SUPERVISION", "teacher", "LOSS.TEACHER", "full", "BASELINE.EPOCHS", "0")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ((), True),
        (TEACHER, False),
        ((*TEACHER, "BASELINE.EPOCHS", "1"), True),
        ((*TEACHER, "BASELINE.EPOCHS", "1", "PHASES", "[exits]"), False),
        ((*TEACHER, "PHASES", "[exits, joint]"), True),
        ((*TEACHER, "PHASES", "[exits, joint]", "JOINT.EPOCHS", "0"), False),
    ],
)
def test_who_learns_from_labels(keys, expected):
    assert learns_from_labels(load_config(None, keys)) is expected
