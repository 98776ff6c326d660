from tests.modeling.conftest import small_model


def test_only_the_first_map_is_narrow():
    model = small_model(channels=16)
    found = [block[1].in_channels for block in model.branches["exit8"].head.classification_head.module_list]
    full = [block[1].in_channels for block in model.head.classification_head.module_list]
    assert found == [16, *full[1:]]
