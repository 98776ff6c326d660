"""Names of the package come when they are asked for; torchvision finds the builders all the same."""

import subprocess
import sys

import pytest

import earlyexit_ssd

LATER = """
import sys
import earlyexit_ssd
assert not {"torch", "torchvision", "numpy"} & set(sys.modules)
import torchvision
print(torchvision.models.get_model_builder("earlyexit_ssdlite320_mobilenet_v3_large").__name__)
"""


def test_every_public_name_is_there():
    for name in earlyexit_ssd.__all__:
        assert getattr(earlyexit_ssd, name) is not None and name in dir(earlyexit_ssd)
    with pytest.raises(AttributeError, match="has no attribute 'ExitRooter'"):
        _ = earlyexit_ssd.ExitRooter


def test_torchvision_finds_the_builders_though_it_is_imported_later():
    result = subprocess.run([sys.executable, "-c", LATER], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "earlyexit_ssdlite320_mobilenet_v3_large"


def test_a_file_s_routing_is_read_where_nothing_but_modeling_was_imported():
    code = "from earlyexit_ssd.modeling import EarlyExitSSDLite as M; print(M.from_pretrained('chair').router.policy)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "max_foreground", result.stderr
