"""The phases of a training, their gates, the unchanged full path, and fine-tuning at smaller inputs."""

import copy
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from torchvision.ops import box_iou

from earlyexit_ssd.config import load_config
from earlyexit_ssd.data import DetectionDataset
from earlyexit_ssd.data.records import Annotation, Record
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling import Architecture, LossSettings, describe_exits
from earlyexit_ssd.modeling.detector import TapBatch
from earlyexit_ssd.pipeline import phases
from earlyexit_ssd.pipeline.build import build_router, with_values
from earlyexit_ssd.pipeline.phases import (
    DistillationLosses,
    MultiScaleLosses,
    baseline_advice,
    baseline_gate,
    exits_advice,
    exits_gate,
    full_path_fingerprint,
    joint,
    joint_losses,
    require_same_full_path,
    views_of,
)
from earlyexit_ssd.pipeline.run import Run, RunFolder
from tests.modeling.conftest import small_model


def add_one(model):
    """Change every weight and buffer."""
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(1)


@pytest.mark.parametrize(("after", "kept"), [(0.499, True), (0.4985, True), (0.497, False)])
def test_joint_phase_is_kept_only_if_the_full_path_keeps_its_ap50(monkeypatch, after, kept):
    run, teachers, ap50 = Run(load_config(), None, small_model(), *[None] * 4), [], iter([0.5, after])

    def train(run, name, losses, loader):
        teachers.append(run.model.losses.teacher)
        add_one(run.model)

    monkeypatch.setattr(phases, "fit", train)
    monkeypatch.setattr(phases, "photo_loader", lambda run, batch_size: None)
    quality = SimpleNamespace(of_full_path=lambda model: {"AP50": next(ap50)})
    monkeypatch.setattr(Run, "calib_quality", quality)
    before, losses = {key: value.clone() for key, value in run.model.state_dict().items()}, run.model.losses
    gate = joint(run)
    same = all(torch.equal(value, before[key]) for key, value in run.model.state_dict().items())
    assert same is not kept and gate.passed and ("weights of the exits phase kept" in str(gate)) is not kept
    assert teachers == ["next"] and run.model.losses is losses


@pytest.mark.parametrize(
    ("weights", "expected"), [((), (1 / 4, 1 / 3, 1 / 2)), ((0.5,), (0.5,)), ((1.0, 2.0, 3.0), (1.0, 2.0, 3.0))]
)
def test_joint_phase_has_its_own_teacher_and_weights(weights, expected):
    phase = with_values(load_config(), {"JOINT.EXIT_WEIGHTS": weights}).JOINT
    losses = joint_losses(LossSettings(teacher="full", exit_weights=(7.0,), full_weight=2.0), phase, exits=3)
    assert (losses.teacher, losses.exit_weights, losses.full_weight) == ("next", expected, 2.0)


def test_sizes_take_turns_and_share_all_weights():
    architecture = Architecture(("chair",), image_size=96, width=0.35, exits=describe_exits((8,)))
    model = architecture.build().train()
    model.router = build_router(load_config(), {"num_exits": 1}, learn=True)
    model.norm_frozen = True
    module = MultiScaleLosses(model, architecture, (96, 64))
    assert set(map(id, module.parameters())) == set(map(id, model.parameters()))
    images = [torch.rand(3, 80, 90)]
    targets = [{"boxes": torch.tensor([[10.0, 10, 60, 70]]), "labels": torch.tensor([1]), "image_id": 4}]
    own, same = model.train()(images, targets), module(images, targets)
    smaller = module(images, [{**targets[0], "image_id": 5}])
    assert same.keys() == own.keys() and all(torch.equal(same[key], own[key]) for key in own)
    changed = {key for key in own if not torch.equal(smaller[key], own[key])}
    assert smaller.keys() == own.keys() and {"classification", "exit8_classification"} <= changed
    sum(smaller.values()).backward()
    assert all(weight.grad is not None for weight in (*model.head.parameters(), *model.branches.parameters()))
    before = [buffer.clone() for buffer in module._copies[1].buffers()]
    add_one(model)
    assert all(torch.equal(new, old + 1) for new, old in zip(module._copies[1].buffers(), before, strict=True))


@pytest.mark.parametrize("part", ["backbone", "head"])
def test_smallest_change_of_the_full_path_is_found(part):
    model = small_model().train()
    before = full_path_fingerprint(model)
    require_same_full_path(before, model)
    assert model.training and model.backbone.training
    with torch.no_grad():
        next(getattr(model, part).buffers()).view(-1)[0].add_(1e-7)
    with pytest.raises(EarlyExitError, match=f"changed the full path: {part}"):
        require_same_full_path(before, model)


@pytest.mark.parametrize("epochs", ["0", "1"])
def test_branches_start_as_copies_of_the_trained_full_path(monkeypatch, epochs):
    monkeypatch.setattr(phases, "fit", lambda *_: None)
    monkeypatch.setattr(phases, "tap_loader", lambda run: None)
    run = Run(load_config(None, ["EXITS_PHASE.EPOCHS", epochs]), None, small_model(), *[None] * 3, torch.device("cpu"))
    with torch.no_grad():
        for weight in run.model.backbone.parameters():  # the baseline phase trains them
            weight.mul_(1.01)
    before, expected = copy.deepcopy(run.model.branches.state_dict()), copy.deepcopy(run.model)
    expected.inherit()
    phases.train_branches(run)
    found = run.model.branches.state_dict()
    assert all(value.equal(found[key]) for key, value in expected.branches.state_dict().items())
    assert not all(value.equal(found[key]) for key, value in before.items())


def test_a_change_of_the_frozen_full_path_ends_the_exits_phase(monkeypatch):
    def spoil(run, *_):
        with torch.no_grad():
            next(run.model.backbone.parameters()).mul_(1 + 1e-6)

    monkeypatch.setattr(phases, "fit", spoil)
    monkeypatch.setattr(phases, "tap_loader", lambda run: None)
    run = Run(load_config(), None, small_model(), *[None] * 3, torch.device("cpu"))
    with pytest.raises(EarlyExitError, match="the exits phase changed the full path: backbone"):
        phases.train_branches(run)


def test_photo_names_of_both_kinds_of_batches():
    photos, targets = SimpleNamespace(path_of="{}.jpg".format), [{"image_id": torch.tensor(3)}, {"image_id": 5}]
    assert phases._photo_names(photos, TapBatch([], {}, targets)) == ["3.jpg", "5.jpg"]
    assert phases._photo_names(photos, ([], targets)) == ["3.jpg", "5.jpg"]


@pytest.mark.parametrize(("name", "share"), [("joint", 0.25), ("exits", 1.0)])
def test_only_the_joint_phase_lowers_the_rate_of_the_full_path(name, share, tmp_path, monkeypatch):
    cfg, built = load_config(None, ["JOINT.FULL_PATH_LR_FACTOR", "0.25"]), {}
    photos = SimpleNamespace(records=[], subset=lambda records: records)
    run = Run(cfg, RunFolder(tmp_path), small_model(), None, photos, photos, torch.device("cpu"))
    monkeypatch.setattr(phases, "Trainer", lambda **settings: built.update(settings) or MagicMock())
    phases.fit(run, name, run.model, None)
    groups = built["optimizer"].param_groups
    factors = {id(weight): group["lr_factor"] for group in groups for weight in group["params"]}
    full = [*run.model.backbone.parameters(), *run.model.head.parameters()]
    assert {factors[id(weight)] for weight in full} == {share}
    assert {factors[id(weight)] for weight in run.model.branches.parameters()} == {1.0}


def test_cached_taps_depend_only_on_photos_and_views():
    same = ["DATA.WORKERS", "0", "DATA.CALIB", "[coco_2017_val]", "DATA.DOWNLOAD", "True"]
    assert views_of(load_config(None, same)) == views_of(load_config(None))
    for key, value in (("DATA.AUGMENTATION", "ssd"), ("SEED", "1"), ("DATA.SYNTHETIC.SEED", "1")):
        assert views_of(load_config(None, [key, value])) != views_of(load_config(None)), key


# Gates.

CHECKPOINT = ["MODEL.WEIGHTS", "COCO_V1", "BASELINE.EPOCHS", "0"]


def full_path(ap50, precision, recall):
    return {"AP50": ap50, "precision": precision, "recall": recall}


def test_limits_are_met_or_exceeded():
    assert baseline_gate(load_config(), full_path(0.4, 0.7, 0.5)).passed
    gate = baseline_gate(load_config(), full_path(0.39, None, 0.9))
    assert [check.passed for check in gate.checks] == [False, False, True]
    assert str(gate) == (
        "gate of phase baseline failed: AP50 0.390 < 0.400, precision undefined < 0.600, recall 0.900 >= 0.500"
    )


def test_deepest_exit_is_compared_with_the_full_path():
    gate = exits_gate(load_config(), {"exit8": 0.31, "exit12": 0.5, "full": 0.6}, 8)
    assert [(check.value, check.limit) for check in gate.checks] == [(0.31, 0.30), (0.5, 0.85 * 0.6)]
    assert not gate.passed and str(gate).endswith("exit12 AP50 0.500 < 0.510 (85% of full's 0.600)")
    assert str(exits_gate(load_config(), {"full": None}, 16)) == "gate of phase exits passed: nothing to check"


@pytest.mark.parametrize(
    ("keys", "reference", "limits"),
    [
        ([], None, (0.4, 0.6, 0.5)),
        (["BASELINE.EPOCHS", "0"], None, (0.4, 0.6, 0.5)),  # untrained, and no checkpoint
        (CHECKPOINT, None, (0.05, None, None)),
        ([*CHECKPOINT[:2], "PHASES", "[exits]"], None, (0.05, None, None)),
        (CHECKPOINT[:2], None, (0.4, 0.6, 0.5)),  # trained further
        ([*CHECKPOINT, "BASELINE.GATE.AP50", "0.2", "BASELINE.GATE.RECALL", "0.1"], None, (0.2, None, 0.1)),
        ([*CHECKPOINT, "BASELINE.GATE.AP50", "0.0"], None, (0.05, None, None)),
        ([*CHECKPOINT[:2], "BASELINE.GATE.RELATIVE", "0.5"], (0.2, 0.6, None), (0.1, 0.3, 0.0)),
        ([*CHECKPOINT[:2], "BASELINE.GATE.RELATIVE", "0.5"], (0.0, None, 0.0), (0.05, 0.0, 0.0)),
    ],
)
def test_limits_of_the_baseline_gate(keys, reference, limits):
    """An unchanged checkpoint must only detect. No setting removes this limit."""
    gate = baseline_gate(load_config(None, keys), full_path(1, 1, 1), reference and full_path(*reference))
    assert {check.name: check.limit for check in gate.checks} == full_path(*limits)


def test_gate_of_an_unchanged_checkpoint_shows_its_figures():
    cfg = load_config(None, CHECKPOINT)
    gate = baseline_gate(cfg, full_path(0.26, 0.8, 0.16))
    assert gate.passed and str(gate).endswith("passed: AP50 0.260 >= 0.050, precision 0.800, recall 0.160")
    assert not baseline_gate(cfg, full_path(0.04, 1.0, 0.9)).passed
    assert not baseline_gate(cfg, full_path(None, None, None)).passed
    assert gate.to_dict()["checks"][1] == {"name": "precision", "value": 0.8, "limit": None, "of": "", "passed": True}


@pytest.mark.parametrize(
    ("ap50", "passed"),
    [
        ((0.151, 0.171, 0.2), True),  # under 0.30, and three quarters of what the checkpoint has
        ((0.149, 0.171, 0.2), False),
        ((0.151, 0.169, 0.2), False),
        ((0.049, 0.049, 0.049), False),  # it does not detect
        ((0.0, 0.0, 0.0), False),
        ((None, None, None), False),
    ],
)
def test_exits_of_an_unchanged_checkpoint_are_compared_with_it(ap50, passed):
    gate = exits_gate(load_config(None, CHECKPOINT), dict(zip(("exit8", "exit12", "full"), ap50, strict=True)), 8)
    assert gate.passed is passed
    if passed:
        assert "full AP50 0.200 >= 0.050, exit8 AP50 0.151 >= 0.150 (75% of full's 0.200)" in str(gate)


@pytest.mark.parametrize(
    ("keys", "layer", "named", "unnamed"),
    [
        ([], None, ["more epochs than 24", "BASELINE.LR", "MODEL.WEIGHTS)", "MODEL.WEIGHTS_BACKBONE"], []),
        (["MODEL.WEIGHTS_BACKBONE", "IMAGENET1K_V1"], None, ["MODEL.WEIGHTS)"], ["MODEL.WEIGHTS_BACKBONE"]),
        (["MODEL.WEIGHTS", "COCO_V1"], None, ["BASELINE.EPOCHS"], ["MODEL.WEIGHTS"]),
        (CHECKPOINT, None, ["train the full path: BASELINE.EPOCHS is 0"], ["MODEL.WEIGHTS", "more epochs"]),
        ([], 8, ["EXITS.LAYERS", "more epochs than 8", "more views of a photo than 2"], []),
        ([], 8, ["than 0.5 (EXITS.COPY)", "SUPERVISION teacher"], []),
        (["EXITS.COPY", "[1.0]"], 8, ["EXITS.LAYERS"], ["EXITS.COPY"]),
        (["EXITS.COPY", "[1.0, 0.25]"], 8, ["than 1, 0.25 (EXITS.COPY)"], []),
        (["EXITS_PHASE.CACHE", "False"], 8, ["EXITS_PHASE.EPOCHS"], ["CACHE_VIEWS"]),
        (["EXITS_PHASE.EPOCHS", "0"], 8, ["EXITS_PHASE.EPOCHS is 0"], ["CACHE_VIEWS", "more epochs"]),
        (["LOSS.SUPERVISION", "teacher"], 8, ["more photos"], ["SUPERVISION"]),
        (["EXITS.LAYERS", "[12]"], 12, ["more photos"], ["EXITS.LAYERS"]),
    ],
)
def test_advice_names_no_setting_that_is_in_use(keys, layer, named, unnamed):
    """``layer`` is that of the first exit; None: advice for the baseline."""
    cfg = load_config(None, keys)
    advice = "\n".join(baseline_advice(cfg) if layer is None else exits_advice(cfg, "exit8", layer))
    assert all(word in advice for word in named) and not any(word in advice for word in unnamed), advice


@pytest.mark.parametrize(("uniform", "first"), [(True, "more epochs than 8"), (False, "move the exit deeper")])
def test_exits_with_uniform_scores_need_more_epochs_first(monkeypatch, uniform, first):
    monkeypatch.setattr(phases, "train_branches", lambda run: None)
    monkeypatch.setattr(phases, "Watch", lambda *_: SimpleNamespace(finds=lambda check: uniform))
    monkeypatch.setattr(Run, "calib_quality", SimpleNamespace(of_exits=lambda model: [{"AP50": 0.1}] * 2))
    gate = phases.exits(Run(load_config(), None, small_model(exit_layers=(8,)), *[None] * 4))
    assert not gate.passed and gate.advice[0].startswith(first) and len(gate.advice) == 3


# Fine-tuning at smaller inputs.


def test_fine_tuning_repeats_rare_classes_and_starts_anew_with_other_settings(monkeypatch, tmp_path):
    def record(index):
        annotations = [Annotation((1.0, 1.0, 9.0, 9.0), 1)] if index == 0 else []
        return Record(index, tmp_path / f"{index}.png", 9, 9, tuple(annotations))

    def loaded(*_, **__):
        return DetectionDataset([record(index) for index in range(4)], ["chair"], train=True)

    runs = []
    monkeypatch.setattr(phases, "load_dataset", loaded)
    monkeypatch.setattr("earlyexit_ssd.data.dataset.sha256", str)
    monkeypatch.setattr(phases, "fit", lambda run, *_: runs.append((len(run.train_set), run.folder.root)))
    architecture = Architecture(("chair",), image_size=64, width=0.25, exits=())
    model = architecture.build()
    for keys in ([], ["ENGINE.AMP", "bf16"], ["DATA.REPEAT_THRESHOLD", "1.0"]):
        cfg = load_config(None, [*keys, "FINE_TUNING.BATCH_SIZE", "2"])
        phases.fine_tune(cfg, model, architecture, model, [64], None, tmp_path)
    assert [photos for photos, _ in runs] == [4, 4, 5]  # a quarter of the photos shows a chair: sqrt(1 / 0.25) = 2
    assert len({folder for _, folder in runs}) == 3


TEACHER_SIDE = 128


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return Architecture(("chair",), image_size=TEACHER_SIDE, width=0.35, exits=()).build()


@pytest.fixture
def batch():
    images = [torch.rand(3, 100, 120, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    targets = [
        {"boxes": torch.tensor([[10.0, 10.0, 70.0, 80.0]]), "labels": torch.tensor([1]), "image_id": number}
        for number in (3, 4)
    ]
    return images, targets


def losses_of(detector, sides, labelled=False):
    student = DistillationLosses(detector.train(), detector, sides, labelled)
    detector.norm_frozen = True
    detector.train()
    detector.losses = LossSettings(distillation_weight=1.0)
    return student


@pytest.mark.parametrize(
    ("sides", "labelled", "names"),
    [
        ((), False, {"distillation"}),
        ((96,), False, {"distillation"}),
        ((96,), True, {"distillation", "bbox_regression", "classification"}),
    ],
)
def test_a_student_equal_to_its_teacher_has_a_distillation_loss_only_at_another_size(
    detector, batch, sides, labelled, names
):
    losses = losses_of(detector, sides, labelled)(*batch)
    distillation = losses["distillation"].item()
    assert losses.keys() == names and (distillation > 1e-3 if sides else abs(distillation) <= 1e-4)


def test_a_default_box_learns_from_the_teachers_default_box_of_highest_iou(detector, batch):
    student = losses_of(detector, (96,))
    computed = student.compute(*batch)
    taught = student._teacher_outputs(computed)
    boxes, own = computed.anchors[0] / 96, detector.default_boxes(computed.images)[0] / TEACHER_SIDE
    with torch.no_grad():
        head = detector.head(detector.full_maps(computed.images.tensors))
    best = torch.stack([box_iou(box[None], own)[0].argmax() for box in boxes])
    torch.testing.assert_close(taught["cls_logits"], head["cls_logits"][:, best])
    # student and teacher predict the same box of the photo
    of_student = detector.box_coder.decode_single(taught["bbox_regression"][0], boxes)
    of_teacher = detector.box_coder.decode_single(head["bbox_regression"][0, best], own[best])
    torch.testing.assert_close(of_student, of_teacher, atol=1e-4, rtol=1e-4)
