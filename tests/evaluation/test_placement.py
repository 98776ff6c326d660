"""Where to put exits, with costs written down by hand."""

import pytest

from earlyexit_ssd import ExitRouter
from earlyexit_ssd.evaluation.placement import Placement, best_mix, measure_placements, propose
from tests.modeling.conftest import small_model


def test_speedup_by_hand():
    one = Placement(8, 200, ms=20.0, full_ms=48.0, plain_ms=40.0)
    assert one.speedup(1.0) == 2.0
    assert one.speedup(0.0) == pytest.approx(40 / 48)
    assert one.speedup(0.5) == pytest.approx(40 / 34)


@pytest.mark.parametrize(("speedup", "share"), [(2.0, 1.0), (40 / 34, 0.5), (0.5, 0.0), (2.1, None)])
def test_share_that_a_speedup_needs(speedup, share):
    found = Placement(8, 200, ms=20.0, full_ms=48.0, plain_ms=40.0).share_for(speedup)
    assert found is None if share is None else found == pytest.approx(share)


def test_an_exit_dearer_than_the_rest_of_the_network_helps_nobody():
    one = Placement(15, 500, ms=50.0, full_ms=48.0, plain_ms=40.0)
    assert one.share_for(1.2) is None


@pytest.mark.parametrize(
    ("limit", "shares"),
    [
        (5.0, None),
        (10.0, (1.0, 0.0, 0.0)),
        (20.0, (0.5, 0.5, 0.0)),  # the middle point is above the line from the first to the last
        (30.0, (0.0, 1.0, 0.0)),
        (40.0, (0.0, 0.5, 0.5)),
        (99.0, (0.0, 0.0, 1.0)),
    ],
)
def test_the_best_mix_is_on_the_upper_hull(limit, shares):
    found = best_mix([(10.0, 0.4), (30.0, 0.6), (50.0, 0.7)], limit)
    assert found is None if shares is None else found == pytest.approx(shares)


def test_a_point_under_the_hull_is_left_out():
    assert best_mix([(10.0, 0.4), (30.0, 0.45), (50.0, 0.7)], 30.0) == pytest.approx((0.5, 0.0, 0.5))


def test_proposes_what_keeps_the_most():
    shallow = Placement(4, 100, ms=15.0, full_ms=45.0, plain_ms=40.0, AP50=0.2)
    middle = Placement(8, 200, ms=20.0, full_ms=45.0, plain_ms=40.0, AP50=0.6)
    unknown = Placement(6, 150, ms=17.0, full_ms=45.0, plain_ms=40.0)
    found = propose([shallow, unknown, middle], full_ap50=0.7, speedup=1.6)  # 25 ms
    assert found.layers == (8,)
    assert found.shares == pytest.approx((0.8, 0.2))
    assert pytest.approx(0.8 * 0.6 + 0.2 * 0.7) == found.AP50
    assert propose([shallow, middle], 0.7, speedup=3.0) is None


def test_a_second_exit_pays_for_the_first():
    first = Placement(6, 100, ms=15.0, full_ms=41.0, plain_ms=40.0, AP50=0.5)
    second = Placement(10, 300, ms=25.0, full_ms=41.0, plain_ms=40.0, AP50=0.69)
    found = propose([first, second], full_ap50=0.7, speedup=2.0)  # 20 ms, of 15 and 25 + 1
    assert found.layers == (6, 10)
    assert found.shares == pytest.approx((6 / 11, 5 / 11, 0.0))


@pytest.mark.parametrize("runtime", ["eager", "onnxruntime"])
def test_measures_each_layer_against_one_plain_detector(runtime):
    models = {layer: small_model(exit_layers=(layer,)) for layer in (4, 12)}
    first, second = measure_placements(models, ExitRouter(1), runs=2, threads=1, runtime=runtime)
    assert (first.layer, second.layer) == (4, 12)
    assert first.mmacs < second.mmacs
    assert first.plain_ms == second.plain_ms > 0
