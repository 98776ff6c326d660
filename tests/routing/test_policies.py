import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.routing import POLICIES, get_policy

# Two images, two default boxes, background and two classes; probabilities by softmax of logs.
PROBABILITIES = torch.tensor([[[0.9, 0.05, 0.05], [0.5, 0.4, 0.1]], [[0.2, 0.7, 0.1], [0.98, 0.01, 0.01]]])


def test_values_by_hand():
    logits = PROBABILITIES.log() + 7
    assert get_policy("mean_foreground")(logits).tolist() == pytest.approx([0.3, 0.41], abs=1e-6)
    assert get_policy("max_foreground")(logits).tolist() == pytest.approx([0.4, 0.7], abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(POLICIES)), st.integers(0, 2**31), st.floats(0.01, 50))
def test_in_the_unit_interval_and_one_number_per_image(name, seed, scale):
    logits = scale * torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(seed))
    confidence = POLICIES[name](logits)
    assert confidence.shape == (3,)
    assert ((confidence >= 0) & (confidence <= 1)).all()
    assert math.isclose(confidence[1].item(), POLICIES[name](logits[1:2]).item(), abs_tol=1e-6)


def test_unknown_policy():
    with pytest.raises(EarlyExitError, match="did you mean 'max_foreground'"):
        get_policy("max_forground")
