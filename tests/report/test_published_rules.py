from earlyexit_ssd.report.published_rules import published_rules_table


def points(*pairs):
    return [{"cost": cost, "AP50": ap50} for cost, ap50 in pairs]


def leak(calib, test):
    return {"calib": {"cost": 1.0, "AP50": calib}, "test": {"cost": 1.0, "AP50": test}}


POLICIES = {
    "ambiguous_mass": {
        "budgets": points((300.0, 0.6), (400.0, 0.7)),
        "msdnet": points((350.0, 0.65), (250.0, 0.55)),
        "leak": [leak(0.61, 0.62), leak(0.7, 0.71)],
    },
    "entropy": {"budgets": points((200.0, 0.4), (400.0, 0.6))},
    "max_foreground": {"msdnet": points((200.0, 0.3), (500.0, None))},
}


def test_curves_are_read_at_the_costs_of_the_best_policy():
    """Halfway between 200 and 400 is 0.5; a curve that ends before a cost has no figure there."""
    assert published_rules_table(POLICIES, "ambiguous_mass", "mmacs").splitlines() == [
        "| rule | 300 mmacs | 400 mmacs |",
        "| --- | ---: | ---: |",
        "| ambiguous_mass, searched thresholds | 0.600 | 0.700 |",
        "| BranchyNet: entropy, searched thresholds | 0.500 | 0.600 |",
        "| MSDNet: shares q^k of max_foreground | - | - |",
        "| MSDNet: shares q^k of ambiguous_mass | 0.600 | - |",
        "| percentiles of ambiguous_mass from calib | 0.610 | 0.700 |",
        "| DynamicDet: the same percentiles of the reported photos | 0.620 | 0.710 |",
    ]


def test_the_best_policy_is_not_compared_with_itself():
    alone = {"max_foreground": {**POLICIES["ambiguous_mass"]}}
    assert "BranchyNet" not in published_rules_table(alone, "max_foreground", "ms")
    assert published_rules_table(alone, "max_foreground", "ms").count("MSDNet") == 1
