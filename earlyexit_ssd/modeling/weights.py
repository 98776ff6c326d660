"""Weights that come with the package, as an enum in torchvision's style."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision.models._api import Weights, WeightsEnum
from torchvision.models.detection import SSDLite320_MobileNet_V3_Large_Weights

from earlyexit_ssd.errors import EarlyExitError, nearest
from earlyexit_ssd.files import sha256
from earlyexit_ssd.modeling.retrofit import read_weights
from earlyexit_ssd.plain import read_json

FOLDER = Path(__file__).resolve().parents[1] / "weights"
"""``NAME.pth``, a model file, and ``NAME.json``, what is known of it; tools/export_weights.py writes both."""


class ShippedWeights(WeightsEnum):
    """What the members of :data:`EarlyExitSSDLite_Weights` can do beside torchvision's ``transforms`` and ``meta``.

    ``meta`` holds ``categories`` (by label, background first), ``exits``, ``num_params``, ``min_size``, ``recipe``,
    ``sha256``, ``bytes``, ``_file_size`` (MiB, as torchvision counts), ``_metrics`` (test split -> exit or "routed"
    -> figure -> value) and ``_docs``.
    """

    @property
    def path(self) -> Path:
        """The model file."""
        return FOLDER / f"{self.name.lower()}.pth"

    def check(self) -> None:
        """Compare the file with its sha256.

        Raises:
            EarlyExitError: it is missing, damaged, or a pointer of Git LFS.
        """
        fix = "install the package again, or `git checkout` the file"
        if not self.path.is_file():
            raise EarlyExitError(f"{self.path}: the weights {self.name.lower()} are missing; {fix}")
        digest = sha256(self.path)
        if digest != self.meta["sha256"]:
            raise EarlyExitError(
                f"{self.path}: damaged ({self.path.stat().st_size} bytes with sha256 {digest[:8]}, expected "
                f"{self.meta['bytes']} with {self.meta['sha256'][:8]}); {fix}"
            )

    def get_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Of the whole model, exits included, in fp16; torchvision's arguments are about downloads and ignored."""
        self.check()
        return read_weights(self.path)["model"]


def describe(path: Path) -> Weights:
    """The value of a member from its JSON file.

    Raises:
        EarlyExitError: the file is not what tools/export_weights.py writes.
    """
    fix = "install the package again"
    entry = read_json(path, "description of weights", fix)
    try:
        classes = entry["classes"]
        meta = {
            "categories": ["__background__", *classes],
            "exits": entry["exits"],
            "num_params": entry["num_params"],
            "min_size": (1, 1),
            "recipe": entry["recipe"],
            "sha256": entry["sha256"],
            "bytes": entry["bytes"],
            "_file_size": round(entry["bytes"] / 2**20, 3),
            "_metrics": {name: split["exits"] for name, split in entry["metrics"].items()},
            "_docs": f"SSDLite320 MobileNetV3-Large with early exits for {', '.join(classes)}; weights in fp16.",
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise EarlyExitError(f"{path}: not a description of weights ({type(error).__name__}: {error}); {fix}") from None
    return Weights(path.with_suffix(".pth").as_uri(), SSDLite320_MobileNet_V3_Large_Weights.COCO_V1.transforms, meta)


EarlyExitSSDLite_Weights = ShippedWeights(
    "EarlyExitSSDLite_Weights",
    {path.stem.upper(): describe(path) for path in sorted(FOLDER.glob("*.json"))},
    module=__name__,
)
"""One member for each description in the package's folder of weights, such as ``CHAIR``."""


def find_weights(name: str | os.PathLike[str] | ShippedWeights) -> ShippedWeights | None:
    """The member of that name, in capitals or not, with the enum's name before it or not; None for anything else."""
    if isinstance(name, ShippedWeights):
        return name
    return EarlyExitSSDLite_Weights.__members__.get(
        str(name).removeprefix(f"{EarlyExitSSDLite_Weights.__name__}.").upper()
    )


def weights_path(name_or_path: str | os.PathLike[str] | ShippedWeights) -> Path:
    """The checked file of shipped weights, or the file that ``name_or_path`` is; a shipped name goes first.

    Raises:
        EarlyExitError: it is neither, or the shipped file is damaged.
    """
    member = find_weights(name_or_path)
    if member is not None:
        member.check()
        return member.path
    if not Path(name_or_path).is_file():
        names = [name.lower() for name in EarlyExitSSDLite_Weights.__members__]
        raise EarlyExitError(
            f"weights '{name_or_path}': no such file, and none of the shipped ones ({', '.join(names)})"
            f"{nearest(str(name_or_path), names)}"
        )
    return Path(name_or_path)
