"""Data sets in COCO, VOC and YOLO format, folders of photos and rendered scenes: reading, checks and augmentation."""

from earlyexit_ssd.data.catalog import get, register, register_builtin, register_coco, register_voc
from earlyexit_ssd.data.dataset import (
    DetectionDataset,
    build_loader,
    class_names,
    load_dataset,
    repeat_rare_classes,
    require_disjoint,
    to_coco,
)
from earlyexit_ssd.data.records import Annotation, RawDataset, Record, canonical, register_format

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
    "register_format",
    "register_voc",
    "repeat_rare_classes",
    "require_disjoint",
    "to_coco",
]
