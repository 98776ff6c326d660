"""A trained model by its name or file, with the routing that was stored with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling.outputs import Router
from earlyexit_ssd.modeling.validate import check_router

if TYPE_CHECKING:
    from earlyexit_ssd.modeling.early_exit_ssd import EarlyExitSSDLite
    from earlyexit_ssd.modeling.weights import ShippedWeights

_router_makers: list[Callable[..., Router]] = []


def register_router(make: Callable[..., Router]) -> None:
    """Say what makes a router of the settings in a model file. ``routing`` does, as modeling may not import it."""
    _router_makers[:] = [make]


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
            EarlyExitError: neither a name nor a file, a damaged file, or one that is no model of this project.
        """
        # both import the class that inherits from this one
        from earlyexit_ssd.modeling.checkpoint import load_model
        from earlyexit_ssd.modeling.weights import weights_path

        path = weights_path(name_or_path)
        model, _, info = load_model(path)
        if router and info.get("router"):
            try:
                model.router = make_router(model, info["router"])
            except EarlyExitError as error:
                raise EarlyExitError(f"{path}: {error}; load it with router=False") from None
        return model


def make_router(model: EarlyExitSSDLite, settings: Mapping[str, Any]) -> Router:
    """The router of a file's settings, tried on a blank photo: what is fitted for another model fails there.

    Raises:
        EarlyExitError: the settings are those of no router, or of another model's.
    """
    training = model.training
    device = next(model.parameters()).device
    try:
        router = _router_makers[0](**settings).to(device)
        check_router(router, model.num_early_exits)
        model.eval()
        with torch.no_grad():
            outputs = model.exit_outputs([torch.zeros(3, *model.transform.fixed_size, device=device)])
            for index in range(model.num_early_exits + 1):
                router.confidence(outputs.signals(index), index)
    except Exception as error:  # policies may be anybody's, and their parameters anything
        raise EarlyExitError(f"its routing cannot be used ({error})") from None
    finally:
        model.train(training)
    return router
