"""A trained model by its name or file, with the routing that was stored with it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling.outputs import Router
from earlyexit_ssd.modeling.validate import check_router

if TYPE_CHECKING:
    from earlyexit_ssd.modeling.early_exit_ssd import EarlyExitSSDLite
    from earlyexit_ssd.modeling.weights import ShippedWeights

_router_makers: list[Callable[..., Router]] = []


def register_router(make: Callable[..., Router], make_certified: Callable[..., Router]) -> None:
    """Say what makes a router of a model file: of its settings, or of certificate, path and model where it was
    calibrated. ``routing`` does, as modeling may not import it."""
    _router_makers[:] = [make, make_certified]


class Pretrained:
    """What a model class needs in order to be made from a file."""

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str] | ShippedWeights, *, router: bool = True
    ) -> EarlyExitSSDLite:
        """A trained model in eval mode on the CPU, in fp32.

        Args:
            name_or_path: weights that come with the package, as a member of ``EarlyExitSSDLite_Weights`` or its name
                in any case (``"chair"``), else the path of a model file of this project (``"output/my/model.pth"``).
            router: photos leave at the exit that the file's routing chooses; otherwise, and where the file has no
                routing, every photo takes the full path.

        Raises:
            EarlyExitError: neither a name nor a file, a damaged file, one that is no model of this project, or one
                whose certificate is for other weights.
        """
        # both import the class that inherits from this one
        from earlyexit_ssd.modeling.checkpoint import load_model
        from earlyexit_ssd.modeling.weights import weights_path

        path = weights_path(name_or_path)
        model, _, info = load_model(path)
        if router and info.get("router"):
            model.router = _make_router(path, info, model)
        return model


def _make_router(path: os.PathLike[str], info: dict, model: EarlyExitSSDLite) -> Router:
    make, make_certified = _router_makers
    try:
        certificate = info.get("certificate")
        router = make_certified(certificate, path, model) if certificate else make(**info["router"])
        check_router(router, model.num_early_exits)
        return router
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise EarlyExitError(f"{path}: its routing cannot be used ({error}); load it with router=False") from None
