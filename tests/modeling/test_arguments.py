"""What a model cannot be built with, in one line each."""

import numpy as np
import pytest

from earlyexit_ssd import EarlyExitSSDLite
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling import LossSettings, build_ssdlite
from earlyexit_ssd.modeling.arguments import numbers
from earlyexit_ssd.modeling.branches import Argument


@pytest.fixture(scope="module")
def detector():
    return build_ssdlite(num_classes=2, image_size=96, width=0.25)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"exit_layers": 8}, r"exit_layers is 8, expected a sequence of whole numbers from 0 on, such as \(8, 12\)"),
        ({"exit_layers": "8"}, "exit_layers is '8', expected a sequence of whole numbers"),
        ({"exit_layers": (8, 12.0)}, "exit_layers is .8, 12.0., expected a sequence of whole numbers"),
        ({"exit_layers": (12, 8)}, "exit_layers .12, 8.: expected increasing trunk layers from 1 to 15"),
        ({"empty": 6}, "empty is 6, expected a sequence of whole numbers"),
        ({"depth": (1.5,)}, "depth is .1.5,., expected a whole number in"),
        ({"depth": (True,)}, "depth is .True,., expected a whole number in"),
        ({"copy": "0.5"}, "copy is '0.5', expected a number in"),
        ({"copy": (float("nan"),)}, "copy is .nan,., expected a number in"),
        ({"channels": -1}, "channels is -1, expected a whole number in"),
        ({"head_rank": "64"}, "head_rank is '64', expected a whole number in"),
        (
            {"losses": LossSettings(exit_weights=(1, 2, 3))},
            "exit_weights of the losses is .1, 2, 3., expected",
        ),
    ],
)
def test_the_constructor_names_what_is_wrong(detector, wrong, message):
    with pytest.raises(EarlyExitError, match=message):
        EarlyExitSSDLite(detector, **wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"exit_weights": 2.0}, "exit_weights is 2.0, expected a sequence of numbers"),
        ({"exit_weights": (1.0, -1.0)}, "exit_weights is .1.0, -1.0., expected"),
        ({"full_weight": "1"}, "full_weight is '1', expected a number from 0 on"),
        ({"min_negatives": None}, "min_negatives is None, expected a number from 0 on"),
    ],
)
def test_so_do_the_settings_of_the_losses(wrong, message):
    with pytest.raises(EarlyExitError, match=message):
        LossSettings(**wrong)


def test_numbers_of_any_kind_are_numbers():
    assert numbers("exit_layers", np.array([8, 12]), whole=True) == (8, 12)
    assert numbers("copy", [1, np.float32(0.5)]) == (1, 0.5)


def test_one_stands_for_all():
    assert Argument(0.5, 1).of_each("copy", 0.25, 3) == Argument(0.5, 1).of_each("copy", (0.25,), 3) == [0.25] * 3
    assert Argument(2, 2).of_each("depth", (2, 0), 2) == [2, 0]
    assert Argument(2, 2).of_each("depth", [], 0) == Argument(2, 2).of_each("depth", (2,), 0) == []
    with pytest.raises(EarlyExitError, match=r"copy is 0, expected a number in \(0, 1\], or one for each of 2 exits"):
        Argument(0.5, 1, zero=False).of_each("copy", 0, 2)
