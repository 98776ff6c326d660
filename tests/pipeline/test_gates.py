from __future__ import annotations

import pytest

from earlyexit_ssd.config import load_config
from earlyexit_ssd.pipeline.gates import (
    Check,
    Gate,
    baseline_advice,
    baseline_gate,
    baseline_limits,
    exits_advice,
    exits_gate,
)

LIMITS = {"AP50": 0.4, "precision": 0.6, "recall": 0.5}


def test_limits_are_met_or_exceeded():
    assert baseline_gate({"AP50": 0.4, "precision": 0.7, "recall": 0.5}, LIMITS).passed
    gate = baseline_gate({"AP50": 0.39, "precision": None, "recall": 0.9}, LIMITS)
    assert [check.passed for check in gate.checks] == [False, False, True]
    assert str(gate) == (
        "gate of phase baseline failed: AP50 0.390 < 0.400, precision undefined < 0.600, recall 0.900 >= 0.500"
    )


def test_deepest_exit_is_held_against_the_full_path():
    gate = exits_gate({"exit8": 0.31, "exit12": 0.5, "full": 0.6}, 0.30, 0.85)
    assert [(check.value, check.limit) for check in gate.checks] == [(0.31, 0.30), (0.5, 0.85 * 0.6)]
    assert not gate.passed
    assert str(gate).endswith("exit12 AP50 0.500 < 0.510 (85% of full's 0.600)")


TAKEN_OVER = ["MODEL.WEIGHTS", "COCO_V1", "BASELINE.EPOCHS", "0"]


@pytest.mark.parametrize(
    ("keys", "reference", "limits"),
    [
        ([], None, (0.4, 0.6, 0.5)),
        (["BASELINE.EPOCHS", "0"], None, (0.4, 0.6, 0.5)),  # untrained, and no checkpoint
        (TAKEN_OVER, None, (0.05, None, None)),
        ([*TAKEN_OVER[:2], "PHASES", "[exits]"], None, (0.05, None, None)),
        (TAKEN_OVER[:2], None, (0.4, 0.6, 0.5)),  # trained further
        ([*TAKEN_OVER, "BASELINE.GATE.AP50", "0.2", "BASELINE.GATE.RECALL", "0.1"], None, (0.2, None, 0.1)),
        ([*TAKEN_OVER, "BASELINE.GATE.AP50", "0.0"], None, (0.05, None, None)),
        ([*TAKEN_OVER[:2], "BASELINE.GATE.RELATIVE", "0.5"], (0.2, 0.6, None), (0.1, 0.3, 0.0)),
        ([*TAKEN_OVER[:2], "BASELINE.GATE.RELATIVE", "0.5"], (0.0, None, 0.0), (0.05, 0.0, 0.0)),
    ],
)
def test_limits_fit_the_case(keys, reference, limits):
    """A checkpoint as it is need only detect; that much is asked of every one."""
    reference = reference and dict(zip(LIMITS, reference, strict=True))
    assert baseline_limits(load_config(None, keys), reference) == dict(zip(LIMITS, limits, strict=True))


def test_a_checkpoint_taken_over_shows_its_figures():
    limits = {"AP50": 0.05, "precision": None, "recall": None}
    gate = baseline_gate({"AP50": 0.26, "precision": 0.8, "recall": 0.16}, limits)
    assert gate.passed and str(gate).endswith("passed: AP50 0.260 >= 0.050, precision 0.800, recall 0.160")
    assert not baseline_gate({"AP50": 0.04, "precision": 1.0, "recall": 0.9}, limits).passed
    assert not baseline_gate({"AP50": None, "precision": None, "recall": None}, limits).passed
    assert gate.to_dict()["checks"][1] == {"name": "precision", "value": 0.8, "limit": None, "of": "", "passed": True}


@pytest.mark.parametrize(
    ("ap50", "passed"),
    [
        ((0.151, 0.171, 0.2), True),  # under 0.30, and three quarters of what the checkpoint has
        ((0.149, 0.171, 0.2), False),
        ((0.151, 0.169, 0.2), False),
        ((0.049, 0.049, 0.049), False),  # it does not detect
        ((0.0, 0.0, 0.0), False),
        ((None, None, None), False),
    ],
)
def test_exits_on_a_checkpoint_taken_over_are_held_against_it(ap50, passed):
    gate = exits_gate(dict(zip(("exit8", "exit12", "full"), ap50, strict=True)), 0.30, 0.85, first_share=0.75)
    assert gate.passed is passed
    if passed:
        assert "full AP50 0.200 >= 0.050, exit8 AP50 0.151 >= 0.150 (75% of full's 0.200)" in str(gate)


@pytest.mark.parametrize(
    ("keys", "named", "unnamed"),
    [
        ([], ["more epochs than 24", "BASELINE.LR", "MODEL.WEIGHTS)", "MODEL.WEIGHTS_BACKBONE"], []),
        (["MODEL.WEIGHTS_BACKBONE", "IMAGENET1K_V1"], ["MODEL.WEIGHTS)"], ["MODEL.WEIGHTS_BACKBONE"]),
        (["MODEL.WEIGHTS", "COCO_V1"], ["BASELINE.EPOCHS"], ["MODEL.WEIGHTS"]),
        (TAKEN_OVER, ["train the full path: BASELINE.EPOCHS is 0"], ["MODEL.WEIGHTS", "more epochs"]),
    ],
)
def test_advice_for_the_baseline_names_nothing_that_is_set(keys, named, unnamed):
    advice = "\n".join(baseline_advice(load_config(None, keys)))
    assert all(word in advice for word in named) and not any(word in advice for word in unnamed)


@pytest.mark.parametrize(
    ("keys", "layer", "named", "unnamed"),
    [
        (
            [],
            8,
            [
                "EXITS.LAYERS",
                "more epochs than 8",
                "more views of a photo than 2",
                "than 0.5 (EXITS.COPY)",
                "SUPERVISION teacher",
            ],
            [],
        ),
        (["EXITS.COPY", "[1.0]"], 8, ["EXITS.LAYERS"], ["EXITS.COPY"]),
        (["EXITS.COPY", "[1.0, 0.25]"], 8, ["than 1, 0.25 (EXITS.COPY)"], []),
        (["EXITS_PHASE.CACHE", "False"], 8, ["EXITS_PHASE.EPOCHS"], ["CACHE_VIEWS"]),
        (["EXITS_PHASE.EPOCHS", "0"], 8, ["EXITS_PHASE.EPOCHS is 0"], ["CACHE_VIEWS", "more epochs"]),
        (["LOSS.SUPERVISION", "teacher"], 8, ["more photos"], ["SUPERVISION"]),
        (["EXITS.LAYERS", "[12]"], 12, ["more photos"], ["EXITS.LAYERS"]),
    ],
)
def test_advice_for_the_exits_names_nothing_that_is_set(keys, layer, named, unnamed):
    advice = "\n".join(exits_advice(load_config(None, keys), "exit8", layer))
    assert all(word in advice for word in named) and not any(word in advice for word in unnamed), advice


def test_message_says_what_to_try():
    error = Gate("exits", (Check("x", 0.1, 0.2),), ("move it",)).failed()
    assert str(error) == "gate of phase exits failed: x 0.100 < 0.200"
    assert error.advice == ["  try: move it", "  or go on with --force, which every later report will say"]
