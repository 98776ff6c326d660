from earlyexit_ssd.pipeline.policy_evaluation import best_policy


def test_the_test_split_does_not_choose_the_policy():
    flattered = {"gap_closed": 0.9, "pooled_gap": 0.9, "calib_pooled_gap": 0.2}
    chosen = {"gap_closed": 0.1, "pooled_gap": 0.1, "calib_pooled_gap": 0.4}
    unknown = {"gap_closed": 0.95, "pooled_gap": 0.9, "calib_pooled_gap": None}
    assert best_policy({"a": flattered, "b": chosen, "c": unknown}) == "b"
