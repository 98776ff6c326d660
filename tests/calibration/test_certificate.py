"""Certificates: their file, their model, and refused content."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from earlyexit_ssd import EarlyExitSSDLite, ExitRouter, fuse_for_inference
from earlyexit_ssd.calibration.certificate import (
    Certificate,
    CertifiedCosts,
    CertifiedTarget,
    Measured,
    load_certificate,
)
from earlyexit_ssd.drift import Reference
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling.checkpoint import weights_hash
from tests.modeling.conftest import small_model

POINT = {"score": 0.5, "iou": 0.5}


@pytest.fixture
def model():
    return small_model()


@pytest.fixture
def certificate(model):
    return Certificate(
        router=ExitRouter(2, policy="entropy", thresholds=[0.6, 2.0], temperatures=[1.5, 0.8]).to_dict(),
        target=CertifiedTarget(kind="risk", epsilon=0.02, delta=0.05, bound="betting", reference="full", **POINT),
        measured=Measured(photos=3, loss=0.01),
        cost_model=CertifiedCosts(unit="mmacs", exits=(1.0, 2.0, 3.0), plain=2.5),
        weights_sha256=weights_hash(model),
        photos_sha256=("ab" * 8, "cd" * 8),
        photo_list_sha256="ef",
        drift=Reference.from_decisions(("exit8", "exit12", "full"), [0, 2, 2], [[0.9, 0.1, 0.2]] * 2),
        versions={"torch": torch.__version__},
    )


def test_save_and_load(certificate, tmp_path):
    certificate.save(tmp_path / "certificate.json")
    again = load_certificate(tmp_path / "certificate.json")
    assert again == certificate
    assert not again.closed
    assert again.drift.exit_counts == (1, 0, 2)


def test_a_certificate_of_an_earlier_version_is_read_and_written_alike():
    path = Path(__file__).resolve().parents[2] / "docs" / "results" / "chair_stream" / "certificate.json"
    certificate = load_certificate(path)
    assert (certificate.target.kind, certificate.target.value, certificate.target.epsilon) == ("ap_drop", 0.01, None)
    assert certificate.measured.photos == 438 and certificate.cost_model.unit == "mmacs"
    assert certificate.to_dict() == json.loads(path.read_text())  # its checksum among them


def test_unknown_accuracy_is_null_in_the_file(certificate):
    content = certificate.to_dict()
    assert content["measured"] == {"photos": 3, "loss": 0.01, "AP50": None, "AP50_full": None}
    assert set(content["target"]) == {"kind", "epsilon", "delta", "bound", "reference", "score", "iou"}


def test_router_for_the_calibrated_model(certificate, model):
    router = certificate.router_for(model)
    assert router.policy == "entropy"
    assert router.thresholds.tolist() == pytest.approx([0.6, 2.0])
    model.router = router  # it does not count as part of the weights
    certificate.router_for(model)
    with torch.no_grad():
        next(model.branches.parameters()).view(-1)[0] += 1e-3
    with pytest.raises(EarlyExitError, match="the certificate is for weights .*calibrate again"):
        certificate.router_for(model)


def test_model_file_has_the_certificate_of_an_unchanged_router(certificate, model, tmp_path):
    model.router = certificate.router_for(model)
    model.save(tmp_path / "model.pth")
    again = EarlyExitSSDLite.from_pretrained(tmp_path / "model.pth")
    assert again.router.certificate == certificate
    again.router.thresholds = [0.7, 2.0]
    again.save(tmp_path / "other.pth")
    assert EarlyExitSSDLite.from_pretrained(tmp_path / "other.pth").router.certificate is None


def test_exits_behind_other_layers_are_refused(certificate, model):
    """Empty ones have no weights to be known by."""
    drift = dataclasses.replace(certificate.drift, exit_names=("exit6", "exit12", "full"))
    other = dataclasses.replace(certificate, drift=drift)
    with pytest.raises(EarlyExitError, match="is for the exits exit6, exit12, the model has exit8, exit12; calibrate"):
        other.router_for(model)


def test_a_fused_model_takes_the_router_before_it_is_fused(certificate, model):
    with pytest.raises(EarlyExitError, match="set the certificate's router first, then fuse the model"):
        certificate.router_for(fuse_for_inference(model))
    model.router = certificate.router_for(model)
    assert fuse_for_inference(model).router.policy == "entropy"


@pytest.mark.parametrize("key", ["photos_sha256", "router", "content_sha256"])
def test_edited_certificates_are_refused(certificate, tmp_path, key):
    path = tmp_path / "certificate.json"
    certificate.save(path)
    content = json.loads(path.read_text())
    content["router"]["thresholds"] = [0.0, 0.0] if key == "router" else content["router"]["thresholds"]
    if key == "photos_sha256":
        content[key] = []
    if key == "content_sha256":
        del content[key]
    path.write_text(json.dumps(content))
    with pytest.raises(EarlyExitError, match="was changed, since it does not fit its 'content_sha256'"):
        load_certificate(path)


def test_refuses_photos_of_the_calibration(certificate):
    certificate.require_unseen([("a.jpg", "00" * 32)])
    with pytest.raises(EarlyExitError, match=r"b.jpg \(1 photos in all\) is in the certificate's calibration list"):
        certificate.require_unseen([("a.jpg", "00" * 32), ("b.jpg", "cd" * 32)])


def test_closed_where_no_exit_is_open(certificate):
    router = {**certificate.router, "thresholds": [2.0, 2.0]}
    assert Certificate(**{**vars(certificate), "router": router}).closed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected a certificate of format"),
        ('{"format": "other"}', "expected a certificate of format"),
        ('{"format": "earlyexit_ssd certificate/1"}', "the key 'cost_model' is missing"),
    ],
)
def test_other_files(tmp_path, text, message):
    path = tmp_path / "certificate.json"
    path.write_text(text)
    with pytest.raises(EarlyExitError, match=message):
        load_certificate(path)


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("router", "thresholds", None, "'router.thresholds' is missing"),
        ("router", "thresholds", "0.5", "router.thresholds is '0.5', expected a list"),
        ("router", "thresholds", [True, 2.0], r"router.thresholds\[0\] is True, expected a finite number"),
        ("router", "thresholds", [0.5] * 3, "router has 2 exits and 3 thresholds"),
        ("router", "num_exits", 1, "router has 1 exits and 2 thresholds, drift has 3 exit_names"),
        ("target", "score", None, "target: the key 'score' is missing"),
        ("target", "score", "0.5", "target.score is '0.5', expected a finite number"),
        ("target", "iou", 1.5, "target.iou is 1.5, expected 0 to 1"),
        ("target", "kind", ["risk"], r"target.kind is \['risk'\], expected one of speedup, ap_drop, risk"),
        ("target", "epsilon", None, "'target.epsilon' is missing"),
        ("drift", "exit_names", None, "drift: the key 'exit_names' is missing"),
        ("drift", "exit_names", [1, 2, 3], r"drift.exit_names\[0\] is 1, expected text"),
        ("drift", "exit_names", "abc", "drift.exit_names is 'abc', expected a list"),
        ("measured", "photos", 0, "measured.photos is 0, expected 1 to"),
        ("cost_model", "exits", [1.0, None], r"cost_model.exits\[1\] is None"),
    ],
)
def test_parts_that_are_missing_or_of_another_type(certificate, tmp_path, part, key, value, message):
    """Whatever the checksum says."""
    content = certificate.to_dict()
    del content[part][key]
    content[part] |= {} if value is None else {key: value}
    (tmp_path / "certificate.json").write_text(json.dumps(content))
    with pytest.raises(EarlyExitError, match=message):
        load_certificate(tmp_path / "certificate.json")


def test_a_key_given_twice_and_deep_nesting(certificate, tmp_path):
    path = tmp_path / "certificate.json"
    certificate.save(path)
    text = path.read_text()
    path.write_text(text.replace('"epsilon"', '"epsilon": 0.001, "epsilon"'))
    with pytest.raises(EarlyExitError, match="the key 'epsilon' is given twice"):
        load_certificate(path)
    path.write_text(text.replace('"versions": {', '"versions": {"x": ' + "[" * 500 + "]" * 500 + ", "))
    with pytest.raises(EarlyExitError, match="nested more than 32 deep"):
        load_certificate(path)


def test_a_policy_fitted_for_another_model_is_found_before_the_first_photo(certificate, model):
    fitted = ExitRouter(2, policy="foreseen_emptiness", parameters=[{"weight": [0.0] * 5, "bias": 0.0}] * 2)
    with pytest.raises(EarlyExitError, match="the certificate: its routing cannot be used .*calibrate again"):
        dataclasses.replace(certificate, router=fitted.to_dict()).router_for(model)


def test_unknown_key_and_no_file(certificate, tmp_path):
    path = tmp_path / "certificate.json"
    certificate.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "more": 1}))
    with pytest.raises(EarlyExitError, match="the key 'more' is unknown"):
        load_certificate(path)
    with pytest.raises(EarlyExitError, match="no such certificate.*tools/calibrate.py"):
        load_certificate(tmp_path / "none.json")
