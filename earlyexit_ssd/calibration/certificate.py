"""What a calibration promises, for which weights, and how it came about: a small JSON file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import nn

from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.drift import Reference
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.files import write_json
from earlyexit_ssd.modeling.checkpoint import weights_hash
from earlyexit_ssd.modeling.detector import is_fused
from earlyexit_ssd.modeling.outputs import RouterSettings
from earlyexit_ssd.modeling.pretrained import make_router
from earlyexit_ssd.plain import build, read_json
from earlyexit_ssd.routing.router import ExitRouter

Share = Annotated[float, 0, 1]

FORMAT = "earlyexit_ssd certificate/1"
CHECKSUM = "content_sha256"
_ADVICE = "write one with tools/calibrate.py"


@dataclass(frozen=True, kw_only=True)
class CertifiedTarget:
    """What was asked for; None where a kind of target does not have it.

    Losses are counted against ``reference``, at ``score`` and ``iou``. ``value`` is of a speed-up or an AP drop,
    ``epsilon`` and the inequality ``bound`` of a risk, ``delta`` of a risk or an AP drop. ``block`` photos of a folder
    are one draw; ``learned`` are thresholds of a soft exit.
    """

    kind: Literal["speedup", "ap_drop", "risk"]
    reference: Literal["full", "labels"]
    score: Share
    iou: Share
    value: float | None = None
    epsilon: Share | None = None
    delta: Share | None = None
    bound: str | None = None
    block: Annotated[int, 1, 2**31] | None = None
    learned: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured on the calibration photos.

    Attributes:
        loss: mean per photo; cost: mean, in the unit of the costs; speedup: against the detector without exits.
        AP50, AP50_full: routed and of the full path; None where nobody labelled the photos (``labelled`` False).
        loss_bound: of a risk, the upper confidence bound of the loss at delta, were this the only step tested; steps:
            how many were tested and passed.
        AP50_lost_bound: of an AP drop; photos_needed: where there were fewer.
        agreement: the fields of `earlyexit_ssd.evaluation.matches.Agreement`.
        equal_photos, near_equal_photos: left out, since others stand for them; blocks: how many there were.
    """

    photos: Annotated[int, 1, 2**63] | None = None
    loss: float | None = None
    AP50: float | None = None
    AP50_full: float | None = None
    exit_share: dict[str, Share] | None = None
    cost: float | None = None
    speedup: float | None = None
    loss_bound: float | None = None
    AP50_lost_bound: float | None = None
    photos_needed: int | None = None
    labelled: bool | None = None
    agreement: dict[str, float | None] | None = None
    equal_photos: int | None = None
    near_equal_photos: int | None = None
    blocks: int | None = None
    steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class CertifiedCosts:
    """What a photo costs that leaves at each exit, and without exits; ``measured`` says where milliseconds were."""

    unit: Literal["ms", "mmacs"] | None = None
    exits: tuple[float, ...] | None = None
    plain: float | None = None
    measured: dict[str, Any] | None = None


def plain_part(part: CertifiedTarget | Measured | CertifiedCosts | Reference) -> dict[str, Any]:
    """As it stands in JSON: what is None is left out, but for accuracy that nobody knows."""
    null = ("AP50", "AP50_full")
    return {key: value for key, value in dataclasses.asdict(part).items() if value is not None or key in null}


@dataclass(frozen=True)
class Certificate:
    """Routing for one model, and what was measured on the calibration photos.

    Attributes:
        router: the settings of an `ExitRouter`: policy with its parameters, thresholds, temperatures.
        weights_sha256: of the network's parameters and buffers.
        photos_sha256: the calibration photos' contents, each the first 16 hexadecimal digits.
        photo_list_sha256: of the sorted list of those.
        drift: the calibration photos' decisions, the reference of a `DriftMonitor`.
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
        """Everything takes the full path."""
        return all(threshold >= CLOSED for threshold in self.router["thresholds"])

    def router_for(self, model: nn.Module) -> ExitRouter:
        """The router, for the weights that it was calibrated with; an EarlyExitError for others, fused ones too."""
        if is_fused(model):
            fix = "give it the certificate's router first, then fuse it (the router goes along)"
            raise EarlyExitError(f"the model is fused, so its weights are not the certificate's; {fix}")
        digests = self.weights_sha256, weights_hash(model)
        if digests[0] != digests[1]:
            told = "the certificate is for weights {:.12}, the model has {:.12}".format(*digests)
            raise EarlyExitError(f"{told}; calibrate again with tools/calibrate.py")
        calibrated, own = (", ".join(names[:-1]) for names in (self.drift.exit_names, model.exit_names))
        if calibrated != own:  # an empty exit has no weights to be known by
            raise EarlyExitError(f"the certificate is for the exits {calibrated}, the model has {own}; calibrate again")
        try:
            router = make_router(model, self.router)
        except EarlyExitError as error:
            raise EarlyExitError(f"the certificate: {error}; calibrate again") from None
        router.certificate = self
        return router

    def require_unseen(self, photos: Iterable[tuple[str | os.PathLike[str], str]]) -> None:
        """Refuse photos (path and SHA-256 of each) that calibrated: figures on them flatter."""
        known = set(self.photos_sha256)
        shared = [path for path, digest in photos if digest[:16] in known]
        if shared:
            told = f"{shared[0]} ({len(shared)} photos in all) is in the certificate's calibration list"
            raise EarlyExitError(f"{told}; evaluate on photos that were not calibrated on")

    def to_dict(self) -> dict[str, Any]:
        """What a file of it holds, as it comes back from JSON; `parse_certificate` reads it."""
        parts = {
            name: plain_part(part) if dataclasses.is_dataclass(part) else part for name, part in vars(self).items()
        }
        content = json.loads(json.dumps({"format": FORMAT, **parts}))
        return {**content, CHECKSUM: _checksum(content)}

    def save(self, path: str | os.PathLike[str]) -> None:
        write_json(path, self.to_dict())


def load_certificate(path: str | os.PathLike[str]) -> Certificate:
    """Read a certificate; an EarlyExitError where there is no such file, or none that a calibration wrote."""
    return parse_certificate(read_json(path, "certificate", _ADVICE), path)


def parse_certificate(content: Any, source: str | os.PathLike[str]) -> Certificate:
    """The certificate that a file holds as plain types; ``source`` is the file, for messages.

    Raises:
        EarlyExitError: a part is missing, unknown, of another type or not what the calibration wrote.
    """
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise EarlyExitError(f"{source}: expected a certificate of format {FORMAT!r}; {_ADVICE}")
    checked = {key: value for key, value in content.items() if key != CHECKSUM}
    try:
        certificate = build(Certificate, {key: value for key, value in checked.items() if key != "format"})
        _require_whole(certificate)
    except EarlyExitError as error:
        raise EarlyExitError(f"{source}: {error}, no certificate has that; {_ADVICE}") from None
    if content.get(CHECKSUM) != _checksum(checked):
        told = f"the content does not fit its '{CHECKSUM}', so it is not what a calibration found"
        raise EarlyExitError(f"{source}: {told}; {_ADVICE}")
    return certificate


def _require_whole(certificate: Certificate) -> None:
    """Every number that the target's kind needs is there, and the parts speak of as many exits."""
    router, target = certificate.router, certificate.target
    needed = {"speedup": ("value",), "ap_drop": ("value", "delta"), "risk": ("epsilon", "delta", "bound")}[target.kind]
    missing = [f"target.{key}" for key in needed if getattr(target, key) is None]
    if "thresholds" not in router:
        missing.insert(0, "router.thresholds")
    if missing:
        raise EarlyExitError(f"the key '{missing[0]}' is missing")
    exits, thresholds = router["num_exits"], len(router["thresholds"])
    names = len(certificate.drift.exit_names)
    if thresholds not in (1, exits) or names != exits + 1:
        found = f"router has {exits} exits and {thresholds} thresholds, drift has {names} exit_names"
        raise EarlyExitError(f"{found}; expected one threshold for each exit, and one name more")


def _checksum(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
