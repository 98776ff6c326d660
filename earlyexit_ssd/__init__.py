"""Early exits for torchvision's SSDLite MobileNetV3 detectors, gated and evaluated at every exit.

The names below are imported when they are first asked for, so that `earlyexit_ssd.deploy` needs no PyTorch.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING

# albumentations asks its server for a newer version at import; a library should not.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

if TYPE_CHECKING:
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

_PARTS = {
    "calibration": ("Certificate", "DriftMonitor", "load_certificate"),
    "modeling": (
        "EarlyExitSSDLite",
        "EarlyExitSSDLite_Weights",
        "earlyexit_ssdlite320_mobilenet_v3_large",
        "fuse_for_inference",
    ),
    "routing": ("ExitRouter",),
}


def __getattr__(name: str) -> object:
    part = next((part for part, names in _PARTS.items() if name in names), None)
    if part is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{part}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
