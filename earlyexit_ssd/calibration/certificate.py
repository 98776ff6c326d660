"""The certificate: a JSON file with the result of a calibration, what it promises, and the weights it holds for."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.drift import Reference
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.files import write_json
from earlyexit_ssd.modeling.checkpoint import weights_hash
from earlyexit_ssd.modeling.detector import EarlyExitDetector
from earlyexit_ssd.modeling.outputs import RouterSettings
from earlyexit_ssd.modeling.pretrained import make_router
from earlyexit_ssd.plain import build, read_json
from earlyexit_ssd.routing.router import ExitRouter

Share = Annotated[float, 0, 1]

FORMAT = "earlyexit_ssd certificate/1"
CHECKSUM = "content_sha256"
_ADVICE = "write one with tools/calibrate.py"
_NEEDED = {"speedup": ("value",), "ap_drop": ("value", "delta"), "risk": ("epsilon", "delta", "bound")}


@dataclass(frozen=True, kw_only=True)
class CertifiedTarget:
    """The target that the user asked for. A field that this kind of target does not use is None."""

    kind: Literal["speedup", "ap_drop", "risk"]
    reference: Literal["full", "labels"]  # what losses are counted against: the full path's detections or the labels
    score: Share  # least score of a counted detection
    iou: Share  # least IoU of a match
    value: float | None = None  # of a speedup the least speed-up, of an ap_drop the largest loss of AP50
    epsilon: Share | None = None  # of a risk, the largest expected loss
    # of a risk, the probability that the guarantee fails; of an ap_drop, the share of the bootstrap draws that may lose
    # more, which is no guarantee
    delta: Share | None = None
    bound: str | None = None  # of a risk, the test of epsilon: a key of `earlyexit_ssd.bounds.BOUNDS`
    block: Annotated[int, 1, 2**31] | None = None  # consecutive photos of a folder that count as one draw; None: one
    learned: bool | None = None  # whether the thresholds were learnt by gradient descent


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured on the calibration photos; means are per photo."""

    photos: Annotated[int, 1, 2**63] | None = None
    loss: float | None = None
    AP50: float | None = None  # of the routed detector; None without labels or objects
    AP50_full: float | None = None
    exit_share: dict[str, Share] | None = None  # exit name -> share of the photos that leave there
    cost: float | None = None  # in the unit of the certificate's cost model
    speedup: float | None = None  # cost of the detector without exits / ``cost``
    loss_bound: float | None = None  # of a risk, bound of the expected loss at this step alone; epsilon is guaranteed
    AP50_lost_bound: float | None = None  # of an ap_drop, the loss that 1 - delta of the bootstrap draws do not exceed
    photos_needed: int | None = None  # of an ap_drop, draws that it should have, a rule of thumb; None: it has them
    labelled: bool | None = None
    agreement: dict[str, float | None] | None = None  # fields of `earlyexit_ssd.evaluation.matches.Agreement`
    equal_photos: int | None = None  # duplicates that were left out
    near_equal_photos: int | None = None
    blocks: int | None = None  # of photos; None if each photo is a draw
    steps: int | None = None  # of a risk, steps of the path of thresholds that passed the test


@dataclass(frozen=True, kw_only=True)
class CertifiedCosts:
    """Costs of one photo."""

    unit: Literal["ms", "mmacs"] | None = None
    exits: tuple[float, ...] | None = None  # where it leaves at each exit
    plain: float | None = None  # in the detector without exits
    measured: dict[str, Any] | None = None  # of milliseconds: runtime, threads, runs and machine


def plain_part(part: CertifiedTarget | Measured | CertifiedCosts | Reference) -> dict[str, Any]:
    """The part as a dict for JSON, without the fields that are None. Only an unknown AP50 is written, as null."""
    nullable = ("AP50", "AP50_full")
    return {key: value for key, value in dataclasses.asdict(part).items() if value is not None or key in nullable}


@dataclass(frozen=True)
class Certificate:
    """The calibrated routing of one model, and the figures that were measured on the calibration photos.

    Attributes:
        router: settings of an `ExitRouter`: policy with its parameters, thresholds, temperatures.
        weights_sha256: see `weights_hash`.
        photos_sha256: for each calibration photo, the first 16 hexadecimal digits of its file's SHA-256, sorted.
        photo_list_sha256: SHA-256 of these digits, joined.
        drift: exits and confidences of the calibration photos, for a `DriftMonitor`.
    """

    router: RouterSettings
    target: CertifiedTarget
    measured: Measured
    cost_model: CertifiedCosts
    weights_sha256: str
    photos_sha256: tuple[str, ...]
    photo_list_sha256: str
    drift: Reference
    versions: dict[str, str]

    @property
    def closed(self) -> bool:
        """Whether all exits are closed, so that every photo takes the full path."""
        return all(threshold >= CLOSED for threshold in self.router["thresholds"])

    def router_for(self, model: EarlyExitDetector) -> ExitRouter:
        """The router for ``model``; an EarlyExitError if its weights or exits are not the calibrated ones, or fused."""
        if model.fused:
            fix = "give it the certificate's router first, then fuse it (the router goes along)"
            raise EarlyExitError(f"the model is fused, so its weights are not the certificate's; {fix}")
        found = weights_hash(model)
        if found != self.weights_sha256:
            told = f"the certificate is for weights {self.weights_sha256:.12}, the model has {found:.12}"
            raise EarlyExitError(f"{told}; calibrate again with tools/calibrate.py")
        calibrated, present = (", ".join(names[:-1]) for names in (self.drift.exit_names, model.exit_names))
        if calibrated != present:  # exits without a branch have no weights, so the hash of the weights misses them
            told = f"the certificate is for the exits {calibrated}, the model has {present}"
            raise EarlyExitError(f"{told}; calibrate again")
        try:
            router = make_router(model, self.router)
        except EarlyExitError as error:
            raise EarlyExitError(f"the certificate: {error}; calibrate again") from None
        router.certificate = self
        return router

    def require_unseen(self, photos: Iterable[tuple[str | os.PathLike[str], str]]) -> None:
        """Raise an EarlyExitError if one of these photos (path, SHA-256) was calibrated on: figures would flatter."""
        known = set(self.photos_sha256)
        shared = [path for path, digest in photos if digest[:16] in known]
        if shared:
            told = f"{shared[0]} ({len(shared)} photos in all) is in the certificate's calibration list"
            raise EarlyExitError(f"{told}; evaluate on photos that were not calibrated on")

    def to_dict(self) -> dict[str, Any]:
        """The content of the certificate's file as plain JSON types; `parse_certificate` is the inverse."""
        parts = {
            name: plain_part(part) if dataclasses.is_dataclass(part) else part for name, part in vars(self).items()
        }
        content = json.loads(json.dumps({"format": FORMAT, **parts}))
        return {**content, CHECKSUM: _checksum(content)}

    def save(self, path: str | os.PathLike[str]) -> None:
        write_json(path, self.to_dict())


def load_certificate(path: str | os.PathLike[str]) -> Certificate:
    """Read a file of `Certificate.save`; an EarlyExitError if it is missing or not as a calibration wrote it."""
    return parse_certificate(read_json(path, "certificate", _ADVICE), path)


def parse_certificate(content: Any, source: str | os.PathLike[str]) -> Certificate:
    """The inverse of `Certificate.to_dict`; an EarlyExitError with the file's name, ``source``, for a missing, unknown
    or wrong key, and for changed content (its checksum differs)."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise EarlyExitError(f"{source}: expected a certificate of format {FORMAT!r}; {_ADVICE}")
    checked = {key: value for key, value in content.items() if key != CHECKSUM}
    try:
        certificate = build(Certificate, {key: value for key, value in checked.items() if key != "format"})
        _require_consistent(certificate)
    except EarlyExitError as error:
        raise EarlyExitError(f"{source}: {error}, no certificate has that; {_ADVICE}") from None
    if content.get(CHECKSUM) != _checksum(checked):
        told = f"the content does not fit its '{CHECKSUM}', so it is not what a calibration found"
        raise EarlyExitError(f"{source}: {told}; {_ADVICE}")
    return certificate


def _require_consistent(certificate: Certificate) -> None:
    """Raise an EarlyExitError if a key that the kind of target needs is missing, or the numbers of exits differ."""
    router, target = certificate.router, certificate.target
    missing = ["router.thresholds"] if "thresholds" not in router else []
    missing += [f"target.{key}" for key in _NEEDED[target.kind] if getattr(target, key) is None]
    if missing:
        raise EarlyExitError(f"the key '{missing[0]}' is missing")
    exits, thresholds, names = router["num_exits"], len(router["thresholds"]), len(certificate.drift.exit_names)
    if thresholds not in (1, exits) or names != exits + 1:
        found = f"router has {exits} exits and {thresholds} thresholds, drift has {names} exit_names"
        raise EarlyExitError(f"{found}; expected one threshold for each exit, and one name more")


def _checksum(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
