"""The jobs of the doctor, and the hook that checks a model during its training."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from earlyexit_ssd.config import load_config
from earlyexit_ssd.data import Annotation, Record
from earlyexit_ssd.data.dataset import DetectionDataset
from earlyexit_ssd.doctor.findings import check, diagnose
from earlyexit_ssd.doctor.model import ModelEvidence
from earlyexit_ssd.errors import DataError
from earlyexit_ssd.files import write_image, write_json, write_text
from earlyexit_ssd.modeling.ssdlite import earlyexit_ssdlite320_mobilenet_v3_large
from earlyexit_ssd.modeling.trunk import evaluating
from earlyexit_ssd.pipeline.doctor import (
    Report,
    Watch,
    _split,
    batch_evidence,
    chosen_photos,
    named_right,
    run_evidence,
)
from earlyexit_ssd.routing import ExitRouter


@pytest.mark.parametrize(
    ("name", "text", "aps"),
    [
        ("metrics.json", '{"exits": [{"name": "full", "AP50": 0.5, "AP": null, "mAP": 1}], "ms": 3}', 2),
        ("exits/gate.json", '[{"name": "exit8 AP50", \n "value": 0.5}, {"name": "AP50", "value": null}]}', 1),
        ("baseline/log.jsonl", '{"step": 1, "AP50/full": 0.1}\n{"step": 2, "AP50/full": 0.2, "gap": 1}', 2),
        ("log.jsonl", '{"step": 1, "exit_rate": 1.0, "ms": 14.4, "confidence": 0.4}', 0),
        ("notes.json", '{"AP": 0.3}', None),
    ],
)
def test_aps_of_a_run(tmp_path, name, text, aps):
    write_text(tmp_path / "config.yaml", "")
    write_text(tmp_path / name, text)
    assert run_evidence(tmp_path / "model.pth", ModelEvidence(), ExitRouter(1)).get("computed_aps") == aps


def test_other_runs_beside_a_checkpoint_are_ignored(tmp_path):
    write_text(tmp_path / "other" / "metrics.json", '{"AP50": 0.5}')
    assert run_evidence(tmp_path / "model.pth", ModelEvidence(), ExitRouter(1)) == {}


@pytest.mark.parametrize(
    ("policy", "confidences"), [("ambiguous_mass", {"exit8": [0.4, 0.1]}), ("mean_foreground", {})]
)
def test_curves_of_a_run(tmp_path, policy, confidences):
    write_text(tmp_path / "config.yaml", "")
    lines = ['{"step": 1, "confidence/exit8": 0.4, "temperature/exit8": 1.5}', '{"step": 2, "confidence/exit8": 0.1}']
    write_text(tmp_path / "exits" / "log.jsonl", "\n".join(lines))
    evidence = run_evidence(tmp_path / "model.pth", ModelEvidence(), ExitRouter(1, policy=policy))
    assert evidence["confidences"] == confidences and evidence["temperatures"] == {"exit8": [1.5]}


def test_findings_of_undefined_figures_are_written(tmp_path):
    checks = {}
    check(checks, least=0.5, meaning="NaN", advice="train")(lambda _: {"full": float("nan"), "exit8": 0.25})
    Report((), diagnose(checks, None)).write(tmp_path)
    findings = json.loads((tmp_path / "doctor.json").read_text())["diagnosis"]["findings"]
    assert [(finding["bad"], finding["figure"]) for finding in findings] == [(True, None), (True, 0.25)]


@pytest.mark.parametrize(
    ("photos", "shown", "without"), [(8, 4, 4), (30, 10, 20), (40, 10, 30), (100, 10, 40), (1, 0, 1)]
)
def test_half_of_the_photos_have_objects_if_there_are_enough(photos, shown, without):
    records = [Record(n, Path(f"{n}"), 9, 9, (Annotation((1, 1, 5, 5), 1),) * (n < 10)) for n in range(50)]
    chosen = [record.has_targets for record in chosen_photos(records, photos, 0)]
    assert (sum(chosen), len(chosen) - sum(chosen)) == (shown, without)


def test_share_of_found_objects_with_the_right_name():
    """In photo n of 20, an object of class 1 is found at score 0.5: in 15 photos as class 2, in 5 as class 1. In all
    photos a weaker detection names it right, and an object of class 2 is found at score 0.2 only."""
    box, other = (10.0, 10.0, 30.0, 30.0), (40.0, 40.0, 60.0, 60.0)
    records = [Record(n, Path(f"{n}"), 99, 99, (Annotation(box, 1), Annotation(other, 2))) for n in range(20)]
    detections = {
        n: {
            "boxes": torch.tensor([box, box, other]),
            "scores": torch.tensor([0.5, 0.4, 0.2]),
            "labels": torch.tensor([2 if n < 15 else 1, 1, 2]),
        }
        for n in range(20)
    }
    assert named_right(DetectionDataset(records, ("cat", "dog")), detections) == {"cat": 0.25}
    assert named_right(DetectionDataset(records[:9], ("cat", "dog")), detections) == {}  # too few
    assert named_right(DetectionDataset(records, ("cat",)), detections) == {}


@pytest.fixture
def photos(tmp_path) -> DetectionDataset:
    """Twelve grey photos with one object each."""
    records = []
    for number in range(12):
        path = tmp_path / f"{number}.png"
        write_image(path, Image.new("RGB", (96, 96), (number * 20,) * 3))
        records.append(Record(number, path, 96, 96, (Annotation((8.0 * (number % 4), 8.0, 60.0, 70.0), 1),)))
    return DetectionDataset(records, ("cat",))


@pytest.fixture
def model():
    model = earlyexit_ssdlite320_mobilenet_v3_large(
        weights_backbone=None, num_classes=2, image_size=96, width=0.25, channels=16, classes=("cat",), exit_layers=(8,)
    )
    for name, parameter in model.named_parameters():  # every default box gets the same score
        if "classification_head" in name:
            torch.nn.init.zeros_(parameter)
    return model


def test_crowds_and_difficult_objects_do_not_count_as_objects(photos, model):
    (record, other), crowd = photos.records[:2], Annotation((8.0, 8.0, 60.0, 70.0), 1, ignore=True)
    records = [record.with_annotations([crowd]), other.with_annotations([*other.annotations, crowd])]
    images, targets = zip(*(photos.subset(records)[index] for index in (0, 1)), strict=True)
    with evaluating(model):
        _, evidence = batch_evidence(model, list(images), targets)
    assert [boxes.tolist() for boxes in evidence.objects] == [[], [[8.0, 8.0, 60.0, 70.0]]]


def test_photos_are_those_that_a_training_uses(tmp_path):
    images = [{"id": n, "file_name": f"{n}.png", "width": 96, "height": 96} for n in range(6)]
    for image in images:
        pixels = Image.effect_noise((96, 96), 50 + image["id"])
        write_image(tmp_path / "photos" / image["file_name"], pixels.convert("RGB") if image["id"] else pixels)
    boxes = [{"id": n, "image_id": n, "category_id": 1, "bbox": [8, 8, 40, 40]} for n in range(3)]
    tree = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
    write_json(tmp_path / "boxes.json", tree)

    def photos(*settings: str) -> list[int]:
        sets = ["DATA.ROOT", str(tmp_path), "DATA.DATASETS", "[[a, boxes.json, photos], [b, '', photos]]"]
        cfg = load_config(None, [*sets, "DATA.TRAIN", "a", "DATA.CALIB", "b", *settings])
        return [len(_split(cfg, name).records) for name in ("TRAIN", "CALIB")]

    assert photos() == [6, 6]
    assert photos("DATA.LIMIT", "4") == [4, 4]
    assert photos("DATA.NEGATIVE_SHARE", "0.25") == [4, 6]
    assert photos("DATA.ON_BAD", "skip") == [5, 5]
    with pytest.raises(DataError, match="grey photo"):
        photos("DATA.ON_BAD", "refuse")


def trainer_at(step: int) -> SimpleNamespace:
    return SimpleNamespace(step=step, loader=[0] * 10, total_steps=60)


def test_each_failure_of_a_training_is_reported_once(photos, model, caplog):
    watch, state = Watch(photos, model), {k: v.clone() for k, v in model.state_dict().items()}
    assert watch.finds("near_uniform_scores") and not watch.finds("temperature_at_bound")
    model.train()
    watch.before_training(trainer_at(0))
    with caplog.at_level(logging.WARNING):
        for step in (5, 10, 20, 30, 40):  # 5 is inside an epoch; a figure is bad after two earlier runs of the checks
            watch.longest = watch.spent = 0.0  # there is time for another run
            watch.after_step(trainer_at(step))
            messages = [record.getMessage() for record in caplog.records]
            assert bool(messages) is (step >= 30)
    assert messages[0].startswith("epoch 3: near_uniform_scores (full)")
    assert len(set(messages)) == len(messages) and all(text.startswith("epoch 3: ") for text in messages)
    assert not [text for text in messages if "exit8" in text]
    assert model.training and all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())


def test_a_bad_figure_that_improves_is_reported_in_the_last_third_only(photos, model, caplog, monkeypatch):
    figures = iter([0.1, 0.2, 0.15, 0.4])  # limit 0.5; 0.15 is worse than the figure before, but better than the first
    checks = {}

    @check(checks, least=0.5, meaning="alike", advice="train")
    def spread(_):
        return {"full": next(figures)}

    monkeypatch.setattr("earlyexit_ssd.pipeline.doctor.MODEL_CHECKS", checks)
    watch = Watch(photos, model)
    for epoch in (1, 2, 3):
        watch.run_checks(epoch, last_third=False)
    assert caplog.records == []
    watch.run_checks(4, last_third=True)
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [
        "epoch 4: spread (full): 0.4, expected at least 0.5"
    ]


def test_checks_take_at_most_one_percent_of_the_time(photos, model):
    model.router = ExitRouter(1, learn_temperatures=True)
    watch, runs = Watch(photos, model), []
    watch.before_training(trainer_at(0))
    watch.run_checks = lambda epoch, last_third: runs.append((epoch, last_third))
    watch.longest, watch.spent = 1.0, 0.0
    for step in (10, 15, 20):  # the checks take one second, and the training has not run for 100
        watch.after_step(trainer_at(step))
    assert runs == [] and watch.temperatures == {"exit8": [1.0, 1.0]}  # noted without checks too
    watch.start -= 101
    watch.after_step(trainer_at(40))
    assert runs == [(4, True)]
