"""Calibration: temperatures and thresholds from photos, and guarantees about the loss of routing."""

from earlyexit_ssd.calibration.certificate import Certificate, load_certificate, parse_certificate
from earlyexit_ssd.drift import DriftMonitor
from earlyexit_ssd.modeling.pretrained import register_router
from earlyexit_ssd.routing import ExitRouter

register_router(ExitRouter, lambda content, path, model: parse_certificate(content, path).router_for(model))

__all__ = ["Certificate", "DriftMonitor", "load_certificate", "parse_certificate"]
