"""The certificate: a JSON file with the result of a calibration, its guarantee, and the hash of the weights."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.drift import DriftReference
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
_REQUIRED = {"speedup": ("value",), "ap_drop": ("value", "delta"), "risk": ("epsilon", "delta", "bound")}


@dataclass(frozen=True, kw_only=True)
class CertifiedTarget:
    """The user's target. Fields that do not belong to its kind are None."""

    kind: Literal["speedup", "ap_drop", "risk"]
    reference: Literal["full", "labels"]  # losses are counted against the full path's detections or the labels
    score: Share  # lowest score of a counted detection
    iou: Share  # lowest IoU of a match
    value: float | None = None  # speedup: the smallest speed-up; ap_drop: the largest loss of AP50
    epsilon: Share | None = None  # risk: the largest expected loss
    # risk: the probability that the guarantee fails; ap_drop: the share of the bootstrap draws that may lose more than
    # ``value`` (no guarantee)
    delta: Share | None = None
    bound: str | None = None  # risk: the test of epsilon, a key of `earlyexit_ssd.bounds.BOUNDS`
    block: Annotated[int, 1, 2**31] | None = None  # consecutive photos of a folder that count as one draw; None means 1
    learned: bool | None = None  # whether the thresholds were learnt by gradient descent


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Figures on the calibration photos. Loss and cost are means per photo."""

    photos: Annotated[int, 1, 2**63] | None = None
    loss: float | None = None
    AP50: float | None = None  # of the routed detector; None without labels or objects
    AP50_full: float | None = None
    exit_share: dict[str, Share] | None = None  # exit name -> share of the photos that leave there
    cost: float | None = None  # in the unit of the certificate's cost model
    speedup: float | None = None  # cost of the detector without exits / ``cost``
    loss_bound: float | None = None  # risk: upper bound of the expected loss if only these thresholds were tested
    AP50_lost_bound: float | None = None  # ap_drop: the loss that a share 1 - delta of the bootstrap draws stays within
    # number of draws for the target, None if there are enough. ap_drop: a rule of thumb; risk: the least that can pass
    photos_needed: int | None = None
    labelled: bool | None = None
    agreement: dict[str, float | None] | None = None  # fields of `earlyexit_ssd.evaluation.matches.Agreement`
    equal_photos: int | None = None  # duplicates that were left out
    near_equal_photos: int | None = None
    blocks: int | None = None  # number of blocks of photos; None if each photo is a draw
    steps: int | None = None  # risk: number of threshold combinations that passed the test


@dataclass(frozen=True, kw_only=True)
class CertifiedCosts:
    """Costs of one photo."""

    unit: Literal["ms", "mmacs"] | None = None
    exits: tuple[float, ...] | None = None  # cost of a photo that leaves at this exit, for each exit
    plain: float | None = None  # cost in the detector without exits
    measured: dict[str, Any] | None = None  # for milliseconds: runtime, threads, runs and machine


def plain_part(part: CertifiedTarget | Measured | CertifiedCosts | DriftReference) -> dict[str, Any]:
    """Return the part as a dict for JSON, without the fields that are None. Only an unknown AP50 stays, as null."""
    nullable = ("AP50", "AP50_full")
    return {key: value for key, value in dataclasses.asdict(part).items() if value is not None or key in nullable}


@dataclass(frozen=True)
class Certificate:
    """The calibrated routing of one model, and its figures on the calibration photos."""

    router: RouterSettings  # settings of an `ExitRouter`: policy with its parameters, thresholds, temperatures
    target: CertifiedTarget
    measured: Measured
    cost_model: CertifiedCosts
    weights_sha256: str  # see `weights_hash`
    photos_sha256: tuple[str, ...]  # first 16 digits of the SHA-256 of each calibration photo's file, sorted
    photo_list_sha256: str  # SHA-256 of these digits, joined
    drift: DriftReference  # exits and confidences of the calibration photos, for a `DriftMonitor`
    versions: dict[str, str]

    @property
    def closed(self) -> bool:
        """Whether all exits are closed, so that every photo takes the full path."""
        return all(threshold >= CLOSED for threshold in self.router["thresholds"])

    def router_for(self, model: EarlyExitDetector) -> ExitRouter:
        """Build the router for ``model``. Raise an EarlyExitError if the model's weights or exits are not the
        calibrated ones, or if it is fused."""
        if model.fused:
            fix = "set the certificate's router first, then fuse the model (fusing keeps the router)"
            raise EarlyExitError(f"the model is fused, so its weights differ from the certificate's; {fix}")
        digest = weights_hash(model)
        if digest != self.weights_sha256:
            hashes = f"the certificate is for weights {self.weights_sha256:.12}, the model has {digest:.12}"
            raise EarlyExitError(f"{hashes}; calibrate again with tools/calibrate.py")
        calibrated, present = (", ".join(names[:-1]) for names in (self.drift.exit_names, model.exit_names))
        if calibrated != present:  # exits without a branch have no weights, so the hash does not cover them
            names = f"the certificate is for the exits {calibrated}, the model has {present}"
            raise EarlyExitError(f"{names}; calibrate again")
        try:
            router = make_router(model, self.router)
        except EarlyExitError as error:
            raise EarlyExitError(f"the certificate: {error}; calibrate again") from None
        router.certificate = self
        return router

    def require_unseen(self, photos: Iterable[tuple[str | os.PathLike[str], str]]) -> None:
        """Raise an EarlyExitError if a photo (path, SHA-256) is a calibration photo: figures on it are too good."""
        calibrated = set(self.photos_sha256)
        shared = [path for path, digest in photos if digest[:16] in calibrated]
        if shared:
            count = f"{len(shared)} photos in all"
            raise EarlyExitError(f"{shared[0]} ({count}) is in the certificate's calibration list; use other photos")

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the certificate's file as plain JSON types. `parse_certificate` is the inverse."""
        content: dict[str, Any] = {"format": FORMAT}
        for name, part in vars(self).items():
            content[name] = plain_part(part) if dataclasses.is_dataclass(part) else part
        content = json.loads(json.dumps(content))
        return {**content, CHECKSUM: _checksum(content)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the certificate as a JSON file."""
        write_json(path, self.to_dict())


def load_certificate(path: str | os.PathLike[str]) -> Certificate:
    """Read a certificate file. Raise an EarlyExitError if it is missing, damaged or changed by hand."""
    return parse_certificate(read_json(path, "certificate", _ADVICE), path)


def parse_certificate(content: Any, source: str | os.PathLike[str]) -> Certificate:
    """The inverse of `Certificate.to_dict`. Raises an EarlyExitError for a missing, unknown or wrong key, and if the
    checksum differs. ``source`` is the file's name, for messages."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise EarlyExitError(f"{source}: expected a certificate of format {FORMAT!r}; {_ADVICE}")
    checked = {key: value for key, value in content.items() if key != CHECKSUM}
    try:
        certificate = build(Certificate, {key: value for key, value in checked.items() if key != "format"})
        _require_consistent(certificate)
    except EarlyExitError as error:
        raise EarlyExitError(f"{source}: not a valid certificate: {error}; {_ADVICE}") from None
    if content.get(CHECKSUM) != _checksum(checked):
        raise EarlyExitError(f"{source}: the content was changed, since it does not fit its '{CHECKSUM}'; {_ADVICE}")
    return certificate


def _require_consistent(certificate: Certificate) -> None:
    """Raise an EarlyExitError if a key that the target's kind needs is missing, or if numbers of exits differ."""
    router, target = certificate.router, certificate.target
    missing = ["router.thresholds"] if "thresholds" not in router else []
    missing += [f"target.{key}" for key in _REQUIRED[target.kind] if getattr(target, key) is None]
    if missing:
        raise EarlyExitError(f"the key '{missing[0]}' is missing")
    exits, thresholds, names = router["num_exits"], len(router["thresholds"]), len(certificate.drift.exit_names)
    if thresholds not in (1, exits) or names != exits + 1:
        found = f"router has {exits} exits and {thresholds} thresholds, drift has {names} exit_names"
        raise EarlyExitError(f"{found}, expected one threshold per exit, and the exits and 'full' as exit_names")


def _checksum(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
