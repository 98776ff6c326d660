import numpy as np
import pytest

from earlyexit_ssd.evaluation.resplits import check_certificates
from earlyexit_ssd.routing.certify import safe_to_bold
from tests.routing.test_certify import COSTS, photos, same_costs


@pytest.fixture(scope="module")
def case():
    return safe_to_bold(*photos(400, 0), same_costs), *photos(900, 1)


def check(case, **changes):
    path, confidences, losses = case
    settings = {"calibration": 400, "epsilon": 0.1, "delta": 0.1, "bound": "betting", "splits": 60, **changes}
    return check_certificates(path, confidences, losses, same_costs(path), 3.0, **settings)


def test_holds_and_is_not_far_from_the_best(case):
    found = check(case)
    assert found.exceeded <= found.tolerance
    assert 0.1 < found.tolerance < 0.2
    assert found.opened == 1.0
    assert 0.85 * found.best_speedup < found.speedup < found.best_speedup
    assert check(case) == found != check(case, seed=1)


def test_a_bound_that_is_none_is_found_out(case, monkeypatch):
    """With p-values that only look at the mean, the test photos exceed epsilon about every other time."""
    from earlyexit_ssd.routing import certify

    monkeypatch.setitem(certify.BOUNDS, "naive", lambda losses, epsilon: float(losses.mean() > epsilon))
    assert check(case, bound="naive").exceeded > 2 * check(case).tolerance


def test_nothing_opens_at_a_risk_of_nothing(case):
    found = check(case, epsilon=0.001)
    assert found.opened == 0.0 and found.exceeded == 0.0
    assert found.speedup == pytest.approx(3.0 / COSTS[-1])
    assert np.isfinite(found.best_speedup)
