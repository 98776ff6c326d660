"""Outputs of all exits, in memory and on disk, and the choice of exits."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from earlyexit_ssd.calibration.thresholds import choose
from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.errors import DataError, EarlyExitError
from earlyexit_ssd.evaluation.outputs import (
    choose_exits,
    collect,
    collect_detections,
    exit_share,
    record,
)
from earlyexit_ssd.modeling.outputs import ExitOutputs
from earlyexit_ssd.modeling.trunk import evaluating
from earlyexit_ssd.routing import POLICIES, ExitRouter
from earlyexit_ssd.routing.policies import is_fitted

# Outputs in memory.


class TwoExits(nn.Module):
    """The mean of a photo is the score of its detection. The early exit's score is half of it."""

    exit_names = ("exit8", "full")

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.passes = 0

    def exit_outputs(self, images):
        assert not self.training
        self.passes += 1
        values = torch.stack([image.mean() for image in images]) * self.weight
        heads = ({"cls_logits": values / 2}, {"cls_logits": values})
        return ExitOutputs(heads, (values[:, None],), [], [], [], (False,))

    def detections(self, outputs, index):
        return [
            {"boxes": torch.zeros(1, 4), "scores": value[None], "labels": torch.ones(1, dtype=torch.int64)}
            for value in outputs.heads[index]["cls_logits"]
        ]

    def forward(self, images):
        return self.detections(self.exit_outputs(images), 1)


class Identity:
    hybrid = False

    def confidence(self, signals, index):
        return signals.logits + index


def batches(*ids):
    return [
        ([torch.full((3, 4, 4), image_id / 10) for image_id in batch], [{"image_id": image_id} for image_id in batch])
        for batch in ids
    ]


def test_collect_runs_all_exits_once_in_the_order_of_the_loader():
    model = TwoExits().train()
    collected = collect(model, batches((5, 2), (4,)), Identity())
    assert collected.image_ids == [5, 2, 4]
    assert model.passes == 2
    assert [found["scores"].item() for found in collected.detections[0].values()] == pytest.approx([0.25, 0.1, 0.2])
    assert collected.detections[1][4]["scores"].item() == pytest.approx(0.4)
    assert collected.confidences[0].tolist() == pytest.approx([0.25, 0.1, 0.2])
    assert collected.confidences[1].tolist() == pytest.approx([1.5, 1.2, 1.4])
    assert not collected.detections[0][5]["scores"].requires_grad
    assert model.training
    assert collect_detections(model, batches((5, 2), (4,)))[4]["scores"].item() == pytest.approx(0.4)


def test_collect_without_photos_or_without_a_router():
    collected = collect(TwoExits(), [], Identity())
    assert collected.image_ids == []
    assert [one.shape for one in collected.confidences] == [(0,), (0,)]
    assert collect(TwoExits(), batches((1,))).confidences == []


def test_a_repeated_image_id_is_refused(small_model, tmp_path):
    for run in (collect, collect_detections):
        with pytest.raises(DataError, match="image id 2 occurs twice"):
            run(TwoExits(), batches((1, 2), (2,)))
    with pytest.raises(DataError, match="image id 10 occurs twice"):
        record(small_model, recorded_batches(5) * 2, IDS * 2, tmp_path, "twice")


# Choice of exits.

CONFIDENCES = [torch.tensor([0.9, 0.2, 0.6, 0.1]), torch.tensor([0.1, 0.8, 0.9, 0.2]), torch.zeros(4)]


def test_photos_take_the_first_exit_that_reaches_its_threshold():
    assert choose_exits(CONFIDENCES, [0.6, 0.7]).tolist() == [0, 1, 0, 2]  # 0.6 reaches 0.6


def test_shares_of_exits():
    names = ("exit8", "exit12", "full")
    assert exit_share(torch.tensor([0, 2, 2, 2]), names) == {"exit8": 0.25, "exit12": 0.0, "full": 0.75}
    assert exit_share(torch.zeros(0, dtype=torch.int64), names) == {"exit8": 0.0, "exit12": 0.0, "full": 0.0}


# Recordings on disk.

SIZES = ((96, 96), (80, 120), (50, 60), (96, 96), (120, 70))
IDS = [10, 9, 8, 7, 6]  # of the photos of these sizes, which a recording stores by increasing id


def photos():
    generator = torch.Generator().manual_seed(3)
    samples = []
    for index, (height, width) in enumerate(SIZES):
        box = torch.tensor([[5.0, 5.0, width / 2, height / 2]])
        boxes = box if index % 2 else torch.zeros(0, 4)
        labels = torch.ones(len(boxes), dtype=torch.int64)
        target = {"image_id": IDS[index], "boxes": boxes, "labels": labels}
        samples.append((torch.rand(3, height, width, generator=generator), target))
    return samples


def recorded_batches(size):
    samples = photos()
    return [
        tuple(map(list, zip(*samples[start : start + size], strict=True))) for start in range(0, len(samples), size)
    ]


@pytest.fixture(scope="module")
def recording(small_model, tmp_path_factory):
    return record(small_model, recorded_batches(2), IDS, tmp_path_factory.mktemp("recording"), "these photos")


def test_a_recording_equals_collected_outputs(small_model, recording):
    router = ExitRouter(2, policy="entropy", temperatures=(1.5, 0.7))
    live = collect(small_model, recorded_batches(2), router)
    assert recording.image_ids == live.image_ids[::-1] == [6, 7, 8, 9, 10]
    for mine, theirs in zip(recording.detections, live.detections, strict=True):
        assert all(torch.equal(mine[key][part], theirs[key][part]) for key in theirs for part in theirs[key])
    for mine, theirs in zip(recording.confidences(router), live.confidences[:-1], strict=True):
        assert mine[::-1].tolist() == theirs.tolist()


@pytest.mark.parametrize("policy", sorted(name for name in POLICIES if not is_fitted(name)))
@pytest.mark.parametrize("size", [1, 4])
def test_replayed_exits_are_those_of_the_routed_model(small_model, recording, policy, size):
    router = ExitRouter(2, policy=policy)
    confidences = recording.confidences(router)
    # thresholds between two photos, so that some photos leave at every exit
    middles = [np.sort(values)[1:3].mean().item() if np.ptp(values) > 0 else CLOSED for values in confidences]
    small_model.router = ExitRouter(2, policy=policy, thresholds=middles)
    try:
        with evaluating(small_model), torch.inference_mode():
            live = [int(found["exit_index"]) for images, _ in recorded_batches(size) for found in small_model(images)]
    finally:
        small_model.router = None
    assert choose(confidences, middles).tolist() == live[::-1]
    assert len(set(live)) > 1


def test_recorded_labels_are_those_of_the_matching(small_model, recording):
    counts = (recording.labels > 0).sum(1).tolist()
    assert [count > 0 for count in counts] == [False, True, False, True, False]
    height, width = SIZES[1]
    target = {"boxes": torch.tensor([[5.0, 5.0, width / 2, height / 2]]), "labels": torch.tensor([1])}
    images, targets = small_model.transform([torch.rand(3, height, width)], [target])
    expected = small_model.assign(targets, small_model.default_boxes(images)).labels[0]
    assert recording.labels[recording.image_ids.index(IDS[1])].tolist() == expected.tolist()


def test_a_recording_is_reused_until_photos_or_weights_change(small_model, tmp_path):
    record(small_model, recorded_batches(2), IDS, tmp_path, "these photos")

    class Forbidden:
        def __iter__(self):
            raise AssertionError("the network ran again")

    assert len(record(small_model, Forbidden(), IDS, tmp_path, "these photos")) == len(SIZES)
    with pytest.raises(AssertionError, match="ran again"):
        record(small_model, Forbidden(), IDS, tmp_path, "other photos")
    assert not (tmp_path / "recording.key").exists()  # an incomplete recording is not used
    record(small_model, recorded_batches(2), IDS, tmp_path, "these photos")
    weight = next(small_model.branches.parameters())
    with torch.no_grad():
        weight.add_(1.0)
    try:
        with pytest.raises(AssertionError, match="ran again"):
            record(small_model, Forbidden(), IDS, tmp_path, "these photos")
    finally:
        with torch.no_grad():
            weight.sub_(1.0)


def test_a_full_disk_is_reported_before_recording(small_model, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(total=2000, used=1000, free=1000))
    with pytest.raises(EarlyExitError, match=r"recording 5 photos: 0.0 GiB needed, 0.0 GiB free; name another folder"):
        record(small_model, recorded_batches(2), IDS, tmp_path, "these photos")


def test_a_damaged_recording_is_recorded_again(small_model, tmp_path):
    record(small_model, recorded_batches(2), IDS, tmp_path, "these photos")
    (tmp_path / "recording.key").write_text("[]")
    assert len(record(small_model, recorded_batches(2), IDS, tmp_path, "these photos")) == len(SIZES)
    for name in ("labels.npy", "rest.pt"):
        (tmp_path / name).write_bytes(b"cut off")
        assert len(record(small_model, recorded_batches(2), IDS, tmp_path, "these photos")) == len(SIZES)


def test_detections_of_the_full_path_replace_labels(small_model, recording, tmp_path):
    """The targets are not used. Another score needs another recording."""

    def recorded(score):
        batches = recorded_batches(2)
        return record(small_model, batches, IDS, tmp_path / "pseudo", "these photos", min_score=score)

    score = max(float(found["scores"].max()) for found in recording.detections[-1].values()) - 1e-6
    pseudo = recorded(score)
    best = [max(pseudo.detections[-1][photo]["scores"].tolist()) >= score for photo in pseudo.image_ids]
    assert [bool(labels.any()) for labels in pseudo.labels] == best and 0 < sum(best) < len(SIZES)
    assert recorded(2.0).labels.max() == 0
