"""Labels by name."""

import pytest
import torch
from torch import nn

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.evaluation.wanted_classes import WantedClasses


class Says(nn.Module):
    """The same labels for every photo."""

    def __init__(self, *labels):
        super().__init__()
        self.labels = torch.tensor(labels)

    def forward(self, photos):
        count = len(self.labels)
        found = {"boxes": torch.arange(4.0 * count).view(count, 4), "scores": torch.linspace(1, 0.1, count)}
        return [{**found, "labels": self.labels} for _ in photos]


def test_labels_are_the_wanted_ones_and_others_are_dropped():
    detector = WantedClasses(Says(3, 1, 2, 3), ("person", "tv", "Sofa"), ("couch", "person"), "rival")
    first, second = detector([torch.zeros(3, 8, 8)] * 2)
    assert first["labels"].tolist() == second["labels"].tolist() == [1, 2, 1]
    assert first["boxes"][:, 0].tolist() == [0, 4, 12]
    assert first["scores"].tolist() == pytest.approx([1.0, 0.7, 0.1])


def test_a_class_that_it_lacks_is_named(caplog):
    WantedClasses(Says(1), ("person",), ("person", "lamp"), "rival")
    assert "rival knows no lamp" in caplog.text


def test_no_class_in_common():
    with pytest.raises(EarlyExitError, match=r"rival: knows none of chiar, lamp \(did you mean 'chair'\?\)"):
        WantedClasses(Says(1), ("chair",), ("chiar", "lamp"), "rival")
