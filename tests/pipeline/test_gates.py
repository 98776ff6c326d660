from earlyexit_ssd.pipeline.gates import Check, Gate, GateFailed, baseline_gate, exits_gate

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


def test_message_says_what_to_try():
    error = GateFailed(Gate("exits", (Check("x", 0.1, 0.2),), ("move it",)))
    assert str(error) == "gate of phase exits failed: x 0.100 < 0.200"
    assert error.advice == ["  try: move it", "  or go on with --force, which every later report will say"]
