from pathlib import Path

import pytest

from earlyexit_ssd.config import load_config
from earlyexit_ssd.pipeline.plan import ALL_LAYERS, plan_exits

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize("name", ["voc_animals", "chair_stream"])
def test_any_configuration_can_be_planned(name, tmp_path):
    """Settings for its own exits, one for each, or empty ones, say nothing about those that are looked at."""
    small = ["JOINT.EXIT_WEIGHTS", "[0.5, 1.0]"] if name == "voc_animals" else []
    small += ["MODEL.WEIGHTS", "", "MODEL.IMAGE_SIZE", "64", "MODEL.WIDTH", "0.25", "EVAL.TIMING_RUNS", "1"]
    cfg = load_config(CONFIGS / f"{name}.yaml", small)
    plan = plan_exits(cfg, tmp_path, layers=ALL_LAYERS[:3])
    assert [row["layer"] for row in plan["placements"]] == [1, 2, 3]
    assert all(row["mmacs"] > 0 for row in plan["placements"])
