"""Load a trained model with its routing by name or path, and save it."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling import validate
from earlyexit_ssd.modeling.branches import exit_keywords
from earlyexit_ssd.modeling.checkpoint import ModelInfo, ShippedWeights, load_model, save_model, weights_path
from earlyexit_ssd.modeling.detector import EarlyExitDetector
from earlyexit_ssd.modeling.outputs import Router, RouterSettings
from earlyexit_ssd.modeling.retrofit import COCO_CLASSES, Architecture
from earlyexit_ssd.modeling.trunk import evaluating

logger = logging.getLogger(__name__)
P = TypeVar("P", bound="Pretrained")

POST_PROCESSING = ("score_thresh", "nms_thresh", "detections_per_img", "topk_candidates")

_makers: list[Callable[..., Router]] = []


def register_router(make: Callable[..., Router], make_certified: Callable[..., Router]) -> None:
    """Register the functions that build a model file's router: ``make`` from its settings, ``make_certified`` from
    certificate, path and model. `earlyexit_ssd.calibration` calls this, since modeling must not import it."""
    _makers[:] = [make, make_certified]


def _router_makers() -> list[Callable[..., Router]]:
    if not _makers:
        importlib.import_module("earlyexit_ssd.calibration")  # registers them
    return _makers


class Pretrained(EarlyExitDetector):
    """A detector with early exits that can be loaded and saved."""

    @classmethod
    def open_file(
        cls: type[P], path: Path, classes: Sequence[str] | None, describe: dict[str, Any] | None = None
    ) -> tuple[P, ModelInfo]:
        """A file's model without router, in eval mode, and the file's info; errors as :meth:`from_pretrained`.

        ``describe``: fields of `Architecture` for a checkpoint, which has no description of its own. Default: exits
        after the layers of its branches.
        """

        def architecture(outputs: int, exits: tuple[str, ...]) -> Architecture:
            layers = {"exit_layers": tuple(int(name[4:]) for name in exits)} if exits else {}
            fields = layers if describe is None else describe
            return Architecture(names_of(outputs, classes), detector=cls.detector_name, **fields)

        model, _, info = load_model(path, architecture)
        if not isinstance(model, cls):
            raise EarlyExitError(f"{path}: a {model.detector_name}, expected {cls.detector_name}; take its own class")
        if classes is not None and tuple(classes) != model.classes:
            raise EarlyExitError(f"{path}: its classes are {', '.join(model.classes)[:120]}; leave classes out")
        return model, info

    @classmethod
    def from_file(
        cls: type[P],
        weights: str | os.PathLike[str] | ShippedWeights,
        builder: Callable[..., P],
        given: dict[str, Any],
    ) -> P:
        """The model in a file, in train mode. The arguments ``given`` to its ``builder`` describe a checkpoint, which
        has no description of its own. An EarlyExitError for a file that does not fit them."""
        path = weights_path(weights)
        defaults = {name: one.default for name, one in inspect.signature(builder).parameters.items()}
        exits = cls.default_exits if given["exits"] is None else tuple(given["exits"])
        settings = {name: given[name] for name in ("image_size", "width", *POST_PROCESSING)}
        described = {**settings, "score_thresh": defaults["score_thresh"], "exits": exits}
        model, _ = cls.open_file(path, given["classes"], described)
        if given["trainable_backbone_layers"] is not None:
            raise EarlyExitError(
                f"{path}: trainable_backbone_layers need torchvision's weights; use model.freeze_full_path()"
            )
        if given["num_classes"] not in (None, model.num_classes):
            raise EarlyExitError(
                f"{path} has {model.num_classes} outputs, num_classes is {given['num_classes']}; leave it out (a "
                "training with MODEL.WEIGHTS and MODEL.FOLD changes classes)"
            )
        asked = {name: value for name, value in settings.items() if value != defaults.get(name, value)}
        asked |= {} if given["exits"] is None else exit_keywords(exits)
        built = {"image_size": model.transform.fixed_size[0], "width": model.width, **exit_keywords(model.exits)}
        for name, value in asked.items():
            if name in POST_PROCESSING:
                setattr(model, name, value)
            elif value != built.get(name):
                raise EarlyExitError(
                    f"{path} was built with {name} {built.get(name)}, given is {value!s:.60}; leave it out"
                )
        if given["losses"] is not None:
            validate.check_losses(given["losses"], model.num_early_exits)
            model.losses = given["losses"]
        validate.check_router(given["router"], model.num_early_exits)
        model.router = given["router"]
        return model.train()

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
            name_or_path: shipped weights, as a member of ``EarlyExitSSDLite_Weights`` or its name in any case
                (``"chair"``); or the path of a model file of this project (``"output/my/model.pth"``) or of a
                checkpoint of torchvision's SSDLite, with or without exits. Exits that the file lacks are untrained and
                not used.
            router: use the file's routing. If False, or if the file has none, every photo runs the full path.
            classes: names of the labels 1..K, for a checkpoint without names. Default: COCO's for a head of COCO's 91
                outputs, else ``class_1`` and so on.

        Raises:
            EarlyExitError: neither a name nor a file, a damaged file, another detector, another number of classes, or
                a certificate for other weights.
        """
        path = weights_path(name_or_path)
        model, info = cls.open_file(path, classes)
        if router and not info.get("exits", True):  # without routing no exit is used
            logger.warning("%s: has no exits; those of the model are untrained, the full path is unchanged", path)
        if router and info.get("router"):
            try:
                if info.get("certificate"):
                    model.router = _router_makers()[1](info["certificate"], path, model)
                else:
                    model.router = make_router(model, info["router"])
            except EarlyExitError as error:
                raise EarlyExitError(f"{path}: {error}; load it with router=False") from None
        return model

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights, architecture, classes, post-processing and routing to one file, for :meth:`from_pretrained`
        and the tools' ``--weights``. The router's certificate is included if the router is unchanged since calibration.

        Raises:
            EarlyExitError: the model was fused, its layers were replaced, or its router is not one of this project.
        """
        if self.router is not None and not hasattr(self.router, "to_dict"):
            raise EarlyExitError(
                f"{path}: a {type(self.router).__name__} cannot be written; save with router = None, and give it back "
                "after from_pretrained"
            )
        info = {"router": None if self.router is None else self.router.to_dict()}
        if certificate := current_certificate(self.router):
            info["certificate"] = certificate.to_dict()
        save_model(path, self, info=info)


def current_certificate(router: Router | None) -> Any:
    """The certificate of a router that is unchanged since its calibration, otherwise None."""
    certificate = getattr(router, "certificate", None)
    calibrated = certificate is not None and router.to_dict() == type(router)(**certificate.router).to_dict()
    return certificate if calibrated else None


def names_of(outputs: int, classes: Sequence[str] | None = None) -> tuple[str, ...]:
    """Names of a head's labels: ``classes``, which must fit, else COCO's for 91 outputs, else ``class_1`` and so on."""
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
    """Build a router from a file's settings and run it on a blank photo; an EarlyExitError if they do not fit."""
    device = next(model.parameters()).device
    try:
        router = _router_makers()[0](**settings).to(device)
        validate.check_router(router, model.num_early_exits)
        with evaluating(model):
            outputs = model.exit_outputs([torch.zeros(3, *model.transform.fixed_size, device=device)])
            for index in range(model.num_early_exits + 1):
                router.confidence(outputs.signals(index), index)
    except Exception as error:  # registered policies and their parameters may raise any exception
        raise EarlyExitError(f"its routing cannot be used ({error})") from None
    return router
