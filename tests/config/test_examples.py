"""The configurations of the project are valid."""

from pathlib import Path

import pytest

from earlyexit_ssd.config import load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configuration(path):
    assert f"output/{path.stem}" == load_config(path).OUTPUT_DIR
