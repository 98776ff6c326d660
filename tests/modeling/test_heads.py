"""Heads: folded, cut, compact and factorised."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.ssdlite import SSDLiteClassificationHead

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling import COCO_CLASSES, Architecture, load_model, retrofit, save_model
from earlyexit_ssd.modeling.heads import (
    FactorisedPredictor,
    FoldedClassificationHead,
    competing_rows,
    cut_head,
    factorise,
    find_competing_rows,
    fires,
    num_outputs,
    plan_class_change,
    score_difference,
    slice_rows,
)
from earlyexit_ssd.modeling.trunk import norm_layer
from tests.modeling.conftest import SMALL, small_model

SOURCE = ("person", "N/A", "chair", "couch")


def make_head():
    return SSDLiteClassificationHead([8, 4], [2, 3], 5, norm_layer).eval()


MAPS = [torch.randn(2, 8, 3, 3), torch.randn(2, 4, 1, 1)]


def test_folded_probabilities_are_the_ones_of_before():
    head = make_head()
    before = head(MAPS).softmax(-1)
    folded = FoldedClassificationHead(head, [3, 1])
    after = folded(MAPS).softmax(-1)
    assert num_outputs(folded) == 3
    assert torch.allclose(after[..., 1:], before[..., [3, 1]], atol=1e-6)
    assert torch.allclose(after[..., 0], before[..., [0, 2, 4]].sum(-1), atol=1e-6)


def test_folded_head_keeps_the_names():
    head = make_head()
    assert list(FoldedClassificationHead(head, [3]).state_dict()) == list(head.state_dict())


def test_a_folded_head_is_cut_and_left_alone():
    folded = FoldedClassificationHead(make_head(), [3, 1])
    before = {key: value.clone() for key, value in folded.state_dict().items()}
    whole = super(FoldedClassificationHead, folded).forward(MAPS)
    cut = cut_head(folded)
    assert num_outputs(cut) == 3
    assert torch.allclose(cut(MAPS), whole[..., [0, 3, 1]], atol=1e-6)
    assert all(value.equal(before[key]) for key, value in folded.state_dict().items())


def test_sliced_rows_are_the_ones_of_before():
    head = make_head()
    before = head(MAPS)
    slice_rows(head, plan_class_change(SOURCE, ("couch", "person")).rows)
    assert torch.allclose(head(MAPS), before[..., [0, 4, 1]], atol=1e-6)
    assert num_outputs(head) == 3


def test_new_class_starts_afresh():
    head = make_head()
    before = head(MAPS)
    change = plan_class_change(SOURCE, ("chair", "lamp"))
    slice_rows(head, change.rows)
    after = head(MAPS)
    assert torch.allclose(after[..., :2], before[..., [0, 3]], atol=1e-6)
    assert head.module_list[0][1].bias.view(2, 3)[:, 2].tolist() == [0, 0]
    assert str(change) == ("kept the weights of chair; 2 other classes are no longer detected; new classes: lamp")


def test_no_class_in_common():
    with pytest.raises(EarlyExitError, match="has none of the classes chairs \\(did you mean 'chair'\\?\\)"):
        plan_class_change(SOURCE, ("chairs",))


# In two thin steps.


def convolution(weight, bias):
    """A 1x1 convolution with these weights."""
    weight = torch.tensor(weight)
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
    with torch.no_grad():
        layer.weight.copy_(weight[..., None, None])
        layer.bias.copy_(torch.tensor(bias))
    return layer


def test_of_a_diagonal_the_largest_values_stay():
    predictor = FactorisedPredictor(3, 3, rank=2)
    predictor.approximate(convolution([[3.0, 0, 0], [0, 1, 0], [0, 0, 2]], [0.5, -1.0, 7.0]))
    found = predictor(torch.ones(1, 3, 1, 1)).flatten()
    assert torch.allclose(found, torch.tensor([3.5, -1.0, 9.0]), atol=1e-6)


def test_a_matrix_of_that_rank_is_kept():
    torch.manual_seed(0)
    weight = torch.rand(8, 2) @ torch.rand(2, 5)
    layer, predictor = convolution(weight.tolist(), [0.1] * 8), FactorisedPredictor(5, 8, rank=2)
    predictor.approximate(layer)
    x = torch.rand(2, 5, 3, 3)
    assert torch.allclose(predictor(x), layer(x), atol=1e-5)


def test_more_rank_than_the_matrix_has_is_harmless():
    layer, predictor = convolution([[1.0, 2.0]], [3.0]), FactorisedPredictor(2, 1, rank=4)
    predictor.approximate(layer)
    assert predictor(torch.ones(1, 2, 1, 1)).item() == pytest.approx(6.0)


def test_only_predictors_that_get_cheaper_are_factorised():
    model = small_model(classes=tuple("abcdefghijklmnopqrst"))
    head = model.branches["exit8"].head.classification_head
    before = [block[1] for block in head.module_list]
    factorise(head, 8)
    for block, old in zip(head.module_list, before, strict=True):
        cheaper = 8 * (old.in_channels + old.out_channels) < old.in_channels * old.out_channels
        assert isinstance(block[1], FactorisedPredictor) == cheaper
    assert any(isinstance(block[1], FactorisedPredictor) for block in head.module_list)


def test_a_branch_s_predictors_start_from_the_full_path_s():
    classes = tuple("abcdefghijklmnopqrst")
    model = small_model(classes=classes, head_rank=1000)
    assert not any(isinstance(module, FactorisedPredictor) for module in model.modules())
    model = small_model(classes=classes, head_rank=8)
    mine = model.branches["exit8"].head.classification_head.module_list[1][1]
    theirs = model.head.classification_head.module_list[1][1]
    assert isinstance(mine, FactorisedPredictor)
    product = mine[1].weight.flatten(1) @ mine[0].weight.flatten(1)
    whole = theirs.weight.flatten(1)
    lost = torch.linalg.svdvals(whole)[8:].square().sum()
    assert torch.isclose((product - whole).square().sum(), lost, rtol=1e-3)
    assert torch.equal(mine[1].bias, theirs.bias)


def test_outputs_keep_their_shape():
    model = small_model(classes=tuple("abcdefghijklmnopqrst"), head_rank=8).eval()
    outputs = model.exit_outputs([torch.rand(3, 96, 96)])
    assert len({tuple(head["cls_logits"].shape) for head in outputs.heads}) == 1


FOUR = ("couch", "chair", "bench", "bed")
PROBABILITIES = torch.tensor([[0.1, 0.4, 0.2, 0.2, 0.1], [0.5, 0.05, 0.3, 0.05, 0.1]], dtype=torch.float64)
"""Of background and FOUR, at two default boxes; summed: couch 0.45, bench 0.25, bed 0.2."""


@pytest.mark.parametrize(
    ("tolerance", "rows"),
    [(0.28, []), (0.26, [1]), (0.07, [1]), (0.069, [1, 3]), (0.03, [1, 3]), (0.02, [1, 3, 4]), (0.0, [1, 3, 4])],
)
def test_rows_that_compete_with_chair(tolerance, rows):
    """Without them the chair's scores rise by 0.4667 and 0.075; with couch alone by 0.0857 and 0.0529; with bench too
    by 0.0222 and 0.0333."""
    assert competing_rows(PROBABILITIES.log(), [2], tolerance) == rows


def test_a_box_counts_with_the_wanted_class_that_rises_most():
    """Bed and its 0.1 go: the couch's 0.4 and the chair's 0.3 are divided by 0.9."""
    expected = (0.4 / 0.9 - 0.4 + 0.3 / 0.9 - 0.3) / 2
    assert score_difference(PROBABILITIES, [2, 1], [3]) == pytest.approx(expected)
    assert competing_rows(PROBABILITIES.log(), [2, 1], expected + 1e-6) == [3]
    assert competing_rows(PROBABILITIES.log(), [1, 2, 3, 4], 0.0) == []


def test_boxes_count_where_the_cut_head_would_fire():
    """Of background and chair alone the chair has 0.0526 and 0.0476, whatever else is there."""
    logits = torch.tensor([[[0.18, 0.72, 0.01, 0.05, 0.04], [0.2, 0.7, 0.01, 0.05, 0.04]]]).log()
    assert fires(logits, [2]).tolist() == [[True, False]]
    assert fires(logits, [2, 4]).tolist() == [[True, True]]


def even_detector():
    """Says the first of PROBABILITIES at every default box of any photo."""
    detector = Architecture(**{**SMALL, "classes": FOUR}).build_detector()
    with torch.no_grad():
        for block in detector.head.classification_head.module_list:
            block[1].weight.zero_()
            block[1].bias.copy_(PROBABILITIES[0].log().repeat(6))
    return detector


def photos(*sizes: tuple[int, int]) -> list[Tensor]:
    return [torch.rand(3, *size) for size in sizes]


def test_a_detector_finds_what_competes(caplog):
    detector = even_detector().train()
    caplog.set_level("INFO")
    assert find_competing_rows(detector, [2], iter(photos((60, 80), (40, 40))), 0.05) == [1, 3]
    assert detector.training
    boxes = 2 * 6 * (6 * 6 + 3 * 3 + 2 * 2 + 3)
    assert f"with 2 competing classes a score differs by 0.0222 on average ({boxes} default boxes" in caplog.text
    for shown in ([], photos((40, 40))):
        with torch.no_grad():
            detector.head.classification_head.module_list[0][1].bias[:] = 0
            for block in detector.head.classification_head.module_list:
                block[1].bias.view(6, 5)[:, 0] = 9.0
        with pytest.raises(EarlyExitError, match=rf"none of {len(shown)} photos \(DATA.TRAIN\) shows"):
            find_competing_rows(detector, [2], shown, 0.05)


@pytest.fixture
def weights(tmp_path):
    torch.save(even_detector().state_dict(), tmp_path / "detector.pth")
    return tmp_path / "detector.pth"


CHAIR = Architecture(**{**SMALL, "channels": 0, "classes": ("chair",)})


def compact(weights, tolerance=0.05, architecture=CHAIR):
    return retrofit(architecture, weights, FOUR, "compact", photos((50, 60)), tolerance)


def test_a_compact_head_has_the_competing_rows(weights, images):
    detector, architecture, change = compact(weights)
    assert (architecture.head_outputs, architecture.folded_rows) == (4, (1,))
    assert architecture.competing == ("couch", "bench") and architecture.folded_branches
    assert str(change) == (
        "kept the weights of chair; 2 of 3 other classes compete and went into background: couch, bench"
    )
    assert detector.head.classification_head.module_list[0][1].out_channels == 6 * 4
    model = architecture.add_exits(detector).eval()
    scores = model.exit_outputs(images[:1]).heads[-1]["cls_logits"].softmax(-1)
    assert torch.allclose(scores, torch.tensor([0.7, 0.2]) / 0.9, atol=1e-6)


def test_heads_of_branches_are_compact_alike(weights, images):
    detector, architecture, _ = compact(weights)
    model = architecture.add_exits(detector).eval()
    bias = model.head.classification_head.module_list[2][1].bias
    expected = torch.tensor([0.1, 0.2, 0.4, 0.2])  # background, chair, couch, bench
    assert torch.allclose(bias.view(6, 4)[0].exp(), expected)
    for branch in model.branches.values():
        head = branch.head.classification_head
        assert (head.num_columns, head.num_outputs, head.competing) == (4, 2, ("couch", "bench"))
        assert torch.equal(head.module_list[2][1].bias, bias)
    with torch.no_grad():
        bias += 1.0
    model.inherit()  # as after a baseline that has trained
    for branch in model.branches.values():
        assert torch.equal(branch.head.classification_head.module_list[2][1].bias, bias)


def test_competing_rows_learn(weights, images, targets):
    detector, architecture, _ = compact(weights)
    model = architecture.add_exits(detector).train()
    sum(model(images, [{**one, "labels": one["labels"].clamp(max=1)} for one in targets]).values()).backward()
    for part in (model, *model.branches.values()):
        gradient = part.head.classification_head.module_list[0][1].bias.grad.view(6, 4)
        assert (gradient.abs().sum(0) > 0).all()


def test_a_compact_model_in_a_file(weights, tmp_path, images):
    detector, architecture, _ = compact(weights, architecture=dataclasses.replace(CHAIR, score_thresh={"chair": 0.1}))
    model = architecture.add_exits(detector).eval()
    assert Architecture.of(model) == architecture
    save_model(tmp_path / "model.pth", model)
    assert torch.load(tmp_path / "model.pth", weights_only=True)["architecture"]["competing"] == ["couch", "bench"]
    again, read, _ = load_model(tmp_path / "model.pth")
    assert read == architecture and again.score_thresh == {"chair": 0.1}
    for one, other in zip(again.exit_outputs(images).heads, model.exit_outputs(images).heads, strict=True):
        assert torch.equal(one["cls_logits"], other["cls_logits"])
    found, described, change = retrofit(architecture, tmp_path / "model.pth", fold="compact")
    assert (described, change) == (architecture, None)
    assert torch.equal(described.add_exits(found).eval()(images)[0]["scores"], model(images)[0]["scores"])


def test_without_unwanted_classes_compact_is_exact(weights):
    def unread():
        raise AssertionError("no photo is needed")
        yield

    wanted = dataclasses.replace(CHAIR, classes=FOUR[::-1])
    exact, expected, _ = retrofit(wanted, weights, FOUR, "exact")
    found, described, change = retrofit(wanted, weights, FOUR, "compact", unread())
    assert described == expected and described.folded_rows == (4, 3, 2, 1) and change.competing is None
    assert all(torch.equal(value, exact.state_dict()[key]) for key, value in found.state_dict().items())


def test_the_head_that_was_asked_for_says_nothing_about_the_next(weights):
    """As where a gate holds a compact model against its whole checkpoint."""
    _, architecture, _ = compact(weights)
    _, again, _ = retrofit(architecture, weights, FOUR, "exact")
    assert (again.head_outputs, again.folded_rows, again.competing, again.folded_branches) == (5, (2,), (), False)


def test_where_nothing_competes_compact_is_rows(weights):
    detector, architecture, change = compact(weights, tolerance=1.0)
    _, expected, _ = retrofit(CHAIR, weights, FOUR, "rows")
    assert architecture == expected and detector.head.classification_head.num_columns == 2
    assert str(change) == "kept the weights of chair; 0 of 3 other classes compete and went into background"


def test_folds_that_cannot_be(weights):
    with pytest.raises(EarlyExitError, match=r"fold \(MODEL.FOLD\) is 'compakt', .* \(did you mean 'compact'\?\)"):
        retrofit(CHAIR, weights, FOUR, "compakt")
    with pytest.raises(EarlyExitError, match="needs photos to find competing classes; pass photos to retrofit"):
        retrofit(CHAIR, weights, FOUR, "compact")
    with pytest.raises(EarlyExitError, match="'compact' cannot add classes .* set MODEL.FOLD to 'rows'"):
        compact(weights, architecture=dataclasses.replace(CHAIR, classes=("chair", "lamp")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"competing": ("couch",)}, "competing has 1 names, expected none, or one for each of 0 head_outputs"),
        (
            {"head_outputs": 4, "folded_rows": (1,), "competing": ("couch",)},
            "competing has 1 names, .* of 4 head_outputs",
        ),
        ({"folded_branches": True}, "folded_branches is true without folded_rows"),
    ],
)
def test_descriptions_that_cannot_be(changes, message):
    with pytest.raises(EarlyExitError, match=message):
        dataclasses.replace(CHAIR, **changes)


@pytest.mark.shared
def test_what_competes_with_chairs_in_photos(shared_root):
    """A sofa is the likeliest to become a chair; twenty photos of furniture suffice to see it."""
    from torchvision.io import decode_image

    weights = shared_root / "weights" / "ssdlite320_mobilenet_v3_large_coco.pth"
    paths = sorted((shared_root / "data" / "furniture" / "calib").glob("*.jpg"))[:20]
    shown = (decode_image(str(path), "RGB") / 255 for path in paths)
    _, architecture, change = retrofit(Architecture(classes=("chair",)), weights, COCO_CLASSES, "compact", shown)
    assert change.competing[0] == "couch" and 2 <= len(change.competing) <= 30
    assert architecture.head_outputs == 2 + len(change.competing)
