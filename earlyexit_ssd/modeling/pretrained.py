"""A trained model by its name or file, with the routing that was stored with it."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling.checkpoint import ShippedWeights, load_model, save_model, weights_path
from earlyexit_ssd.modeling.detector import EarlyExitDetector
from earlyexit_ssd.modeling.outputs import Router, RouterSettings
from earlyexit_ssd.modeling.retrofit import COCO_CLASSES, Architecture
from earlyexit_ssd.modeling.validate import check_router

logger = logging.getLogger(__name__)
P = TypeVar("P", bound="Pretrained")

_made: list[Callable[..., Router]] = []


def register_router(make: Callable[..., Router], make_certified: Callable[..., Router]) -> None:
    """Say what makes a router of a model file: of its settings, or of certificate, path and model where it was
    calibrated. ``calibration`` does, as modeling may not import it."""
    _made[:] = [make, make_certified]


def _router_makers() -> list[Callable[..., Router]]:
    if not _made:
        importlib.import_module("earlyexit_ssd.calibration")  # registers them
    return _made


class Pretrained(EarlyExitDetector):
    """A detector with early exits that is made from a file and written to one."""

    @classmethod
    def from_pretrained(
        cls: type[P],
        name_or_path: str | os.PathLike[str] | ShippedWeights,
        *,
        router: bool = True,
        classes: Sequence[str] | None = None,
    ) -> P:
        """A trained model in eval mode on the CPU, in fp32.

        Args:
            name_or_path: weights that come with the package, as a member of ``EarlyExitSSDLite_Weights`` or its name
                in any case (``"chair"``), else the path of a model file of this project (``"output/my/model.pth"``), or
                of a checkpoint of torchvision's SSDLite, with exits or without. Exits that a file has not start
                untrained, and every photo takes the full path.
            router: photos leave at the exit that the file's routing chooses; otherwise, and where the file has no
                routing, every photo takes the full path.
            classes: names of the labels 1..K, for a checkpoint, which has none. By default COCO's where the head has
                COCO's 91 outputs, else ``class_1`` and so on.

        Raises:
            EarlyExitError: neither a name nor a file, a damaged file, one with another detector, with another number
                of classes, or one whose certificate is for other weights.
        """

        def describe(outputs: int, exits: tuple[str, ...]) -> Architecture:
            layers = {"exit_layers": tuple(int(name[4:]) for name in exits)} if exits else {}
            return Architecture(names_of(outputs, classes), detector=cls.detector_name, **layers)

        path = weights_path(name_or_path)
        model, architecture, info = load_model(path, describe)
        if not isinstance(model, cls):
            raise EarlyExitError(f"{path}: a {architecture.detector}, expected {cls.detector_name}; take its own class")
        if classes is not None and tuple(classes) != model.classes:
            raise EarlyExitError(f"{path}: its classes are {', '.join(model.classes)[:120]}; leave classes out")
        if not info.get("exits", True):
            logger.warning("%s: has no exits; those of the model are untrained, the full path is as it was", path)
        if router and info.get("router"):
            try:
                certificate = info.get("certificate")
                if certificate:
                    model.router = _router_makers()[1](certificate, path, model)
                else:
                    model.router = make_router(model, info["router"])
            except EarlyExitError as error:
                raise EarlyExitError(f"{path}: {error}; load it with router=False") from None
        return model

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one file of everything: weights, architecture, classes, post-processing, and the routing with its
        temperatures. :meth:`from_pretrained` and the tools' ``--weights`` read it. The certificate of a router goes
        along while the router is as it was calibrated.

        Raises:
            EarlyExitError: the model was fused for inference, its layers were replaced by others, or its router is
                none of this project's.
        """
        if self.router is not None and not hasattr(self.router, "to_dict"):
            raise EarlyExitError(
                f"{path}: a {type(self.router).__name__} cannot be written; save with router = None, and give it back "
                "after from_pretrained"
            )
        settings = None if self.router is None else self.router.to_dict()
        certificate = current_certificate(self.router)
        save_model(
            path, self, info={"router": settings, **({"certificate": certificate.to_dict()} if certificate else {})}
        )


def current_certificate(router: Router | None) -> Any:
    """The certificate of a router that is still as it was calibrated, or None."""
    certificate = getattr(router, "certificate", None)
    calibrated = certificate is not None and router.to_dict() == type(router)(**certificate.router).to_dict()
    return certificate if calibrated else None


def names_of(outputs: int, classes: Sequence[str] | None = None) -> tuple[str, ...]:
    """Names of the labels of a head with so many outputs: those given, else COCO's or numbers.

    Raises:
        EarlyExitError: another number of names.
    """
    if classes is None:
        if outputs == len(COCO_CLASSES) + 1:
            return COCO_CLASSES
        logger.warning("the file names no classes: they are class_1 to class_%d; give classes=[...]", outputs - 1)
        return tuple(f"class_{label}" for label in range(1, outputs))
    if isinstance(classes, str) or len(classes) != outputs - 1:
        raise EarlyExitError(
            f"its head has {outputs} outputs, so {outputs - 1} classes beside background, classes are {classes!r:.60}; "
            "name each one in the order of the labels"
        )
    return tuple(classes)


def make_router(model: EarlyExitDetector, settings: RouterSettings) -> Router:
    """The router of a file's settings, tried on a blank photo: what is fitted for another model fails there.

    Raises:
        EarlyExitError: the settings are those of no router, or of another model's.
    """
    training = model.training
    device = next(model.parameters()).device
    try:
        router = _router_makers()[0](**settings).to(device)
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
