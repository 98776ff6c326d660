"""The models: torchvision's SSD detectors with early exits, whose branches share the default boxes."""

from earlyexit_ssd.modeling.branches import Exit, describe_exits
from earlyexit_ssd.modeling.checkpoint import EarlyExitSSDLite_Weights, load_model, save_model
from earlyexit_ssd.modeling.detector import COCO_CLASSES, EarlyExitDetector, PathToExit, fuse_for_inference
from earlyexit_ssd.modeling.losses import LossSettings
from earlyexit_ssd.modeling.outputs import ExitOutputs, Router
from earlyexit_ssd.modeling.retrofit import Architecture, retrofit
from earlyexit_ssd.modeling.ssd300 import EarlyExitSSD300, earlyexit_ssd300_vgg16
from earlyexit_ssd.modeling.ssdlite import EarlyExitSSDLite, earlyexit_ssdlite320_mobilenet_v3_large
from earlyexit_ssd.modeling.trunk import build_ssdlite

__all__ = [
    "COCO_CLASSES",
    "Architecture",
    "EarlyExitDetector",
    "EarlyExitSSD300",
    "EarlyExitSSDLite",
    "EarlyExitSSDLite_Weights",
    "Exit",
    "ExitOutputs",
    "LossSettings",
    "PathToExit",
    "Router",
    "build_ssdlite",
    "describe_exits",
    "earlyexit_ssd300_vgg16",
    "earlyexit_ssdlite320_mobilenet_v3_large",
    "fuse_for_inference",
    "load_model",
    "retrofit",
    "save_model",
]
