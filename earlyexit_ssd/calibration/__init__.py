"""Calibration: temperatures and thresholds from photos, and guarantees about the loss of routing."""

from earlyexit_ssd.calibration.certificate import Certificate, load_certificate, parse_certificate
from earlyexit_ssd.drift import DriftMonitor

__all__ = ["Certificate", "DriftMonitor", "load_certificate", "parse_certificate"]
