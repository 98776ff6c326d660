"""Certificates: their file, the model that they are for, and invalid content."""

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
from earlyexit_ssd.drift import DriftReference
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling import Architecture, describe_exits
from earlyexit_ssd.modeling.checkpoint import weights_hash
from tests.modeling.conftest import small_model


@pytest.fixture
def model():
    return small_model()


@pytest.fixture(scope="module")
def certificate():
    return Certificate(
        router=ExitRouter(2, policy="entropy", thresholds=[0.6, 2.0], temperatures=[1.5, 0.8]).to_dict(),
        target=CertifiedTarget(
            kind="risk", epsilon=0.02, delta=0.05, bound="betting", reference="full", score=0.5, iou=0.5
        ),
        measured=Measured(photos=3, loss=0.01),
        cost_model=CertifiedCosts(unit="mmacs", exits=(1.0, 2.0, 3.0), plain=2.5),
        weights_sha256=weights_hash(small_model()),
        photos_sha256=("ab" * 8, "cd" * 8),
        photo_list_sha256="ef",
        drift=DriftReference.from_decisions(("exit8", "exit12", "full"), [0, 2, 2], [[0.9, 0.1, 0.2]] * 2),
        versions={"torch": torch.__version__},
    )


def load(folder, content):
    """Load a certificate with this content, a text or a dict."""
    path = folder / "certificate.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return load_certificate(path)


def test_save_and_load(certificate, tmp_path):
    certificate.save(tmp_path / "certificate.json")
    again = load_certificate(tmp_path / "certificate.json")
    assert again == certificate and again.drift.exit_counts == (1, 0, 2)
    router = {**certificate.router, "thresholds": [2.0, 2.0]}
    assert not again.closed and dataclasses.replace(certificate, router=router).closed


def test_certificate_of_an_earlier_version_is_read_and_written_unchanged():
    path = Path(__file__).resolve().parents[2] / "docs" / "results" / "chair_stream" / "certificate.json"
    certificate = load_certificate(path)
    assert (certificate.target.kind, certificate.target.value, certificate.target.epsilon) == ("ap_drop", 0.01, None)
    assert certificate.measured.photos == 438 and certificate.cost_model.unit == "mmacs"
    assert certificate.to_dict() == json.loads(path.read_text())  # with its checksum


def test_unknown_accuracy_is_null_in_the_file(certificate):
    content = certificate.to_dict()
    assert content["measured"] == {"photos": 3, "loss": 0.01, "AP50": None, "AP50_full": None}
    assert set(content["target"]) == {"kind", "epsilon", "delta", "bound", "reference", "score", "iou"}


def test_router_for_the_calibrated_model(certificate, model):
    router = certificate.router_for(model)
    assert router.policy == "entropy"
    assert router.thresholds.tolist() == pytest.approx([0.6, 2.0])
    model.router = router  # the hash of the weights leaves the router out
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


def test_model_file_of_changed_weights_has_the_routing_without_the_certificate(certificate, model, tmp_path):
    model.router = certificate.router_for(model)
    model.score_thresh = 0.4  # the hash covers it
    model.save(tmp_path / "model.pth")
    router = EarlyExitSSDLite.from_pretrained(tmp_path / "model.pth").router
    assert router.certificate is None and router.to_dict() == model.router.to_dict()


def test_hash_covers_what_has_no_weights():
    """They are not in the state dict."""
    chair = Architecture(("chair",), image_size=64, width=0.25, head_outputs=4, folded_rows=(2,), exits=())
    state, hashes = chair.build().state_dict(), set()
    exits = [{"exits": describe_exits((), glances=[(32, layer)])} for layer in (11, 12)]
    exits += [{"exits": describe_exits((layer,), empty=(layer,))} for layer in (8, 10)]
    for changes in ({}, {"folded_rows": (3,)}, {"trained_size": 96}, {"trained_size": 128}, *exits):
        model = dataclasses.replace(chair, **changes).build()
        model.load_state_dict(state)
        hashes.add(weights_hash(model))
    assert len(hashes) == 8


def test_other_exits_are_refused(certificate, model):
    """The message is clearer than that for other weights."""
    drift = dataclasses.replace(certificate.drift, exit_names=("exit6", "exit12", "full"))
    other = dataclasses.replace(certificate, drift=drift)
    with pytest.raises(EarlyExitError, match="is for the exits exit6, exit12, the model has exit8, exit12; calibrate"):
        other.router_for(model)


def test_router_must_be_set_before_the_model_is_fused(certificate, model):
    with pytest.raises(EarlyExitError, match="set the certificate's router first, then fuse the model"):
        certificate.router_for(fuse_for_inference(model))
    model.router = certificate.router_for(model)
    assert fuse_for_inference(model).router.policy == "entropy"


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: content["photos_sha256"].clear(),
        lambda content: content["router"].update(thresholds=[0.0, 0.0]),
        lambda content: content.pop("content_sha256"),
    ],
)
def test_edited_certificates_are_refused(certificate, tmp_path, edit):
    content = certificate.to_dict()
    edit(content)
    with pytest.raises(EarlyExitError, match="was changed, since it does not fit its 'content_sha256'"):
        load(tmp_path, content)


def test_calibration_photos_are_refused(certificate):
    certificate.require_unseen([("a.jpg", "00" * 32)])
    with pytest.raises(EarlyExitError, match=r"b.jpg \(1 photos in all\) is in the certificate's calibration list"):
        certificate.require_unseen([("a.jpg", "00" * 32), ("b.jpg", "cd" * 32)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ('{"format": "other"}', "expected a certificate of format"),
        ('{"format": "earlyexit_ssd certificate/1"}', "the key 'cost_model' is missing"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    with pytest.raises(EarlyExitError, match=message):
        load(tmp_path, text)


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("router", "thresholds", None, "'router.thresholds' is missing"),
        ("router", "thresholds", [True, 2.0], r"router.thresholds\[0\] is True, expected a finite number"),
        ("router", "thresholds", [0.5] * 3, "router has 2 exits and 3 thresholds"),
        ("router", "num_exits", 1, "router has 1 exits and 2 thresholds, drift has 3 exit_names"),
        ("target", "iou", 1.5, "target.iou is 1.5, expected 0 to 1"),
        ("target", "kind", ["risk"], r"target.kind is \['risk'\], expected one of speedup, ap_drop, risk"),
        ("target", "epsilon", None, "'target.epsilon' is missing"),
        ("drift", "exit_names", "abc", "drift.exit_names is 'abc', expected a list"),
        ("measured", "photos", 0, "measured.photos is 0, expected 1 to"),
    ],
)
def test_missing_and_wrong_values_are_refused(certificate, tmp_path, part, key, value, message):
    content = certificate.to_dict()
    del content[part][key]
    content[part] |= {} if value is None else {key: value}
    with pytest.raises(EarlyExitError, match=message):
        load(tmp_path, content)


def test_missing_file(tmp_path):
    with pytest.raises(EarlyExitError, match="no such certificate.*tools/calibrate.py"):
        load_certificate(tmp_path / "none.json")


def test_parameters_for_another_model_are_refused_before_the_first_photo(certificate, model):
    fitted = ExitRouter(2, policy="foreseen_emptiness", parameters=[{"weight": [0.0] * 5, "bias": 0.0}] * 2)
    with pytest.raises(EarlyExitError, match="the certificate: its routing cannot be used .*calibrate again"):
        dataclasses.replace(certificate, router=fitted.to_dict()).router_for(model)
