"""Evaluation with a certificate: what it refuses, and whether the photos still look like its own."""

from __future__ import annotations

import logging
import os
from typing import Any

from fvcore.common.config import CfgNode
from torch import nn

from earlyexit_ssd.data import DetectionDataset
from earlyexit_ssd.data.fingerprint import photo_hashes
from earlyexit_ssd.errors import ConfigError
from earlyexit_ssd.evaluation.collect import Collected
from earlyexit_ssd.routing import DriftMonitor, ExitRouter
from earlyexit_ssd.routing.certificate import Certificate, load_certificate, parse_certificate
from earlyexit_ssd.routing.drift import WINDOW

logger = logging.getLogger(__name__)


def open_certificate(
    cfg: CfgNode, model: nn.Module, dataset: DetectionDataset, stored: Any = None, weights: str | os.PathLike[str] = ""
) -> tuple[Certificate, ExitRouter] | None:
    """The certificate of ROUTING.CERTIFICATE, else the one in the model's file, and its router; None without any.

    Args:
        stored: in the info of the file ``weights``.

    Raises:
        EarlyExitError: it is for other weights, it was calibrated on one of these photos, or it bounds a risk at
            another EVAL.SCORE or EVAL.IOU.
    """
    source = cfg.ROUTING.CERTIFICATE or weights
    if cfg.ROUTING.CERTIFICATE:
        certificate = load_certificate(source)
    elif stored:
        certificate = parse_certificate(stored, source)
        logger.info("%s was calibrated: its certificate routes, not the configuration's ROUTING section", source)
    else:
        return None
    router = certificate.router_for(model)
    certificate.require_unseen(photo_hashes(dataset))
    _check_operating_point(cfg, certificate, source)
    return certificate, router


def _check_operating_point(cfg: CfgNode, certificate: Certificate, source: str | os.PathLike[str]) -> None:
    """A risk is counted at a score and an IoU and holds there only."""
    score, iou = certificate.target["score"], certificate.target["iou"]
    if (score, iou) == (cfg.EVAL.SCORE, cfg.EVAL.IOU):
        return
    text = (
        f"{source}: the certificate speaks of score {score:g} and IoU {iou:g}, "
        f"EVAL has {cfg.EVAL.SCORE:g} and {cfg.EVAL.IOU:g}"
    )
    if certificate.target["kind"] == "risk":
        raise ConfigError(f"{text}; set EVAL.SCORE and EVAL.IOU to the certificate's, or calibrate again")
    logger.warning(text)


def drift_of(certificate: Certificate, collected: Collected, chosen: list[int]) -> dict[str, Any]:
    """Whether the photos look like those of calibration, all at once where they are few; warnings are logged too.

    Args:
        chosen: the exit of every photo, in the order of ``collected``.

    Returns:
        ``window`` (photos compared at a time), ``warnings`` (one line per cause, of all checks) and the last
        ``shares`` of the exits beside ``calibration_shares``.
    """
    monitor = DriftMonitor(certificate.drift_reference(), min(WINDOW, max(1, len(chosen))))
    confidences = [float(collected.confidences[exit_index][photo]) for photo, exit_index in enumerate(chosen)]
    warnings = monitor.update(chosen, confidences)
    shares = {key: value for key, value in monitor.status().items() if key.endswith("shares")}
    return {"window": monitor.window, "warnings": warnings, **shares}
