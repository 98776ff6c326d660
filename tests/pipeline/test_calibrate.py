from types import SimpleNamespace

import numpy as np
import pytest

from earlyexit_ssd.calibration.thresholds import Grid
from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.data.repeats import Block
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.pipeline import calibrate


class FourPhotos:
    early_exits = 1

    def __len__(self):
        return 4


@pytest.mark.parametrize(("cost", "opened"), [(3.8, True), (4.0, False), (4.2, False)])
def test_an_ap_drop_opens_no_exit_that_makes_photos_dearer(monkeypatch, caplog, cost, opened):
    """One photo of four may leave, with more AP50 than the full path has; its branch costs the others something."""
    same = [SimpleNamespace(AP50=np.full(10, 0.5))] * 2
    monkeypatch.setattr(calibrate, "ap_of_choice", lambda *_, **__: SimpleNamespace(AP50=0.5))
    monkeypatch.setattr(calibrate, "bootstrap_choices", lambda *_, **__: same)
    grid = Grid(np.array([[CLOSED], [0.9], [0.1]]), np.array([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0]], dtype=np.int8))
    found = calibrate._cheapest_that_keeps(
        calibrate.Target("ap_drop", 0.01, 0.05),
        SimpleNamespace(recording=FourPhotos(), matches=None),
        grid,
        mean_costs=np.array([4.0, cost, 1.0]),
        mean_losses=np.array([0.0, 0.1, 0.9]),
        ap50=np.array([0.5, 0.51, 0.2]),
        seed=0,
    )
    assert found.thresholds == ((0.9,) if opened else (CLOSED,))
    assert found.choice.tolist() == ([0, 1, 1, 1] if opened else [1, 1, 1, 1])
    assert ("no exit can be opened at 0.01 AP50 lost" in caplog.text) is not opened


@pytest.mark.parametrize(
    ("value", "delta", "needed"), [(0.01, 0.05, 299), (0.05, 0.05, 59), (0.0, 0.05, 598), (1.0, 0.05, 1)]
)
def test_photos_that_an_ap_drop_needs(value, delta, needed):
    """0.99^299 < 0.05 < 0.99^298: a fault in one photo of a hundred then shows with probability 0.95."""
    assert calibrate._photos_for(calibrate.Target("ap_drop", value, delta)) == needed


def test_blocks_are_for_what_promises():
    with pytest.raises(EarlyExitError, match="--block is for --risk and --ap-drop"):
        calibrate.Target("speedup", 1.2, block=Block(5, "5"))
