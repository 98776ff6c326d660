import pytest

from tests.modeling.conftest import small_model


@pytest.mark.parametrize(("layer", "expansion"), [(4, 3), (8, 3), (10, 3), (11, 2), (12, 1), (14, 1), (15, 1)])
def test_a_longer_short_cut_is_wider(layer, expansion):
    branch = small_model(exit_layers=(layer,)).branches[f"exit{layer}"]
    depthwise = next(module for module in branch.short_cut.block.modules() if getattr(module, "groups", 1) > 1)
    assert depthwise.in_channels == expansion * branch.fine[0].in_channels


def test_only_the_first_map_is_narrow():
    model = small_model(channels=16)
    found = [block[1].in_channels for block in model.branches["exit8"].head.classification_head.module_list]
    full = [block[1].in_channels for block in model.head.classification_head.module_list]
    assert found == [16, *full[1:]]


def test_context_comes_from_the_exit_before():
    model = small_model(exit_layers=(6, 8, 12))
    assert [branch.context is None for branch in model.branches.values()] == [True, False, False]
