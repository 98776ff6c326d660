"""Early exits for torchvision's SSDLite MobileNetV3 detectors, gated and evaluated at every exit."""

import os

# albumentations asks its server for a newer version at import; a library should not.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

from earlyexit_ssd.calibration import Certificate, DriftMonitor, load_certificate
from earlyexit_ssd.modeling import (
    EarlyExitSSDLite,
    EarlyExitSSDLite_Weights,
    earlyexit_ssdlite320_mobilenet_v3_large,
    fuse_for_inference,
)
from earlyexit_ssd.routing import ExitRouter

__version__ = "0.1.0"
__all__ = [
    "Certificate",
    "DriftMonitor",
    "EarlyExitSSDLite",
    "EarlyExitSSDLite_Weights",
    "ExitRouter",
    "__version__",
    "earlyexit_ssdlite320_mobilenet_v3_large",
    "fuse_for_inference",
    "load_certificate",
]
