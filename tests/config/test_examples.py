"""The configurations and recipes that come with the project can be read."""

from pathlib import Path

import pytest

from earlyexit_ssd.config import load_config
from earlyexit_ssd.pipeline.recipes import read_recipes

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configuration(path):
    assert f"output/{path.stem}" == load_config(path).OUTPUT_DIR


@pytest.mark.parametrize("path", sorted((CONFIGS / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes(path):
    for name, keys in read_recipes(path).items():
        overrides = [text for key, value in keys.items() for text in (key, str(value))]
        assert load_config(CONFIGS / "voc_animals.yaml", overrides), name
