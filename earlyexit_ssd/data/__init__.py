"""Data: photos with boxes from COCO, VOC or rendered scenes, checked, filtered, augmented and batched."""

from earlyexit_ssd.data.balance import repeat_rare_classes
from earlyexit_ssd.data.build import class_names, load_dataset
from earlyexit_ssd.data.builtin import register_builtin
from earlyexit_ssd.data.catalog import get, register, register_coco, register_voc
from earlyexit_ssd.data.classes import canonical
from earlyexit_ssd.data.dataset import DetectionDataset
from earlyexit_ssd.data.disjoint import require_disjoint
from earlyexit_ssd.data.ground_truth import to_coco
from earlyexit_ssd.data.loaders import build_loader
from earlyexit_ssd.data.records import Annotation, RawDataset, Record

register_builtin()

__all__ = [
    "Annotation",
    "DetectionDataset",
    "RawDataset",
    "Record",
    "build_loader",
    "canonical",
    "class_names",
    "get",
    "load_dataset",
    "register",
    "register_coco",
    "register_voc",
    "repeat_rare_classes",
    "require_disjoint",
    "to_coco",
]
