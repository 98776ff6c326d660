import torch

from earlyexit_ssd import ExitRouter
from earlyexit_ssd.modeling.criterion import early_exit_losses
from earlyexit_ssd.modeling.losses import LossSettings
from earlyexit_ssd.modeling.matching import Assignment


def heads(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "cls_logits": torch.randn(2, 5, 3, generator=generator).requires_grad_(),
            "bbox_regression": torch.randn(2, 5, 4, generator=generator).requires_grad_(),
        }
        for _ in range(count)
    ]


def labelled(*rows):
    labels = torch.tensor(rows)
    return Assignment(labels, torch.zeros(*labels.shape, 4))


def test_a_teacher_alone_does_not_look_at_labels():
    settings = LossSettings(supervision="teacher", teacher="full")
    router = ExitRouter(1, learn_temperatures=True)
    found = [
        early_exit_losses({0: "exit8"}, heads(2), assignment, settings, router)
        for assignment in (labelled([0] * 5, [0] * 5), labelled([1] * 5, [2, 0, 0, 1, 1]))
    ]
    assert list(found[0]) == ["exit8_distillation", "exit8_temperature"]
    assert found[0] == found[1]


def test_the_next_exit_as_teacher_is_one_that_has_a_branch():
    """The second of three exits is empty: the first learns from the third, and that from the full path."""
    settings = LossSettings(supervision="teacher", teacher="next")
    exits = heads(4)
    losses = early_exit_losses({0: "exit6", 2: "exit12"}, exits, labelled([0] * 5, [0] * 5), settings)
    direct = LossSettings(supervision="teacher", teacher="full")
    for name, student, teacher in (("exit6", 0, 2), ("exit12", 2, 3)):
        expected = early_exit_losses({0: name}, [exits[student], exits[teacher]], labelled([0] * 5, [0] * 5), direct)
        assert torch.equal(losses[f"{name}_distillation"], expected[f"{name}_distillation"])


def test_what_a_teacher_sees_on_an_unlabelled_photo_is_learnt():
    """With labels, the same photo would count as empty and push its objects down."""
    full = {"cls_logits": torch.tensor([[[0.0, 4.0]]]), "bbox_regression": torch.zeros(1, 1, 4)}
    student = {"cls_logits": torch.zeros(1, 1, 2, requires_grad=True), "bbox_regression": torch.zeros(1, 1, 4)}
    settings = LossSettings(supervision="teacher", teacher="full")
    losses = early_exit_losses({0: "exit8"}, [student, full], labelled([0]), settings)
    sum(losses.values()).backward()
    assert student["cls_logits"].grad[0, 0, 1] < 0
