import pytest
import torch

from earlyexit_ssd.evaluation import throughput
from earlyexit_ssd.routing import ExitRouter


def test_plan_is_followed_again_and_again(small_model):
    routed = throughput._Routed(small_model.eval(), ExitRouter(2), [2, 0, 1, 0], frozenset({0, 1, 2}))
    x = torch.randn(4, 3, 96, 96)
    with torch.inference_mode():
        assert routed(x).tolist() == routed(x).tolist() == [2, 0, 1, 0]
    assert small_model.router is None


def test_an_exit_where_nobody_leaves_is_not_computed(small_model, monkeypatch):
    computed = []
    for name, branch in small_model.eval().branches.items():
        branch.register_forward_hook(lambda *_, name=name: computed.append(name))
    monkeypatch.setattr(throughput, "time_modules", lambda modules, images, *_: run_once(modules[:1], images))
    with pytest.raises(RuntimeError, match="run once"):
        throughput.mixed_throughput(small_model, ExitRouter(2), [0.0, 0.5, 0.5], batch=4)
    assert computed == [list(small_model.branches)[1]]


def run_once(modules, images):
    with torch.inference_mode():
        for module in modules:
            module(images)
    raise RuntimeError("run once")


def test_figures_follow_from_the_times(small_model, monkeypatch):
    plans = []

    def times(modules, images, runs, threads):
        plans.append(sorted(modules[0]._plan._plan.tolist()))
        assert len(images) == 4
        # mixed, plain, and batches that leave together at exits 0, 1 and 2
        return [throughput_timing(ms) for ms in (10.0, 12.0, 4.0, 8.0, 16.0)]

    monkeypatch.setattr(throughput, "time_modules", times)
    found = throughput.mixed_throughput(small_model, ExitRouter(2), [0.5, 0.25, 0.25], batch=4)
    assert plans == [[0, 0, 1, 2]]
    assert found.ideal == pytest.approx(4000 / ((4 + 4 + 8 + 16) / 4))
    assert found.mixed == pytest.approx(400) and found.plain == pytest.approx(4000 / 12)
    assert found.share_of_ideal == pytest.approx(0.8)


def throughput_timing(ms):
    from earlyexit_ssd.evaluation.cost import Timing

    return Timing(ms, ms, ms, 1, 1)


def test_runs_for_real(small_model):
    found = throughput.mixed_throughput(small_model, ExitRouter(2), [0.5, 0.0, 0.5], batch=4, runs=2)
    assert min(found.mixed, found.ideal, found.plain) > 0
