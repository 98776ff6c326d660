"""Try a risk certificate on many random splits of the calibration and test photos."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.evaluation.resplits import check_certificates
from earlyexit_ssd.files import locks_folder, write_json
from earlyexit_ssd.pipeline.build import trained_temperatures
from earlyexit_ssd.pipeline.calibrate import Target
from earlyexit_ssd.pipeline.cost_model import CostModel, measure_cost_model
from earlyexit_ssd.pipeline.fit_router import fit_policy, require_deciding
from earlyexit_ssd.pipeline.replay import Replay, open_recorded
from earlyexit_ssd.routing.certify import safe_to_bold
from earlyexit_ssd.routing.policies import require_known


@locks_folder("out_dir")
def check_guarantee(
    cfg: CfgNode,
    weights: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    epsilons: Sequence[float] = (0.01, 0.02, 0.05),
    delta: float = 0.05,
    splits: int = 1000,
) -> dict[str, Any]:
    """Pool DATA.CALIB and DATA.TEST, split them at random as often as asked, certify on one part, measure on the other.

    The path of thresholds and a fitted policy come from DATA.TRAIN, the temperatures from the training.

    Returns:
        what is in guarantee.json: ``context`` and, per epsilon, a `Resplits` as a dict.

    Raises:
        EarlyExitError: unusable weights, data or settings, or splits that share photos.
    """
    if splits < 1:
        raise EarlyExitError(f"splits is {splits}, expected at least 1")
    for epsilon in epsilons:
        Target("risk", epsilon, delta)  # raises where they are impossible
    require_known(cfg.ROUTING.POLICY)
    measured = ("CALIB", "TEST") if cfg.CALIBRATION.REFERENCE == "labels" else ("CALIB",)
    recorded = open_recorded(cfg, weights, Path(out_dir), measured)
    cfg, model, reference = recorded.cfg, recorded.model, cfg.CALIBRATION.REFERENCE
    require_deciding(cfg.ROUTING.POLICY, model, weights)
    calib, test, train = (recorded.replay(name) for name in ("CALIB", "TEST", "TRAIN"))
    temperatures = trained_temperatures(cfg, recorded.info, model.num_early_exits)
    router = fit_policy(cfg, cfg.ROUTING.POLICY, temperatures, train)
    costs = measure_cost_model(cfg, model, router)
    path = safe_to_bold(train.confidences(router), train.losses(reference), costs.of_each)
    confidences = [
        np.concatenate(pair) for pair in zip(calib.confidences(router), test.confidences(router), strict=True)
    ]
    losses = np.concatenate([calib.losses(reference), test.losses(reference)])
    how = {"calibration": len(calib.recording), "delta": delta, "bound": cfg.CALIBRATION.BOUND, "splits": splits}
    found = [
        check_certificates(
            path, confidences, losses, costs.of_each(path), costs.plain, epsilon=epsilon, seed=cfg.SEED, **how
        )
        for epsilon in epsilons
    ]
    results = {
        "context": _context(cfg, calib, len(losses), costs),
        "resplits": [asdict(one) for one in found],
    }
    write_json(Path(out_dir) / "guarantee.json", results)
    return results


def _context(cfg: CfgNode, calib: Replay, photos: int, costs: CostModel) -> dict[str, Any]:
    return {
        "policy": cfg.ROUTING.POLICY,
        "bound": cfg.CALIBRATION.BOUND,
        "reference": cfg.CALIBRATION.REFERENCE,
        "photos": photos,
        "calibration_photos": len(calib.recording),
        "seed": cfg.SEED,
        "cost_model": costs.to_dict(),
    }
