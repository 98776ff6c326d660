"""The jobs of the doctor: check the data of a configuration, a trained model, and a model during its training."""

import logging
import os
import re
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.ops import box_iou

from earlyexit_ssd.console import progress
from earlyexit_ssd.data import DetectionDataset, class_names, load_dataset, to_coco
from earlyexit_ssd.data.checks import check_photos, clip_boxes
from earlyexit_ssd.data.dataset import read_dataset
from earlyexit_ssd.data.duplicates import PerceptualHashes
from earlyexit_ssd.data.problems import Problems
from earlyexit_ssd.data.records import Record, limit_negatives, limit_photos, select_classes, union_of_classes
from earlyexit_ssd.doctor.data import DATA_CHECKS, DataEvidence, Split, Summary, summarise
from earlyexit_ssd.doctor.findings import Diagnosis, DoctorFinding, diagnose
from earlyexit_ssd.doctor.model import ENOUGH_PHOTOS, MODEL_CHECKS, SHOWN_SCORE, ExitOutput, ModelEvidence
from earlyexit_ssd.engine import Hook, Trainer, read_log
from earlyexit_ssd.engine.processes import is_main
from earlyexit_ssd.errors import DataError, EarlyExitError
from earlyexit_ssd.evaluation.matches import ap_of_choice, bootstrap_choices, exit_matches, interval
from earlyexit_ssd.evaluation.outputs import ImageDetections, Targets, choose_exits, exit_share, on_cpu, over_batches
from earlyexit_ssd.evaluation.results import JsonDataclass
from earlyexit_ssd.files import make_folder, sha256, write_json
from earlyexit_ssd.modeling import EarlyExitSSDLite
from earlyexit_ssd.modeling.checkpoint import weights_path
from earlyexit_ssd.modeling.detector import default_boxes_of_image
from earlyexit_ssd.modeling.outputs import ExitOutputs
from earlyexit_ssd.modeling.trunk import evaluating
from earlyexit_ssd.pipeline import build
from earlyexit_ssd.routing import ExitRouter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report(JsonDataclass):
    """The result of a job of the doctor."""

    splits: tuple[Summary, ...]  # figures of the splits; empty for a model
    diagnosis: Diagnosis

    def __str__(self) -> str:
        return "\n".join([*map(str, self.splits), *[""] * bool(self.splits), str(self.diagnosis)])

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write doctor.json into ``folder``."""
        make_folder(folder)
        write_json(Path(folder) / "doctor.json", self.to_json())


def doctor_data(cfg: CfgNode) -> Report:
    """Check the photos and boxes of DATA.TRAIN, CALIB and TEST. A split that cannot be read is the bad finding
    ``unreadable``. Raise EarlyExitError if the settings are unusable or no split can be read."""
    splits, unreadable = [], []
    for name in ("TRAIN", "CALIB", "TEST"):
        try:
            splits += [_split(cfg, name)] if cfg.DATA[name] else []
        except DataError as error:
            meaning, advice = f"the split cannot be read: {error}", "fix it and run this again"
            unreadable.append(DoctorFinding("unreadable", name, True, 1.0, None, 0.0, meaning, advice))
    if not splits:
        raise DataError(unreadable[0].meaning if unreadable else "DATA.TRAIN, CALIB and TEST are empty; name data sets")
    architecture = replace(build.build_architecture(cfg, splits[0].classes or ("object",)), exits=())
    boxes = default_boxes_of_image(architecture.build(), torch.device("cpu"))
    evidence = DataEvidence(splits, boxes, cfg.MODEL.IMAGE_SIZE)
    diagnosis = diagnose(DATA_CHECKS, evidence)
    summaries = tuple(summarise(evidence, split) for split in splits)
    return Report(summaries, replace(diagnosis, findings=(*unreadable, *diagnosis.findings)))


def _split(cfg: CfgNode, name: str) -> Split:
    """Read the photos of the split ``name`` that a training would use, and log how many are unusable."""
    datasets = [read_dataset(cfg, dataset) for dataset in cfg.DATA[name]]
    classes = tuple(cfg.DATA.CLASSES) or (union_of_classes(datasets) if name == "TRAIN" else class_names(cfg))
    problems, records = Problems(cfg.DATA.ON_BAD), select_classes(datasets, classes)
    labelled = all(dataset.labelled for dataset in datasets)
    if name == "TRAIN" and labelled:
        records = limit_negatives(records, cfg.DATA.NEGATIVE_SHARE, cfg.SEED)
    records = check_photos(limit_photos(records, cfg.DATA.LIMIT, cfg.SEED), problems)
    clip_boxes(records, problems)  # to report boxes outside their photos; the checks judge boxes as they are
    problems.log(name)
    paths = [record.path for record in records]
    hashes = [sha256(path) for path in progress(paths, f"read {name}")]
    return Split(name, classes, records, labelled, hashes, PerceptualHashes.read(paths))


def doctor_model(cfg: CfgNode, weights: str | os.PathLike[str], photos: int) -> Report:
    """Check a model on ``photos`` of DATA.CALIB, chosen with SEED. Half of them have objects if there are enough.

    Args:
        weights: a model of this project, or a checkpoint with or without exits that ``cfg`` describes. If it is in the
            folder of a run, logs and figures of the run are checked too.

    Raises:
        EarlyExitError: unusable weights, data or settings.
    """
    if photos < 1:
        raise EarlyExitError(f"--photos {photos}: expected at least 1")
    path = weights_path(weights)
    model, architecture, info = build.open_model(cfg, path, need_exits=False)
    cfg, device = build.with_classes(cfg, architecture.classes), build.evaluation_device(cfg)
    dataset = load_dataset(cfg, cfg.DATA.CALIB)
    dataset = dataset.subset(chosen_photos(dataset.records, photos, cfg.SEED))
    router = build.open_router(cfg, model, info, path).to(device)  # it may have been calibrated on these photos
    evidence = collect_evidence(model.to(device), dataset, router, cfg)
    if info.get("taken_over", build.takes_over(cfg)):  # only the exits were trained on the user's photos
        evidence = replace(evidence, above_full={})
    return Report((), diagnose(MODEL_CHECKS, replace(evidence, **run_evidence(path, evidence, router))))


def chosen_photos(records: Sequence[Record], photos: int, seed: int) -> list[Record]:
    """Choose random photos: half with objects and half without, or more of one kind if there are few of the other."""
    with_objects, without = ([record for record in records if record.has_targets is shows] for shows in (True, False))
    count = min(len(with_objects), max(photos // 2, photos - len(without)))
    counts = (with_objects, count), (without, photos - count)
    return [record for part, size in counts for record in limit_photos(part, size, seed)[:size]]


def collect_evidence(
    model: EarlyExitSSDLite, dataset: DetectionDataset, router: ExitRouter, cfg: CfgNode
) -> ModelEvidence:
    """Run all exits on the photos once, and return the input of the checks."""
    detections: list[dict[int, ImageDetections]] = [{} for _ in model.exit_names]
    confidences: list[list[Tensor]] = [[] for _ in range(model.num_early_exits)]

    def of_batch(images: list[Tensor], targets: Targets) -> ModelEvidence:
        outputs, evidence = batch_evidence(model, images, targets)
        ids = [int(target["image_id"]) for target in targets]
        for index, by_id in enumerate(detections):
            by_id.update(zip(ids, map(on_cpu, model.detections(outputs, index)), strict=True))
        for index, values in enumerate(confidences):
            values.append(router.confidence(outputs.signals(index), index).cpu())
        return evidence

    batches = over_batches(model, build.evaluation_loader(cfg, dataset), of_batch, "check photos")
    shares = {}
    if not router.closed:
        values = [*map(torch.cat, confidences), torch.ones(len(dataset))]
        shares = exit_share(choose_exits(values, router.thresholds.tolist()), model.exit_names)
    matches = exit_matches(to_coco(dataset), detections)
    choices = [np.full(matches.photos, index) for index in range(len(detections))]
    *early, full = bootstrap_choices(matches, choices, seed=cfg.SEED)
    enough = sum(record.has_targets for record in dataset.records) >= ENOUGH_PHOTOS  # else the interval is too narrow
    ap50, above_full = {}, {}
    for index, name in enumerate(model.exit_names):
        if index < len(early) and model.empty[index]:
            continue
        ap50[name] = ap_of_choice(matches, choices[index], ap50_only=True).AP50
        difference = interval(early[index].AP50 - full.AP50) if enough and index < len(early) else None
        above_full |= {name: difference[0]} if difference else {}
    temperatures = zip(model.exit_names, router.temperatures.tolist(), strict=False)
    return ModelEvidence(
        exits=[ExitOutput.joined(parts) for parts in zip(*(batch.exits for batch in batches), strict=True)],
        default_boxes=batches[0].default_boxes,
        objects=[boxes for batch in batches for boxes in batch.objects],
        shares=shares,
        temperatures={name: [value] for name, value in temperatures},
        ap50=ap50,
        above_full=above_full,
        named_right=named_right(dataset, detections[-1]),
    )


def named_right(dataset: DetectionDataset, detections: Mapping[int, ImageDetections]) -> dict[str, float]:
    """Return for each class with `ENOUGH_PHOTOS` found objects the share that gets its name, see
    `doctor.model.classes_exchanged`. Without a second class the result is empty."""
    right = defaultdict(list)
    for record in dataset.records if len(dataset.classes) > 1 else ():
        objects = [annotation for annotation in record.annotations if not annotation.ignore]
        boxes = torch.tensor([annotation.box for annotation in objects]).reshape(-1, 4)
        boxes_found, scores, labels = (detections[record.image_id][key] for key in ("boxes", "scores", "labels"))
        score_near = (box_iou(boxes, boxes_found) >= 0.5) * scores
        for annotation, of_object in zip(objects, score_near, strict=True):
            if (of_object >= SHOWN_SCORE).any():
                right[annotation.label].append(int(labels[of_object.argmax()]) == annotation.label)
    return {
        dataset.classes[label - 1]: sum(hits) / len(hits) for label, hits in right.items() if len(hits) >= ENOUGH_PHOTOS
    }


def batch_evidence(
    model: EarlyExitSSDLite, images: list[Tensor], targets: Targets
) -> tuple[ExitOutputs, ModelEvidence]:
    """Return the outputs of all exits for a batch, and from them the input of the checks, on the CPU."""
    outputs = model.exit_outputs(images)
    exits = [
        ExitOutput.of(name, head["cls_logits"].cpu(), head["bbox_regression"].cpu())
        for name, head, empty in zip(model.exit_names, outputs.heads, (*model.empty, False), strict=True)
        if not empty
    ]
    sizes = zip(targets, outputs.network_sizes, outputs.photo_sizes, strict=True)
    objects = [
        target["boxes"][target["iscrowd"] == 0].cpu() * torch.tensor([width / photo[1], height / photo[0]] * 2)
        for target, (height, width), photo in sizes
    ]
    return outputs, ModelEvidence(exits, outputs.anchors[0].cpu(), objects)


_AP = re.compile(r'\bm?AP(50|75)?(/[^"]*)?"(,\s*"value")?:\s*\d', re.IGNORECASE)
"""In JSON, a number with the key ``AP``, ``mAP``, ``AP50`` or ``AP50/exit8``, or a gate's figure of this name."""


def run_evidence(weights: Path, evidence: ModelEvidence, router: ExitRouter) -> dict[str, Any]:
    """Return the fields of `ModelEvidence` from the files of the run whose folder holds the weights."""
    roots = [folder for folder in weights.resolve().parents[:2] if (folder / "config.yaml").is_file()]
    names = ("metrics.json", "gate.json", "log.jsonl")
    # without config.yaml, the sub-folders are no phases of a run
    depths = ("", "*/") if roots else ("",)
    folder = roots[-1] if roots else weights.resolve().parent
    files = [path for name in names for depth in depths for path in sorted(folder.glob(depth + name))]
    if not files:
        return {}
    curves: dict[str, dict[str, list[float]]] = {"temperature": {}, "confidence": {}}
    for path in files:
        for line in read_log(path.parent) if path.name == "log.jsonl" else ():
            for key, value in line.items():
                curve, _, exit_name = key.partition("/")
                if curve in curves and value is not None:
                    curves[curve].setdefault(exit_name, []).append(value)
    return {
        "computed_aps": sum(len(_AP.findall(path.read_text(encoding="utf-8", errors="replace"))) for path in files),
        "temperatures": {**evidence.temperatures, **curves["temperature"]},
        # this policy's confidence falls as a detector learns
        "confidences": {} if router.policy == "mean_foreground" else curves["confidence"],
    }


WATCHED_PHOTOS = 12  # number of photos that are checked, always the same
MIN_PROGRESS = 0.1  # share of the distance to a threshold that a sound training gains in two checks at least
MAX_SHARE_OF_TIME = 0.01  # largest share of the training's time so far for all checks but the first


class Watch(Hook):
    """At the end of epochs, check the outputs on a few CALIB photos with objects.

    Figures of a detector are bad early in a training, but they improve. In the first two thirds a bad figure is
    reported only if its distance to the threshold has not shrunk by `MIN_PROGRESS` in two checks. An epoch is skipped
    if all checks together would take more than `MAX_SHARE_OF_TIME`.

    Args:
        photos: the CALIB split. Its first photos with objects are read.
        model: the trained model or its average. Without a router, as before the exits phase, only its full path is
            checked.
    """

    def __init__(self, photos: DetectionDataset, model: EarlyExitSSDLite) -> None:
        records = [record for record in photos.records if record.has_targets][:WATCHED_PHOTOS]
        samples = photos.subset(records)
        self.samples, self.model = [samples[index] for index in range(len(samples))], model
        self.temperatures: dict[str, list[float]] = {}  # after each epoch
        self.warned: set[tuple[str, str]] = set()
        self.distances: list[dict[tuple[str, str], float]] = []  # of the bad figures, in each run of the checks
        self.spent = self.longest = 0.0  # seconds

    def before_training(self, trainer: Trainer) -> None:
        self.start = time.perf_counter()

    def after_step(self, trainer: Trainer) -> None:
        due, now = is_main() and trainer.step % len(trainer.loader) == 0, time.perf_counter()
        if due and isinstance(getattr(self.model.router, "temperatures", None), nn.Parameter):  # also without checks
            for name, value in zip(self.model.exit_names, self.model.router.temperatures.tolist(), strict=False):
                self.temperatures.setdefault(name, []).append(value)
        if due and self.spent + self.longest <= MAX_SHARE_OF_TIME * (now - self.start):
            self.run_checks(trainer.step // len(trainer.loader), 3 * trainer.step >= 2 * trainer.total_steps)
            taken = time.perf_counter() - now
            self.spent, self.longest = self.spent + taken * (self.longest > 0), max(self.longest, taken)

    def run_checks(self, epoch: int, last_third: bool) -> None:
        """Log a warning for each bad figure, but only one for each check and exit."""
        diagnosis = diagnose(MODEL_CHECKS, self.evidence())
        for finding in diagnosis.bad:
            key = finding.check, finding.subject
            before = [distances[key] for distances in self.distances[-2:] if key in distances]
            stuck = len(before) == 2 and not finding.distance <= (1 - MIN_PROGRESS) * max(before)
            if (stuck or last_third) and key not in self.warned:
                self.warned.add(key)
                logger.warning("epoch %d: %s", epoch, finding)
        self.distances.append({(finding.check, finding.subject): finding.distance for finding in diagnosis.bad})

    def finds(self, check: str) -> bool:
        """Return whether the figure of a check is bad for any exit or the full path."""
        return any(finding.check == check for finding in diagnose(MODEL_CHECKS, self.evidence()).bad)

    def evidence(self) -> ModelEvidence:
        """Return the current outputs and the temperatures so far, the only input of the checks during a training."""
        if not self.samples:
            return ModelEvidence()
        model, device = self.model, next(self.model.parameters()).device
        images, targets = zip(*self.samples, strict=True)
        with evaluating(model):
            _, evidence = batch_evidence(model, [image.to(device) for image in images], targets)
        exits = evidence.exits[-1:] if model.router is None else evidence.exits
        return replace(evidence, exits=exits, temperatures=self.temperatures)
