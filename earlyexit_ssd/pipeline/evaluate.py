"""Evaluate a trained model on a split: metrics, table and pictures."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode
from PIL import Image

from earlyexit_ssd.data import DetectionDataset, build_loader, load_dataset, to_coco
from earlyexit_ssd.evaluation.collect import Collected, collect
from earlyexit_ssd.evaluation.metrics import evaluate_exits
from earlyexit_ssd.evaluation.photo_losses import photo_list
from earlyexit_ssd.evaluation.rivals import exits_alone
from earlyexit_ssd.evaluation.routed import choose_exits
from earlyexit_ssd.files import locks_folder, sha256
from earlyexit_ssd.modeling import Architecture, EarlyExitSSDLite
from earlyexit_ssd.pipeline.build import (
    build_architecture,
    build_evaluation,
    build_router,
    evaluation_device,
    open_model,
    takes_over,
    with_classes,
)
from earlyexit_ssd.pipeline.certified import drift_of, open_certificate
from earlyexit_ssd.pipeline.rivals import build_rivals, check_rivals
from earlyexit_ssd.report.pictures import Example, choose_examples, detection_grid
from earlyexit_ssd.report.results import write_results

logger = logging.getLogger(__name__)


@locks_folder("out_dir")
def evaluate_model(cfg: CfgNode, weights: str | os.PathLike[str], out_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Evaluate on DATA.TEST and write metrics.json, table, photos.csv, charts and pictures into ``out_dir``.

    Args:
        cfg: its DATA, EVAL and ROUTING sections, DEVICE and SEED are used; the classes are those of the weights.
        weights: a model of this project, or a checkpoint that ``cfg`` describes, see `open_model`.
        out_dir: folder of results.

    Returns:
        what is in metrics.json.

    Raises:
        EarlyExitError: unusable weights, data or settings.
    """
    device = evaluation_device(cfg)
    check_rivals(cfg, device)
    model, architecture, info = open_model(cfg, weights)
    _warn_of_differences(cfg, architecture)
    cfg = with_classes(cfg, architecture.classes)
    dataset = load_dataset(cfg, cfg.DATA.TEST, unlabelled=True)
    ground_truth = to_coco(dataset)
    loader = build_loader(dataset, cfg.EVAL.BATCH_SIZE, cfg.DATA.WORKERS, train=False, seed=cfg.SEED)
    opened = open_certificate(cfg, model, dataset, info.get("certificate"), weights)
    stored = {"num_exits": model.num_early_exits, **(info.get("router") or {})}
    certificate, router = opened or (None, build_router(cfg, stored))
    router = router.to(device)
    if not dataset.labelled:
        logger.warning("nobody labelled %s: agreement with the full path is measured, no AP", " + ".join(cfg.DATA.TEST))
    rivals = build_rivals(cfg, model, architecture, device) if dataset.labelled else []  # AP judges them
    collected = collect(model.to(device), loader, router)
    if (
        cfg.EVAL.RIVALS.ENABLED and dataset.labelled and not router.hybrid
    ):  # a hybrid's exits have the full path's boxes
        rivals = [*exits_alone(model, collected), *rivals]
    metrics = evaluate_exits(
        model,
        loader,
        ground_truth,
        router,
        build_evaluation(cfg),
        splits=cfg.DATA.TEST,
        forced=info.get("forced", False),
        collected=collected,
        rivals=rivals,
        certificate=certificate,
        taken_over=info.get("taken_over", takes_over(cfg)),
        labelled=dataset.labelled,
    )
    metrics["context"]["weights_sha256"] = sha256(weights)
    taken = choose_exits(collected.confidences, router.thresholds.tolist())
    photos = photo_list(ground_truth, collected, taken, model.exit_names, dataset.paths, cfg.EVAL.SCORE, cfg.EVAL.IOU)
    chosen = taken.tolist()
    if certificate is not None:
        metrics["drift"] = drift_of(certificate, collected, chosen)
    pictures = {}
    if cfg.EVAL.PICTURES:
        pictures["detections"] = _detection_picture(cfg, model, dataset, collected, chosen)
    write_results(Path(out_dir), metrics, pictures, photos)
    return metrics


def _warn_of_differences(cfg: CfgNode, architecture: Architecture) -> None:
    """The weights know how they were built; a configuration that says otherwise is not followed, so it is named."""
    wanted = build_architecture(cfg, tuple(cfg.DATA.CLASSES) or architecture.classes).to_dict()
    for name, value in architecture.to_dict().items():
        if name not in ("reduced_tail", "head_outputs", "folded_rows", "folded_branches") and wanted[name] != value:
            logger.warning(
                "%s: the configuration says %r, the weights were made with %r and keep it", name, wanted[name], value
            )


def _detection_picture(
    cfg: CfgNode, model: EarlyExitSSDLite, dataset: DetectionDataset, collected: Collected, chosen: list[int]
) -> Image.Image:
    """Some photos with what every exit finds in them; ``chosen`` is the exit that each photo takes."""
    empty = [not record.has_targets for record in dataset.records]
    examples = []
    for index in choose_examples(chosen, empty, cfg.EVAL.PICTURES, cfg.SEED):
        image, target = dataset[index]
        found = [detections[target["image_id"]] for detections in collected.detections]
        examples.append(Example(image, target, found, chosen[index]))
    return detection_grid(examples, model.exit_names, model.classes, cfg.EVAL.PICTURE_SCORE)
