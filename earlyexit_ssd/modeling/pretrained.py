"""Load a trained model with its routing by name or path, and save it."""

import importlib
import inspect
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from earlyexit_ssd.errors import EarlyExitError, shown, suggest_keywords
from earlyexit_ssd.modeling import checkpoint, validate
from earlyexit_ssd.modeling.branches import describe_exits, exit_keywords
from earlyexit_ssd.modeling.detector import COCO_CLASSES, POST_PROCESSING, EarlyExitDetector, default_classes
from earlyexit_ssd.modeling.outputs import Router, RouterSettings
from earlyexit_ssd.modeling.retrofit import Architecture
from earlyexit_ssd.modeling.trunk import evaluating

logger = logging.getLogger(__name__)
P = TypeVar("P", bound="Pretrained")


class Pretrained(EarlyExitDetector):
    """A detector with early exits that can be loaded and saved."""

    plain_settings: ClassVar[dict[str, float]] = {}
    """Fields of `Architecture` in which torchvision's detector differs from the defaults."""
    forced = False
    """True if the model's file says that its training continued after a failed gate; :meth:`save` keeps it."""

    @classmethod
    def open_file(
        cls: type[P], path: Path, classes: Sequence[str] | None, fields: dict[str, Any] | None = None
    ) -> tuple[P, checkpoint.ModelInfo]:
        """Load a file. Return the model in eval mode, without router, and the file's info.

        ``fields`` are those of the `Architecture` of a checkpoint, which does not describe itself. By default they are
        the exits of its branches. Errors are those of :meth:`from_pretrained`.
        """

        def architecture(outputs: int, exits: tuple[str, ...]) -> Architecture:
            settings = fields
            if settings is None:
                layers = tuple(int(name[4:]) for name in exits)
                branch = cls.default_exits[0].branch
                described = describe_exits(layers, branch) if exits else cls.default_exits
                settings = {**cls.plain_settings, "exits": described}
            return Architecture(class_names_of_head(outputs, classes), detector=cls.detector_name, **settings)

        model, _, info = checkpoint.load_model(path, architecture)
        if not isinstance(model, cls):
            name = type(model).__name__
            raise EarlyExitError(f"{path}: a {model.detector_name}, expected {cls.detector_name}; load it with {name}")
        if classes is not None and tuple(classes) != model.classes:
            raise EarlyExitError(f"{path}: its classes are {', '.join(model.classes)[:120]}; leave classes out")
        model.forced = info.get("forced", False)
        return model, info

    @classmethod
    def from_file(
        cls: type[P],
        weights: str | os.PathLike[str] | checkpoint.ShippedWeights,
        builder: Callable[..., P],
        arguments: dict[str, Any],
    ) -> P:
        """Load a file for ``builder``, such as :func:`earlyexit_ssd300_vgg16`. Return the model in train mode. Raise an
        EarlyExitError if the file does not fit the builder's ``arguments``, which describe a checkpoint."""
        path = checkpoint.weights_path(weights)
        defaults = {name: parameter.default for name, parameter in inspect.signature(builder).parameters.items()}
        exits = cls.default_exits if arguments["exits"] is None else tuple(arguments["exits"])
        settings = {name: arguments[name] for name in ("image_size", "width", *POST_PROCESSING)}
        described = {**settings, "score_thresh": defaults["score_thresh"], "exits": exits}
        model, _ = cls.open_file(path, arguments["classes"], described)
        if arguments["trainable_backbone_layers"] is not None:
            fix = "use model.freeze_full_path()"
            raise EarlyExitError(f"{path}: trainable_backbone_layers need torchvision's weights; {fix}")
        if arguments["num_classes"] not in (None, model.num_classes):
            outputs = f"{model.num_classes} outputs, num_classes is {arguments['num_classes']}"
            fix = "leave it out (a training with MODEL.WEIGHTS and MODEL.FOLD changes classes)"
            raise EarlyExitError(f"{path} has {outputs}; {fix}")
        changed = {name: value for name, value in settings.items() if value != defaults.get(name, value)}
        changed |= {} if arguments["exits"] is None else exit_keywords(exits)
        built = {"image_size": model.transform.fixed_size[0], "width": model.width, **exit_keywords(model.exits)}
        for name, value in changed.items():
            if name in POST_PROCESSING:
                setattr(model, name, value)
            elif value != built.get(name):
                values = f"{name} {built.get(name)}, the argument is {value!s:.60}"
                raise EarlyExitError(f"{path} was built with {values}; leave it out")
        if arguments["losses"] is not None:
            validate.check_losses(arguments["losses"], model.num_early_exits)
            model.losses = arguments["losses"]
        validate.check_router(arguments["router"], model.num_early_exits)
        model.router = arguments["router"]
        return model.train()

    @classmethod
    @suggest_keywords
    def from_pretrained(
        cls: type[P],
        name_or_path: str | os.PathLike[str] | checkpoint.ShippedWeights,
        *,
        router: bool = True,
        classes: Sequence[str] | None = None,
    ) -> P:
        """Load a trained model, in eval mode on the CPU, in fp32.

        Args:
            name_or_path: shipped weights, as a member of ``EarlyExitSSDLite_Weights`` or its name (``"chair"``); or the
                path of a model file (``"output/my/model.pth"``) or of a checkpoint of torchvision's detector. If that
                has no exits, the model's exits are untrained and not used.
            router: use the file's routing. If False, or if the file has none, every photo takes the full path.
            classes: names of the labels 1..K, for a checkpoint without names. Default: see `class_names_of_head`.

        Raises:
            EarlyExitError: neither a name nor a file, a damaged file, another detector, another number of classes, or
                a certificate for other weights.
        """
        path = checkpoint.weights_path(name_or_path)
        model, info = cls.open_file(path, classes)
        if router and not info.get("exits", True):
            logger.warning("%s: has no exits, so the model's exits are untrained; the full path is unchanged", path)
        if router and info.get("router"):
            try:
                if info.get("certificate"):
                    calibration = importlib.import_module("earlyexit_ssd.calibration")  # it imports modeling
                    model.router = calibration.parse_certificate(info["certificate"], path).router_for(model)
                else:
                    model.router = make_router(model, info["router"])
            except EarlyExitError as error:
                raise EarlyExitError(f"{path}: {error}; load it with router=False") from None
        return model

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights, architecture, classes, post-processing and routing to one file, for :meth:`from_pretrained`
        and the tools' ``--weights``. The router's certificate is included if router and weights are unchanged since
        calibration.

        Raises:
            EarlyExitError: the model was fused, its layers were replaced, or its router is not one of this project.
        """
        if self.router is not None and not hasattr(self.router, "to_dict"):
            fix = "set model.router = None before save, and assign it again after from_pretrained"
            raise EarlyExitError(f"{path}: its router, a {type(self.router).__name__}, cannot be saved; {fix}")
        info = {"router": None if self.router is None else self.router.to_dict(), "forced": self.forced}
        certificate = current_certificate(self.router)
        if certificate is not None and certificate.weights_sha256 == checkpoint.weights_hash(self):
            info["certificate"] = certificate.to_dict()
        checkpoint.save_model(path, self, info=info)


def current_certificate(router: Router | None) -> Any:
    """Return the router's certificate if the router is unchanged since its calibration, otherwise None."""
    certificate = getattr(router, "certificate", None)
    unchanged = certificate is not None and router.to_dict() == type(router)(**certificate.router).to_dict()
    return certificate if unchanged else None


def class_names_of_head(outputs: int, classes: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the names of the labels of a head with ``outputs`` outputs: ``classes``, or :func:`default_classes`. Raise
    an EarlyExitError if the number of ``classes`` does not fit."""
    if classes is None:
        classes = default_classes(outputs)
        if classes != COCO_CLASSES:
            logger.warning(
                "the file has no class names; they become class_1 to class_%d; to name them, pass classes=[...] to "
                "from_pretrained and save the model",
                outputs - 1,
            )
    if not isinstance(classes, list | tuple) or len(classes) != outputs - 1:
        head = f"its head has {outputs} outputs, so {outputs - 1} classes and background"
        raise EarlyExitError(f"{head}, but classes is {classes!r:.60}; list one name for each label, in order")
    repeated = [name for index, name in enumerate(classes) if name in classes[:index] and name != "N/A"]
    if repeated:
        raise EarlyExitError(f"classes has {shown(repeated[0])} twice; give each label its own name")
    return tuple(classes)


def make_router(model: EarlyExitDetector, settings: RouterSettings) -> Router:
    """Build a router and run it on a blank photo. Raise an EarlyExitError if its settings do not fit the model."""
    device = next(model.parameters()).device
    try:
        routing = importlib.import_module("earlyexit_ssd.routing")  # it imports modeling
        router = routing.ExitRouter(**settings).to(device)
        validate.check_router(router, model.num_early_exits)
        with evaluating(model):
            outputs = model.exit_outputs([torch.zeros(3, *model.transform.fixed_size, device=device)])
            for index in range(model.num_early_exits + 1):
                router.confidence(outputs.signals(index), index)
    except Exception as error:  # registered policies and their parameters may raise any exception
        raise EarlyExitError(f"its routing cannot be used ({error})") from None
    return router
