"""A data set as pycocotools' ground truth."""

from __future__ import annotations

import contextlib
import io

from pycocotools.coco import COCO

from earlyexit_ssd.data.dataset import DetectionDataset


def to_coco(dataset: DetectionDataset) -> COCO:
    """The data set's photos and objects; category ids are the labels 1..K.

    Objects to ignore have ``iscrowd`` 1, the only way to tell pycocotools. Annotations are numbered from 1,
    since pycocotools takes a match with number 0 for no match. Nothing is printed and no photo is read.
    """
    images = [
        {"id": r.image_id, "file_name": str(r.path), "width": r.width, "height": r.height} for r in dataset.records
    ]
    annotations = []
    for record in dataset.records:
        for annotation in record.annotations:
            x1, y1, x2, y2 = annotation.box
            width, height = x2 - x1, y2 - y1
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": record.image_id,
                    "category_id": annotation.label,
                    "bbox": [x1, y1, width, height],
                    "area": width * height if annotation.area is None else annotation.area,
                    "iscrowd": int(annotation.ignore),
                }
            )
    coco = COCO()
    coco.dataset = {
        "info": {},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": label, "name": name} for label, name in enumerate(dataset.classes, start=1)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
