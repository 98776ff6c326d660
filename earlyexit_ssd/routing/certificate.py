"""What a calibration promises, for which weights, and how it came about: a small JSON file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.files import write_json
from earlyexit_ssd.modeling.checkpoint import weights_hash
from earlyexit_ssd.modeling.fused import is_fused
from earlyexit_ssd.routing.drift_reference import Reference
from earlyexit_ssd.routing.router import ExitRouter

FORMAT = "earlyexit_ssd certificate/1"
CHECKSUM = "content_sha256"


@dataclass(frozen=True)
class Certificate:
    """Routing for one model, and what was measured on the calibration photos.

    Attributes:
        router: the settings of an `ExitRouter`: policy with its parameters, thresholds, temperatures.
        target: what was asked for: ``kind`` (``speedup``, ``ap_drop`` or ``risk``) and its numbers (``value``;
            ``ap_drop`` has ``delta`` too, ``risk`` has ``epsilon``, ``delta`` and ``bound``, the inequality),
            ``reference`` (full or labels), ``score`` and ``iou``; where it was asked for ``block`` (photos of a folder
            that are one draw) and ``learned`` (thresholds of a soft exit).
        measured: on the calibration photos: ``photos``, ``loss`` (mean per photo), ``AP50``, ``AP50_full``,
            ``exit_share``, ``cost``, ``speedup``; for a risk ``loss_bound`` (the upper confidence bound of the loss at
            delta, were this the only step tested), for an AP drop ``AP50_lost_bound`` and, where there were fewer
            photos, ``photos_needed``. ``labelled`` is False where nobody labelled the photos: then AP50 is None.
            ``agreement`` with the full path at the score: its ``objects``, how many were ``kept``, how many ``added``,
            and the share of the ``same_photos``. ``equal_photos`` and ``near_equal_photos`` were left out, since
            others stand for them; ``blocks`` is how many there were.
        cost_model: ``unit`` (ms or mmacs), ``exits``, ``plain``, and where milliseconds were measured.
        weights_sha256: of the network's parameters and buffers.
        photos_sha256: the calibration photos' contents, each the first 16 hexadecimal digits.
        photo_list_sha256: of the sorted list of those.
        drift: the calibration photos' decisions, for a `DriftMonitor`.
        versions: of the software.
    """

    router: dict[str, Any]
    target: dict[str, Any]
    measured: dict[str, Any]
    cost_model: dict[str, Any]
    weights_sha256: str
    photos_sha256: tuple[str, ...]
    photo_list_sha256: str
    drift: dict[str, Any]
    versions: dict[str, str]

    @property
    def closed(self) -> bool:
        """No exit is open: everything takes the full path."""
        return all(threshold >= CLOSED for threshold in self.router["thresholds"])

    def router_for(self, model: nn.Module) -> ExitRouter:
        """The router, for the weights that it was calibrated with.

        Raises:
            EarlyExitError: the model has other weights, those of a fused model among them.
        """
        if is_fused(model):
            raise EarlyExitError(
                "the model is fused for inference, so its weights are not the certificate's; give it the certificate's "
                "router first, then fuse it (the router goes along)"
            )
        if weights_hash(model) != self.weights_sha256:
            raise EarlyExitError(
                f"the certificate is for weights {self.weights_sha256[:12]}, the model has {weights_hash(model)[:12]}; "
                "calibrate again with tools/calibrate.py"
            )
        try:
            router = ExitRouter(**self.router)
        except (TypeError, KeyError, ValueError, RuntimeError, EarlyExitError) as error:
            raise EarlyExitError(f"the certificate's router cannot be used ({error}); calibrate again") from None
        calibrated, own = (", ".join(names[:-1]) for names in (self.drift["exit_names"], model.exit_names))
        if calibrated != own:  # an empty exit has no weights to be known by
            raise EarlyExitError(f"the certificate is for the exits {calibrated}, the model has {own}; calibrate again")
        router.certificate = self
        return router.to(next(model.parameters()).device)

    def require_unseen(self, photos: Iterable[tuple[str | os.PathLike[str], str]]) -> None:
        """Refuse photos that calibrated: figures on them flatter.

        Args:
            photos: path and SHA-256 of each.
        """
        known = set(self.photos_sha256)
        shared = [path for path, digest in photos if digest[:16] in known]
        if shared:
            raise EarlyExitError(
                f"{shared[0]} ({len(shared)} photos in all) is in the certificate's calibration list; "
                "evaluate on photos that were not calibrated on"
            )

    def drift_reference(self) -> Reference:
        """For a `DriftMonitor`."""
        return Reference.from_dict(self.drift)

    def to_dict(self) -> dict[str, Any]:
        """What a file of it holds, as it comes back from JSON; `certificate_of` reads it."""
        content = json.loads(json.dumps({"format": FORMAT, **dataclasses.asdict(self)}))
        return {**content, CHECKSUM: _checksum(content)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file."""
        write_json(path, self.to_dict())


def load_certificate(path: str | os.PathLike[str]) -> Certificate:
    """Read a certificate.

    Raises:
        EarlyExitError: no such file, not a certificate, or one that was edited by hand.
    """
    advice = "write one with tools/calibrate.py"
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise EarlyExitError(f"{path}: no readable certificate ({error.strerror}); {advice}") from None
    except ValueError as error:
        raise EarlyExitError(f"{path}: not JSON ({error}); {advice}") from None
    return certificate_of(content, path)


def certificate_of(content: Any, path: str | os.PathLike[str]) -> Certificate:
    """A certificate of what `Certificate.to_dict` gave, found in the file ``path``.

    Raises:
        EarlyExitError: as `load_certificate`.
    """
    advice = "write one with tools/calibrate.py"
    content = dict(content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise EarlyExitError(f"{path}: expected a certificate of format {FORMAT!r}; {advice}")
    checksum = content.pop(CHECKSUM, None)
    names = {field.name for field in dataclasses.fields(Certificate)}
    if names != set(content):
        wrong = sorted(names ^ set(content))[0]
        raise EarlyExitError(f"{path}: the key '{wrong}' is {'missing' if wrong in names else 'unknown'}; {advice}")
    types = {"photos_sha256": list, "weights_sha256": str, "photo_list_sha256": str}
    for name in sorted(names):
        if not isinstance(content[name], types.get(name, dict)):
            raise EarlyExitError(f"{path}: '{name}' is {content[name]!r:.40}, no certificate has that; {advice}")
    if checksum != _checksum({"format": FORMAT, **content}):
        raise EarlyExitError(
            f"{path}: the content does not fit its '{CHECKSUM}', so it is not what a calibration found; {advice}"
        )
    return Certificate(**{**content, "photos_sha256": tuple(content["photos_sha256"])})


def _checksum(content: dict[str, Any]) -> str:
    """SHA-256 of the content as it comes back from JSON."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(content)), sort_keys=True).encode()).hexdigest()
