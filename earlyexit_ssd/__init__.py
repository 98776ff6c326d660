"""Early exits for torchvision's SSDLite MobileNetV3 detectors, gated and evaluated at every exit.

The names below are imported at their first use, so that `earlyexit_ssd.deploy` runs without PyTorch.
"""

import importlib.abc
import importlib.util
import os
import sys
from typing import TYPE_CHECKING

# By default albumentations connects to its server at import, to look for a newer version.
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

_CALIBRATION = ("Certificate", "DriftMonitor", "load_certificate")


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    part = "calibration" if name in _CALIBRATION else "routing" if name == "ExitRouter" else "modeling"
    return getattr(importlib.import_module(f"{__name__}.{part}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Register our builders for `torchvision.models.get_model`, whichever of the two packages is imported first.


class _Registration(importlib.abc.MetaPathFinder):
    """Register the builders after the first import of torchvision, because importing it here would take seconds."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (load(module), _register())
        return spec


def _register() -> None:
    modules = [module for name, module in sys.modules.items() if name.startswith(f"{__name__}.modeling")]
    # if a module of `modeling` is importing torchvision, importing `modeling` here would be circular; it goes on itself
    if not any(getattr(module.__spec__, "_initializing", False) for module in modules):
        importlib.import_module(f"{__name__}.modeling")


if sys.modules.get("torchvision"):
    _register()
else:
    sys.meta_path.insert(0, _Registration())
