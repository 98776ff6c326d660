import torch

from earlyexit_ssd.evaluation.scoring_time import time_scoring
from earlyexit_ssd.modeling.outputs import ExitSignals


class Spy:
    """Keeps what it is asked."""

    def __init__(self):
        self.asked = []

    def confidence(self, signals, exit_index):
        self.asked.append((signals, exit_index))
        return torch.ones(len(signals.logits))


def test_one_photo_with_all_that_a_policy_may_look_at():
    spy, other = Spy(), Spy()
    given = ExitSignals(*(torch.rand(4, 7, 3) for _ in range(2)), torch.rand(4, 6))
    timings = time_scoring([spy, other], given, 1, runs=5)
    assert [timing.runs for timing in timings] == [5, 5] and min(timing.ms for timing in timings) > 0
    assert len(spy.asked) == len(other.asked) >= 5
    signals, exit_index = spy.asked[-1]
    assert exit_index == 1 and signals.logits.shape == signals.previous.shape == (1, 7, 3)
    assert signals.tap.shape == (1, 6) and not signals.empty


def test_of_the_first_exit():
    spy = Spy()
    time_scoring([spy], ExitSignals(torch.rand(2, 7, 3), empty=True), 0, runs=2)
    signals, _ = spy.asked[0]
    assert signals.previous is None and signals.tap is None and signals.empty
