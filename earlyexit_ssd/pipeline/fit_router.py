"""What calibration fits before it searches thresholds: temperatures, and the parameters of a policy that has some."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.modeling.outputs import ExitSignals
from earlyexit_ssd.pipeline.replay import Replay
from earlyexit_ssd.routing import ExitRouter
from earlyexit_ssd.routing.learned_gain import GainModel, fit_gain, to_plain
from earlyexit_ssd.routing.temperature import (
    FittedTemperature,
    contested_boxes,
    fit_temperature,
    reliability,
    stopped_by,
)

logger = logging.getLogger(__name__)


def fit_temperatures(cfg: CfgNode, exit_names: Sequence[str], calib: Replay) -> list[FittedTemperature]:
    """Of every early exit, by likelihood on ``calib``; one that its bounds stop is a warning."""
    bounds, found = cfg.ROUTING.TEMPERATURE_BOUNDS, []
    for index in range(calib.recording.early_exits):
        logits, labels = contested_boxes(calib.logits_and_labels(index))
        temperature = fit_temperature(logits, labels, bounds)
        bound = stopped_by(temperature, bounds)
        if bound is not None:
            logger.warning(
                "temperature of %s is at its bound %g: its probabilities are off by more than a temperature can mend",
                exit_names[index],
                bound,
            )
        before, after = reliability(logits, labels, 1.0), reliability(logits, labels, temperature)
        found.append(FittedTemperature(exit_names[index], temperature, before, after))
    return found


def fit_policy(cfg: CfgNode, policy: str, temperatures: Sequence[float], train: Replay | None) -> ExitRouter:
    """A router with this policy, fitted on ``train`` where it has parameters, and every exit closed."""
    parameters = None
    if policy == "learned_gain":
        parameters = fit_learned_gain(train, cfg.CALIBRATION.REFERENCE, temperatures, cfg.SEED)
    return ExitRouter(
        len(temperatures),
        policy=policy,
        parameters=parameters,
        thresholds=CLOSED,
        temperatures=temperatures,
        temperature_bounds=cfg.ROUTING.TEMPERATURE_BOUNDS,
    )


def fit_learned_gain(train: Replay, reference: str, temperatures: Sequence[float], seed: int) -> list[dict[str, list]]:
    """Per early exit the parameters of a model that predicts a photo's loss if it leaves there, in deviations."""
    losses = torch.from_numpy(train.losses(reference)).float()
    fitted = []
    for index in range(train.recording.early_exits):
        gain = losses[:, index] - losses[:, -1]
        inputs = _inputs(train, index, temperatures)[torch.from_numpy(train.order)]
        fitted.append(to_plain(fit_gain(inputs, gain / gain.std(unbiased=False).clamp(min=1e-6), seed=seed)))
    return fitted


def _inputs(train: Replay, index: int, temperatures: Sequence[float]) -> Tensor:
    """What the model of exit ``index`` sees of every photo, in the order of the recording."""
    model = GainModel(train.recording.taps[index].shape[1] // 2)
    rows = []
    for signals in train.recording.signals(index):
        previous = None if signals.previous is None else signals.previous / temperatures[index - 1]
        rows.append(model.inputs(ExitSignals(signals.logits / temperatures[index], previous, signals.tap)))
    return torch.cat(rows)
