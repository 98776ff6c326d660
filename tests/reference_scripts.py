"""Training and evaluation of a model as in torchvision's reference detection scripts, written anew."""

import contextlib
import io
from collections.abc import Iterator, Mapping

import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


def loader_of(dataset: Dataset, batch_size: int = 4) -> DataLoader:
    """Return a loader whose batches are tuples of images and targets."""
    return DataLoader(dataset, batch_size, collate_fn=lambda samples: tuple(zip(*samples, strict=True)))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(trainable(model), lr=0.01, momentum=0.9, weight_decay=1e-4)


def train_epoch(
    model: nn.Module,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    scaler: torch.amp.GradScaler | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Train one epoch, with warm-up in epoch 0. Yield the losses of each step."""
    model.train()
    steps = len(loader) - 1
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.001, total_iters=steps) if epoch == 0 else None
    for images, targets in loader:
        images = [image.to("cpu") for image in images]
        targets = [
            {key: value.to("cpu") if isinstance(value, Tensor) else value for key, value in target.items()}
            for target in targets
        ]
        with torch.autocast("cpu", torch.bfloat16, enabled=scaler is not None):
            losses = model(images, targets)
            total = sum(losses.values())
        optimizer.zero_grad()
        if scaler is None:
            total.backward()
            optimizer.step()
        else:
            scaler.scale(total).backward()
            scaler.step(optimizer)
            scaler.update()
        if warm_up is not None:
            warm_up.step()
        yield losses


@torch.inference_mode()
def detect(model: nn.Module, loader: DataLoader) -> dict[int, dict[str, Tensor]]:
    """Return the model's output for each image id, on the CPU."""
    model.eval()
    results = {}
    for images, targets in loader:
        outputs = [{key: value.to("cpu") for key, value in output.items()} for output in model(list(images))]
        results.update({target["image_id"]: output for target, output in zip(targets, outputs, strict=True)})
    return results


def ground_truth_of(dataset: Dataset) -> COCO:
    """Return the ground truth of a data set, built from its targets."""
    images, annotations = [], []
    for index in range(len(dataset)):
        image, target = dataset[index]
        images.append({"id": target["image_id"], "height": image.shape[-2], "width": image.shape[-1]})
        boxes = target["boxes"]
        boxes[:, 2:] -= boxes[:, :2]  # in place, as some versions of the scripts do
        columns = (boxes.tolist(), *(target[key].tolist() for key in ("labels", "area", "iscrowd")))
        for box, label, area, crowd in zip(*columns, strict=True):
            entry = {"id": len(annotations) + 1, "image_id": target["image_id"], "bbox": box}
            annotations.append({**entry, "category_id": label, "area": area, "iscrowd": crowd})
    labels = sorted({annotation["category_id"] for annotation in annotations})
    coco = COCO()
    coco.dataset = {"images": images, "annotations": annotations, "categories": [{"id": label} for label in labels]}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def average_precisions(ground_truth: COCO, results: Mapping[int, Mapping[str, Tensor]]) -> list[float]:
    """Return AP, AP50, AP75, and AP of small, medium and large objects (pycocotools) for the images in ``results``."""
    entries = []
    for image_id, detections in results.items():
        x1, y1, x2, y2 = detections["boxes"].unbind(1)
        boxes = torch.stack([x1, y1, x2 - x1, y2 - y1], dim=1).tolist()
        columns = zip(boxes, detections["labels"].tolist(), detections["scores"].tolist(), strict=True)
        entries += [{"image_id": image_id, "category_id": c, "bbox": box, "score": s} for box, c, s in columns]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(ground_truth, ground_truth.loadRes(entries), "bbox")
        evaluation.params.imgIds = sorted(results)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[:6].tolist()
