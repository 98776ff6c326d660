"""The model: torchvision's SSDLite, tapped, with branches that share its default boxes."""

from earlyexit_ssd.modeling.architecture import Architecture
from earlyexit_ssd.modeling.builders import earlyexit_ssdlite320_mobilenet_v3_large
from earlyexit_ssd.modeling.checkpoint import load_model, save_model
from earlyexit_ssd.modeling.early_exit_ssd import EarlyExitSSDLite
from earlyexit_ssd.modeling.fused import fuse_for_inference
from earlyexit_ssd.modeling.losses import LossSettings
from earlyexit_ssd.modeling.outputs import ExitOutputs, Router
from earlyexit_ssd.modeling.paths import PathToExit
from earlyexit_ssd.modeling.retrofit import COCO_CLASSES, retrofit
from earlyexit_ssd.modeling.ssdlite import build_ssdlite
from earlyexit_ssd.modeling.weights import EarlyExitSSDLite_Weights

__all__ = [
    "COCO_CLASSES",
    "Architecture",
    "EarlyExitSSDLite",
    "EarlyExitSSDLite_Weights",
    "ExitOutputs",
    "LossSettings",
    "PathToExit",
    "Router",
    "build_ssdlite",
    "earlyexit_ssdlite320_mobilenet_v3_large",
    "fuse_for_inference",
    "load_model",
    "retrofit",
    "save_model",
]
