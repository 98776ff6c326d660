"""Public names are imported on first use, and torchvision knows the builders."""

import subprocess
import sys

import pytest

import earlyexit_ssd

IMPORT_TORCHVISION_LATER = """
import sys
import earlyexit_ssd
assert not {"torch", "torchvision", "numpy"} & set(sys.modules)
import torchvision
print(torchvision.models.get_model_builder("earlyexit_ssdlite320_mobilenet_v3_large").__name__)
"""


def test_every_public_name_exists():
    for name in earlyexit_ssd.__all__:
        assert getattr(earlyexit_ssd, name) is not None and name in dir(earlyexit_ssd)
    with pytest.raises(AttributeError, match="has no attribute 'ExitRooter'"):
        _ = earlyexit_ssd.ExitRooter


def test_builders_are_registered_if_torchvision_is_imported_later():
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_TORCHVISION_LATER], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "earlyexit_ssdlite320_mobilenet_v3_large"


def test_routing_of_a_model_file_loads_with_modeling_alone():
    code = "from earlyexit_ssd.modeling import EarlyExitSSDLite as M; print(M.from_pretrained('chair').router.policy)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "max_foreground", result.stderr
