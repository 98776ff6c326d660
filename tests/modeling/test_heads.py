"""Heads: folded, cut, compact and factorised."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.ssdlite import SSDLiteClassificationHead

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling import Architecture, describe_exits, load_model, retrofit, save_model
from earlyexit_ssd.modeling.heads import (
    FactorisedPredictor,
    FoldedClassificationHead,
    competing_rows,
    cut_head,
    detects,
    find_competing_rows,
    num_outputs,
    plan_class_change,
    score_difference,
    slice_rows,
)
from earlyexit_ssd.modeling.trunk import norm_layer
from tests.modeling.conftest import SMALL, assert_equal, copy_state, small_model

SOURCE = ("person", "N/A", "chair", "couch")


def make_head():
    return SSDLiteClassificationHead([8, 4], [2, 3], 5, norm_layer).eval()


MAPS = [torch.randn(2, 8, 3, 3), torch.randn(2, 4, 1, 1)]


def test_folded_head_keeps_probabilities_and_names():
    head = make_head()
    before, names = head(MAPS).softmax(-1), list(head.state_dict())
    folded = FoldedClassificationHead(head, [3, 1])
    after = folded(MAPS).softmax(-1)
    assert num_outputs(folded) == 3 and list(folded.state_dict()) == names
    assert torch.allclose(after[..., 1:], before[..., [3, 1]], atol=1e-6)
    assert torch.allclose(after[..., 0], before[..., [0, 2, 4]].sum(-1), atol=1e-6)


def test_cut_head_is_a_copy_with_the_wanted_rows():
    folded = FoldedClassificationHead(make_head(), [3, 1])
    before = copy_state(folded)
    whole = super(FoldedClassificationHead, folded).forward(MAPS)
    cut = cut_head(folded)
    assert num_outputs(cut) == 3
    assert torch.allclose(cut(MAPS), whole[..., [0, 3, 1]], atol=1e-6)
    assert_equal(copy_state(folded), before)


def test_sliced_head_keeps_the_wanted_rows_and_a_new_class_has_new_weights():
    head = make_head()
    before = head(MAPS)
    change = plan_class_change(SOURCE, ("couch", "person", "lamp"))
    slice_rows(head, change.rows)
    assert num_outputs(head) == 4
    assert torch.allclose(head(MAPS)[..., :3], before[..., [0, 4, 1]], atol=1e-6)
    assert head.module_list[0][1].bias.view(2, 4)[:, 3].tolist() == [0, 0]
    assert str(change) == "kept the weights of couch, person; 1 other classes are no longer detected; new classes: lamp"


def test_classes_that_the_checkpoint_lacks_are_refused():
    with pytest.raises(EarlyExitError, match=r"has none of the classes chairs \(did you mean 'chair'\?\)"):
        plan_class_change(SOURCE, ("chairs",))


# Factorised predictors.


def convolution(weight, bias):
    """Return a 1x1 convolution with these weights."""
    weight = torch.tensor(weight)
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
    with torch.no_grad():
        layer.weight.copy_(weight[..., None, None])
        layer.bias.copy_(torch.tensor(bias))
    return layer


def test_approximation_keeps_the_largest_singular_values():
    predictor = FactorisedPredictor(3, 3, rank=2)
    predictor.approximate(convolution([[3.0, 0, 0], [0, 1, 0], [0, 0, 2]], [0.5, -1.0, 7.0]))
    output = predictor(torch.ones(1, 3, 1, 1)).flatten()
    assert torch.allclose(output, torch.tensor([3.5, -1.0, 9.0]), atol=1e-6)


def test_rank_above_the_matrix_s_is_accepted():
    layer, predictor = convolution([[1.0, 2.0]], [3.0]), FactorisedPredictor(2, 1, rank=4)
    predictor.approximate(layer)
    assert predictor(torch.ones(1, 2, 1, 1)).item() == pytest.approx(6.0)


def test_factorised_predictors_approximate_the_full_path_s():
    classes = tuple("abcdefghijklmnopqrst")
    model = small_model(classes=classes, head_rank=1000)
    assert not any(isinstance(module, FactorisedPredictor) for module in model.modules())
    model = small_model(classes=classes, head_rank=8)
    blocks = model.branches["exit8"].head.classification_head.module_list
    kinds = [isinstance(block[1], FactorisedPredictor) for block in blocks]
    assert kinds == [8 * (block[1].in_channels + 126) < 126 * block[1].in_channels for block in blocks]
    predictor = blocks[1][1]
    full = model.head.classification_head.module_list[1][1]
    assert isinstance(predictor, FactorisedPredictor)
    product, whole = predictor[1].weight.flatten(1) @ predictor[0].weight.flatten(1), full.weight.flatten(1)
    lost = torch.linalg.svdvals(whole)[8:].square().sum()
    assert torch.isclose((product - whole).square().sum(), lost, rtol=1e-3)
    assert torch.equal(predictor[1].bias, full.bias)
    outputs = model.eval().exit_outputs([torch.rand(3, 96, 96)])
    assert len({tuple(head["cls_logits"].shape) for head in outputs.heads}) == 1


# Compact heads.


FOUR = ("couch", "chair", "bench", "bed")
PROBABILITIES = torch.tensor([[0.1, 0.4, 0.2, 0.2, 0.1], [0.5, 0.05, 0.3, 0.05, 0.1]], dtype=torch.float64)
"""Probabilities of background and FOUR at two default boxes. Their sums: couch 0.45, bench 0.25, bed 0.2."""


@pytest.mark.parametrize(
    ("tolerance", "rows"),
    [(0.28, []), (0.26, [1]), (0.07, [1]), (0.069, [1, 3]), (0.03, [1, 3]), (0.02, [1, 3, 4]), (0.0, [1, 3, 4])],
)
def test_rows_that_compete_with_chair(tolerance, rows):
    """Without other rows the chair's scores rise by 0.4667 and 0.075, with couch by 0.0857 and 0.0529, with couch and
    bench by 0.0222 and 0.0333."""
    assert competing_rows(PROBABILITIES.log(), [2], tolerance) == rows


def test_box_counts_with_the_wanted_class_of_the_largest_rise():
    """Bed, which has 0.1, is dropped. So the couch's 0.4 and the chair's 0.3 are divided by 0.9."""
    expected = (0.4 / 0.9 - 0.4 + 0.3 / 0.9 - 0.3) / 2
    assert score_difference(PROBABILITIES, [2, 1], [3]) == pytest.approx(expected)
    assert competing_rows(PROBABILITIES.log(), [2, 1], expected + 1e-6) == [3]
    assert competing_rows(PROBABILITIES.log(), [1, 2, 3, 4], 0.0) == []


def test_box_counts_if_the_cut_head_would_detect():
    """In a head with background and chair alone, the chair has 0.0526 and 0.0476."""
    logits = torch.tensor([[[0.18, 0.72, 0.01, 0.05, 0.04], [0.2, 0.7, 0.01, 0.05, 0.04]]]).log()
    assert detects(logits, [2]).tolist() == [[True, False]]
    assert detects(logits, [2, 4]).tolist() == [[True, True]]


def even_detector():
    """Return a detector that predicts the first of PROBABILITIES at every default box of any photo."""
    detector = Architecture(**{**SMALL, "classes": FOUR}).build_detector()
    with torch.no_grad():
        for block in detector.head.classification_head.module_list:
            block[1].weight.zero_()
            block[1].bias.copy_(PROBABILITIES[0].log().repeat(6))
    return detector


def photos(*sizes: tuple[int, int]) -> list[Tensor]:
    return [torch.rand(3, *size) for size in sizes]


def test_competing_rows_are_found_on_photos(caplog):
    detector = even_detector().train()
    caplog.set_level("INFO")
    assert find_competing_rows(detector, [2], iter(photos((60, 80), (40, 40))), 0.05) == [1, 3]
    assert detector.training
    boxes = 2 * 6 * (6 * 6 + 3 * 3 + 2 * 2 + 3)
    assert f"with 2 competing classes a score differs by 0.0222 on average ({boxes} default boxes" in caplog.text


@pytest.mark.parametrize("count", [0, 1])
def test_photos_without_a_box_that_counts_are_refused(count):
    detector = even_detector()
    for block in detector.head.classification_head.module_list:
        block[1].bias.data.view(6, 5)[:, 0] = 9.0
    with pytest.raises(EarlyExitError, match=rf"none of {count} photos \(DATA.TRAIN\) shows"):
        find_competing_rows(detector, [2], photos((40, 40))[:count], 0.05)


@pytest.fixture
def weights(tmp_path):
    torch.save(even_detector().state_dict(), tmp_path / "detector.pth")
    return tmp_path / "detector.pth"


CHAIR = Architecture(**{**SMALL, "channels": 0, "classes": ("chair",)})


def compact(weights, tolerance=0.05, architecture=CHAIR):
    return retrofit(architecture, weights, FOUR, "compact", photos((50, 60)), tolerance)


def test_compact_head_has_the_competing_rows(weights, images):
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


def test_heads_of_branches_are_compact_too(weights, images):
    exits = describe_exits((4, 8, 12), empty=(4,))
    detector, architecture, _ = compact(weights, architecture=dataclasses.replace(CHAIR, exits=exits))
    model = architecture.add_exits(detector).eval()
    assert [head["cls_logits"].shape[-1] for head in model.exit_outputs(images).heads] == [2] * 4
    branches = [branch for branch in model.branches.values() if hasattr(branch, "head")]
    bias = model.head.classification_head.module_list[2][1].bias
    expected = torch.tensor([0.1, 0.2, 0.4, 0.2])  # background, chair, couch, bench
    assert torch.allclose(bias.view(6, 4)[0].exp(), expected)
    for branch in branches:
        head = branch.head.classification_head
        assert (head.num_columns, head.num_outputs, head.competing) == (4, 2, ("couch", "bench"))
        assert torch.equal(head.module_list[2][1].bias, bias)
    with torch.no_grad():
        bias += 1.0
    model.inherit()  # as after the baseline phase
    for branch in branches:
        assert torch.equal(branch.head.classification_head.module_list[2][1].bias, bias)


def test_competing_rows_are_trained(weights, images, targets):
    detector, architecture, _ = compact(weights)
    model = architecture.add_exits(detector).train()
    sum(model(images, [{**target, "labels": target["labels"].clamp(max=1)} for target in targets]).values()).backward()
    for part in (model, *model.branches.values()):
        gradient = part.head.classification_head.module_list[0][1].bias.grad.view(6, 4)
        assert (gradient.abs().sum(0) > 0).all()


def test_compact_model_is_saved_and_loaded(weights, tmp_path, images):
    detector, architecture, _ = compact(weights, architecture=dataclasses.replace(CHAIR, score_thresh={"chair": 0.1}))
    model = architecture.add_exits(detector).eval()
    assert Architecture.of(model) == architecture
    save_model(tmp_path / "model.pth", model)
    assert torch.load(tmp_path / "model.pth", weights_only=True)["architecture"]["competing"] == ["couch", "bench"]
    loaded, described, _ = load_model(tmp_path / "model.pth")
    assert described == architecture and loaded.score_thresh == {"chair": 0.1}
    assert_equal(loaded.exit_outputs(images).heads, model.exit_outputs(images).heads)
    detector, described, change = retrofit(architecture, tmp_path / "model.pth", fold="compact")
    assert (described, change) == (architecture, None)
    assert_equal(described.add_exits(detector).eval()(images), model(images))


def test_compact_without_unwanted_classes_is_exact_and_reads_no_photo(weights):
    photo = iter(photos((50, 60)))
    wanted = dataclasses.replace(CHAIR, classes=FOUR[::-1])
    exact, expected, _ = retrofit(wanted, weights, FOUR, "exact")
    detector, architecture, change = retrofit(wanted, weights, FOUR, "compact", photo)
    assert architecture == expected and architecture.folded_rows == (4, 3, 2, 1) and change.competing is None
    assert_equal(detector.state_dict(), exact.state_dict())
    assert len(list(photo)) == 1


def test_folds_of_the_given_architecture_are_ignored(weights):
    _, architecture, _ = compact(weights)
    _, exact, _ = retrofit(architecture, weights, FOUR, "exact")
    assert (exact.head_outputs, exact.folded_rows, exact.competing, exact.folded_branches) == (5, (2,), (), False)


def test_compact_without_competing_classes_is_rows(weights):
    detector, architecture, change = compact(weights, tolerance=1.0)
    _, expected, _ = retrofit(CHAIR, weights, FOUR, "rows")
    assert architecture == expected and detector.head.classification_head.num_columns == 2
    assert str(change) == "kept the weights of chair; 0 of 3 other classes compete and went into background"


@pytest.mark.parametrize(
    ("classes", "fold", "message"),
    [
        (("chair",), "compakt", r"fold \(MODEL.FOLD\) is 'compakt', .* \(did you mean 'compact'\?\)"),
        (("chair",), "compact", "needs photos to find competing classes; pass photos to retrofit"),
        (("chair", "lamp"), "compact", "'compact' cannot add classes .* set MODEL.FOLD to 'rows'"),
    ],
)
def test_impossible_folds_are_refused(weights, classes, fold, message):
    with pytest.raises(EarlyExitError, match=message):
        retrofit(dataclasses.replace(CHAIR, classes=classes), weights, FOUR, fold)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"competing": ("couch",)}, "competing has 1 names, expected none, or one for each of 0 head_outputs"),
        ({"head_outputs": 4, "folded_rows": (1,), "competing": ("couch",)}, "competing has 1 names, .* of 4 head_out"),
        ({"folded_branches": True}, "folded_branches is true without folded_rows"),
    ],
)
def test_contradictory_folds_are_refused(changes, message):
    with pytest.raises(EarlyExitError, match=message):
        dataclasses.replace(CHAIR, **changes)
