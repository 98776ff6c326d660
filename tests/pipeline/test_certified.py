import dataclasses
from types import SimpleNamespace

import pytest
import torch

from earlyexit_ssd.config import load_config
from earlyexit_ssd.errors import ConfigError
from earlyexit_ssd.pipeline.certified import drift_of, open_certificate
from earlyexit_ssd.routing import ExitRouter
from earlyexit_ssd.routing.certificate import Certificate
from earlyexit_ssd.routing.drift_reference import Reference

EXITS = ("exit8", "full")


def certificate(kind="risk", score=0.5):
    reference = Reference.from_decisions(EXITS, [0] * 150 + [1] * 150, [[0.75] * 300])
    return Certificate(
        router=ExitRouter(1).to_dict(),
        target={
            "kind": kind,
            "score": score,
            "iou": 0.5,
            "reference": "full",
            "value": 2.0,
            "epsilon": 0.02,
            "delta": 0.05,
            "bound": "betting",
        },
        measured={},
        cost_model={},
        weights_sha256="",
        photos_sha256=(),
        photo_list_sha256="",
        drift=reference.to_dict(),
        versions={},
    )


@pytest.fixture
def open_one(monkeypatch, tmp_path):
    """Open a certificate at EVAL.SCORE 0.5; weights and photos are others' business."""

    def opened(one):
        one = dataclasses.replace(one)
        monkeypatch.setattr(Certificate, "router_for", lambda self, model: ExitRouter(1))
        one.save(tmp_path / "certificate.json")
        path = ["ROUTING.CERTIFICATE", str(tmp_path / "certificate.json"), "EVAL.SCORE", "0.5", "EVAL.IOU", "0.5"]
        return open_certificate(load_config(None, path), None, SimpleNamespace(records=[]))

    return opened


def test_a_risk_holds_at_its_own_score_only(open_one, caplog):
    assert open_one(certificate())[0].target["score"] == 0.5
    with pytest.raises(ConfigError, match="speaks of score 0.3 and IoU 0.5, EVAL has 0.5 and 0.5; set EVAL.SCORE"):
        open_one(certificate(score=0.3))
    assert open_one(certificate("speedup", score=0.3))[1].num_exits == 1
    assert "speaks of score 0.3" in caplog.text


def test_photos_unlike_those_of_calibration_are_said_to_be(caplog):
    collected = SimpleNamespace(confidences=[torch.full((300,), 0.75), torch.zeros(300)])
    alike = drift_of(certificate(), collected, [0, 1] * 150)
    assert alike["warnings"] == [] and alike["window"] == 200 and alike["shares"] == {"exit8": 0.5, "full": 0.5}
    changed = drift_of(certificate(), collected, [1] * 300)
    assert len(changed["warnings"]) >= 1 and "exit8 took 0 % of the last 200 photos" in changed["warnings"][0]
    assert "calibrate again" in caplog.text


def test_few_photos_are_compared_all_at_once():
    collected = SimpleNamespace(confidences=[torch.full((3,), 0.75), torch.zeros(3)])
    assert drift_of(certificate(), collected, [0, 1, 0])["window"] == 3
    assert drift_of(certificate(), collected, [])["shares"] is None
