import io

import pytest
import torch

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling import Architecture, load_model, save_model
from earlyexit_ssd.modeling.half import half_file, half_state
from earlyexit_ssd.modeling.retrofit import read_weights
from tests.modeling.conftest import SMALL, small_model


def test_values_shapes_and_order():
    state = {
        "a.weight": torch.tensor([[1.0, 1 + 2**-11], [-3.5, 1e-9]]),  # 1 + 2^-11 lies between two numbers of fp16
        "a.num_batches_tracked": torch.tensor(70000),
        "b.running_var": torch.tensor([1e-30, 22.5]),
    }
    half = half_state(state)
    assert list(half) == list(state)
    assert half["a.weight"].dtype == torch.float16
    assert half["a.weight"].tolist() == [[1.0, 1.0], [-3.5, 0.0]]
    assert half["b.running_var"].tolist() == [0.0, 22.5]
    assert half["a.num_batches_tracked"].dtype == torch.int64
    assert half["a.num_batches_tracked"].shape == ()
    assert half["a.num_batches_tracked"].item() == 70000
    assert half["a.weight"].untyped_storage().data_ptr() == half["b.running_var"].untyped_storage().data_ptr()


@pytest.mark.parametrize("value", [70000.0, float("nan"), float("-inf")])
def test_what_fp16_cannot_hold_is_refused(value):
    with pytest.raises(EarlyExitError, match=r"^head\.bias: a value that fp16 cannot hold"):
        half_state({"fine": torch.ones(2), "head.bias": torch.tensor([0.0, value])})


def test_the_file_loads_as_fp32_and_repeats_its_bytes(tmp_path):
    model = small_model()
    save_model(tmp_path / "model.pth", model, Architecture(**SMALL), {"phase": "exits"})
    content = half_file(read_weights(tmp_path / "model.pth"))
    assert content == half_file(read_weights(tmp_path / "model.pth"))
    assert len(content) < 0.55 * (tmp_path / "model.pth").stat().st_size
    (tmp_path / "half.pth").write_bytes(content)
    again, architecture, info = load_model(tmp_path / "half.pth")
    assert (architecture, info) == (Architecture(**SMALL), {"phase": "exits"})
    expected, found = model.state_dict(), again.state_dict()
    assert all(found[key].dtype == value.dtype for key, value in expected.items())
    assert all(torch.equal(found[key], value.half().to(value.dtype)) for key, value in expected.items())


def test_nothing_in_the_file_needs_unpickling():
    content = {"format": "earlyexit_ssd/1", "architecture": {}, "info": {}, "model": small_model().state_dict()}
    assert set(torch.load(io.BytesIO(half_file(content)), weights_only=True)) == set(content)
