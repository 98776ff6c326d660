"""A full path that learns smaller inputs from the detector at its own size."""

from __future__ import annotations

import pytest
import torch

from earlyexit_ssd.modeling import Architecture, LossSettings
from earlyexit_ssd.pipeline.fine_tuning import TaughtFullPath

OWN = 128


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return Architecture(("chair",), image_size=OWN, width=0.35, exits=()).build()


@pytest.fixture
def batch():
    images = [torch.rand(3, 100, 120, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    targets = [
        {"boxes": torch.tensor([[10.0, 10.0, 70.0, 80.0]]), "labels": torch.tensor([1]), "image_id": number}
        for number in (3, 4)
    ]
    return images, targets


def losses_of(detector, sides, labelled=False):
    student = TaughtFullPath(detector.train(), detector, sides, labelled)
    detector.norm_frozen = True
    detector.train()
    detector.losses = LossSettings(distillation_weight=1.0)
    return student


def test_a_student_that_is_its_teacher_has_nothing_to_learn_at_its_own_size(detector, batch):
    losses = losses_of(detector, ())(*batch)
    assert losses.keys() == {"distillation"}
    assert losses["distillation"].item() == pytest.approx(0, abs=1e-4)


def test_at_a_smaller_side_it_has(detector, batch):
    assert losses_of(detector, (96,))(*batch)["distillation"].item() > 1e-3


def test_labels_teach_beside_the_teacher(detector, batch):
    losses = losses_of(detector, (96,), labelled=True)(*batch)
    assert losses.keys() == {"distillation", "bbox_regression", "classification"}


def test_a_default_box_learns_from_the_nearest_one_of_the_teacher(detector, batch):
    student = losses_of(detector, (96,))
    computed = student.compute(*batch)
    taught = student._teach(computed)
    boxes, own = computed.anchors[0] / 96, detector.default_boxes(computed.images)[0] / OWN
    with torch.no_grad():
        head = detector.head(detector.trunk_maps(computed.images.tensors)[1])
    for index in (0, 7, len(boxes) - 1):
        x1, y1, x2, y2 = boxes[index].tolist()
        overlaps = []
        for a1, b1, a2, b2 in own.tolist():
            common = max(0.0, min(x2, a2) - max(x1, a1)) * max(0.0, min(y2, b2) - max(y1, b1))
            overlaps.append(common / ((x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - common))
        best = int(torch.tensor(overlaps).argmax())
        torch.testing.assert_close(taught["cls_logits"][:, index], head["cls_logits"][:, best])
        # what both describe is the same box of the photo
        mine = detector.box_coder.decode_single(
            taught["bbox_regression"][0, index : index + 1], boxes[index : index + 1]
        )
        theirs = detector.box_coder.decode_single(head["bbox_regression"][0, best : best + 1], own[best : best + 1])
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
