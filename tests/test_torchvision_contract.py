"""Requirements of torchvision's reference detection scripts on a model and a data set.

No wheel has the scripts. docs/torchvision_contract.md describes how the original scripts were run.
"""

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from torch.utils.data import Subset
from torchvision import models
from torchvision.models.detection import SSDLite320_MobileNet_V3_Large_Weights

import earlyexit_ssd
from earlyexit_ssd.data import Annotation, DetectionDataset, Record, to_coco
from earlyexit_ssd.evaluation.evaluate import evaluate_detections
from earlyexit_ssd.evaluation.metrics import EvaluationSettings
from earlyexit_ssd.modeling import EarlyExitSSDLite
from earlyexit_ssd.routing import ExitRouter
from tests.modeling.conftest import small_model
from tests.reference_scripts import average_precisions, detect, ground_truth_of, loader_of, sgd, train_epoch, trainable

NAME = "earlyexit_ssdlite320_mobilenet_v3_large"
TINY = {"weights": None, "weights_backbone": None, "num_classes": 3, "image_size": 96, "width": 0.25, "channels": 16}
CLASSES = ("chair", "table")
COLOURS = {1: "red", 2: "blue"}
FULL_LOSSES = {"bbox_regression", "classification"}
LOSSES = FULL_LOSSES | {f"{exit_name}_{key}" for exit_name in ("exit8", "exit12") for key in FULL_LOSSES}

# size of the photo, and x1, y1, x2, y2, label, ignore of its objects
SCENES = (
    ((96, 96), [(8, 8, 56, 72, 1, False)]),
    ((120, 80), [(6, 10, 50, 70, 1, False), (60, 12, 110, 60, 2, False)]),
    ((90, 110), [(20, 30, 48, 58, 2, False)]),
    ((96, 96), []),
    ((100, 90), [(5, 5, 45, 80, 2, False), (52, 20, 95, 85, 1, True)]),
    ((96, 96), [(30, 20, 88, 80, 1, False)]),
)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """Return records of every scene twice, on two greys."""
    folder = tmp_path_factory.mktemp("scenes")
    return [draw(folder / f"{index}.png", index, *SCENES[index % len(SCENES)]) for index in range(12)]


def draw(path: Path, index: int, size: tuple[int, int], objects: list[tuple]) -> Record:
    """Draw a scene. The image id differs from the index, as in real data."""
    image = Image.new("RGB", size, (60 + 12 * index,) * 3)
    for x1, y1, x2, y2, label, _ in objects:
        ImageDraw.Draw(image).rectangle((x1, y1, x2 - 1, y2 - 1), COLOURS[label])
    image.save(path)
    annotations = tuple(Annotation(tuple(map(float, box)), label, ignore) for *box, label, ignore in objects)
    return Record(100 + 7 * index, path, *size, annotations)


@pytest.fixture
def training_set(records: list[Record]) -> DetectionDataset:
    return DetectionDataset(records, CLASSES, train=True)


@pytest.fixture
def test_set(records: list[Record]) -> DetectionDataset:
    return DetectionDataset(records, CLASSES)


@pytest.fixture(scope="module")
def trained(records: list[Record]) -> EarlyExitSSDLite:
    """Return a model trained until its AP is above 0."""
    model = small_model()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.3  # thirty steps are too few for SSDLite's 0.03: in eval mode all photos look alike
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader = loader_of(DetectionDataset(records, CLASSES, train=True))
    for epoch in range(10):
        for _ in train_epoch(model, loader, optimizer, epoch):
            pass
    return model


def median_router(model: EarlyExitSSDLite, dataset: DetectionDataset) -> ExitRouter:
    """Return a router with thresholds at the median confidences, so every exit gets images."""
    router = ExitRouter(2, policy="mean_foreground")
    with torch.inference_mode():
        outputs = model.eval().exit_outputs([image for image, _ in dataset])
    first, second = (router.confidence(outputs.signals(index), index) for index in range(2))
    middle = first.quantile(0.5)
    thresholds = (float(middle), float(second[first < middle].quantile(0.5)))
    return ExitRouter(2, policy="mean_foreground", thresholds=thresholds)


def figures(dataset: DetectionDataset, results: dict) -> list[float]:
    """Return AP to AP_large. Undefined values are -1, as in pycocotools."""
    measured = evaluate_detections(to_coco(dataset), results, EvaluationSettings(resamples=0)).figures
    values = [measured[name] for name in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")]
    return [-1 if value is None else value for value in values]


@pytest.mark.parametrize("scaled", [False, True], ids=["fp32", "scaler"])
def test_one_epoch_trains_every_exit(training_set, scaled):
    model = small_model()
    before = {name: value.clone() for name, value in model.named_parameters()}
    scaler = torch.amp.GradScaler("cpu") if scaled else None
    steps = list(train_epoch(model, loader_of(training_set), sgd(model), 0, scaler))
    assert len(steps) == 3
    for step in steps:
        assert set(step) == LOSSES
        # processes average them as one tensor, and log them beside their sum, "loss", and "lr"
        stacked = torch.stack([step[key].detach() for key in sorted(step)])
        assert stacked.shape == (6,) and stacked.dtype == torch.float32 and stacked.isfinite().all()
    assert all(parameter.grad is not None for parameter in trainable(model))
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    for part in ("backbone.", "head.", "branches.exit8.", "branches.exit12."):
        assert any(name.startswith(part) for name in changed), part


def test_photos_without_objects_have_the_same_loss_keys(records):
    """Processes average the losses, so all need the same keys."""
    model = small_model()
    empty = DetectionDataset([record for record in records if not record.annotations], CLASSES, train=True)
    (step,) = train_epoch(model, loader_of(empty), sgd(model), 1)
    assert set(step) == LOSSES and all(value.isfinite() for value in step.values())
    assert all(parameter.grad is not None for parameter in trainable(model))


@pytest.mark.parametrize("frozen", [False, True], ids=["all", "exits"])
def test_distributed_training_has_no_unused_parameters(training_set, tmp_path, frozen):
    """DistributedDataParallel fails in step 2 if a parameter that requires a gradient got none in step 1."""
    model = small_model()
    model.freeze_full_path(frozen)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        assert len(list(train_epoch(wrapped, loader_of(training_set), sgd(model), 0))) == 3
    finally:
        torch.distributed.destroy_process_group()


def test_frozen_trunk_stays_in_eval_mode_in_every_epoch(training_set):
    model = small_model()
    model.freeze_full_path()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = sgd(model)
    for epoch in range(2):
        for step in train_epoch(model, loader_of(training_set), optimizer, epoch):
            assert set(step) == LOSSES - FULL_LOSSES
            assert model.training and not any(module.training for module in model.backbone.modules())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("branches.") for name in changed)


@pytest.mark.parametrize("routed", [False, True], ids=["unrouted", "routed"])
def test_evaluation_equals_the_package_s_figures(trained, test_set, routed):
    trained.router = median_router(trained, test_set) if routed else None
    results = detect(trained, loader_of(test_set))
    assert list(results) == [record.image_id for record in test_set.records]
    assert all(("exit_index" in output) == routed for output in results.values())
    if routed:
        exits = [int(output["exit_index"]) for output in results.values()]
        assert set(exits) == {0, 1, 2}
        one_by_one = detect(trained, loader_of(test_set, batch_size=1))
        assert [int(output["exit_index"]) for output in one_by_one.values()] == exits
    expected = average_precisions(ground_truth_of(test_set), results)
    assert figures(test_set, results) == expected
    assert expected[1] > 0.01


def test_evaluation_of_a_subset(trained, test_set):
    """The scripts take the ground truth of the whole data set, and evaluate the images of the Subset."""
    trained.router = None
    chosen = [1, 2, 4, 5]
    results = detect(trained, loader_of(Subset(test_set, chosen)))
    part = DetectionDataset([test_set.records[index] for index in chosen], CLASSES)
    assert list(results) == [record.image_id for record in part.records]
    expected = average_precisions(ground_truth_of(test_set), results)
    assert figures(part, results) == expected


def test_scripts_group_photos_by_aspect_ratio_and_change_boxes_in_place(test_set):
    sizes = [tuple(image.shape[-2:]) for image, _ in test_set]
    assert [test_set.get_height_and_width(index) for index in range(len(test_set))] == sizes
    box = test_set[0][1]["boxes"]
    box += 1000
    assert test_set[0][1]["boxes"].tolist() == [[8, 8, 56, 72]]  # the data set does not change with them


def test_builders_are_registered_in_torchvision():
    assert models.list_models(include="earlyexit*") == ["earlyexit_ssd300_vgg16", NAME]
    assert models.list_models(module=earlyexit_ssd.modeling) == ["earlyexit_ssd300_vgg16", NAME]
    assert models.get_model_builder(NAME) is earlyexit_ssd.earlyexit_ssdlite320_mobilenet_v3_large
    assert models.get_model_weights(NAME) is SSDLite320_MobileNet_V3_Large_Weights
    model = models.get_model(NAME, trainable_backbone_layers=None, **TINY)
    assert isinstance(model, EarlyExitSSDLite) and model.num_classes == 3


def test_the_page_names_what_is_not_promised():
    page = (Path(__file__).parents[1] / "docs" / "torchvision_contract.md").read_text(encoding="utf-8")
    limits = page.split("Not promised: ")[1].split("\n\n")[0]
    assert "`torch.jit.script`" in limits and "`torch.export`" in limits
