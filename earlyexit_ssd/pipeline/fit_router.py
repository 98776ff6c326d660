"""What calibration fits before it searches thresholds: temperatures, and the parameters of a policy that has some."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling import EarlyExitSSDLite
from earlyexit_ssd.modeling.outputs import ExitSignals
from earlyexit_ssd.pipeline.replay import Replay
from earlyexit_ssd.routing import ExitRouter
from earlyexit_ssd.routing.balanced_ambiguity import class_weights
from earlyexit_ssd.routing.foreseen import ForeseenEmptiness, evidence, fit_foresight
from earlyexit_ssd.routing.learned_gain import GainModel, LearnedGain, fit_gain, to_plain
from earlyexit_ssd.routing.policies import FITTED_POLICIES, foresees, looked_at
from earlyexit_ssd.routing.temperature import (
    FittedTemperature,
    contested_boxes,
    fit_temperature,
    reliability,
    stopped_by,
)

logger = logging.getLogger(__name__)


def fit_temperatures(cfg: CfgNode, exit_names: Sequence[str], calib: Replay) -> list[FittedTemperature]:
    """Of every early exit with a branch, by likelihood on ``calib``; one that its bounds stop is a warning."""
    bounds, found = cfg.ROUTING.TEMPERATURE_BOUNDS, []
    for index in range(calib.recording.early_exits):
        if calib.recording.empty[index]:
            continue
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


def per_exit(fitted: Sequence[FittedTemperature], exit_names: Sequence[str]) -> list[float]:
    """The temperature of every early exit; 1 where it has none."""
    found = {one.exit_name: one.temperature for one in fitted}
    return [found.get(name, 1.0) for name in exit_names[:-1]]


def fit_policy(
    cfg: CfgNode, policy: str, temperatures: Sequence[float], train: Replay | None, counted: Replay | None = None
) -> ExitRouter:
    """A router with this policy, fitted where it has parameters, and every exit closed.

    Args:
        train: what a policy learns from.
        counted: whose labels say how rare a class is; by default ``train``. Calibration photos are the nearest to
            those to come, but may not both choose a policy and test its risk.
    """
    fits = {
        "learned_gain": lambda: fit_learned_gain(train, cfg.CALIBRATION.REFERENCE, temperatures, cfg.SEED),
        "foreseen_emptiness": lambda: fit_foreseen_emptiness(train, temperatures),
        "balanced_ambiguity": lambda: fit_class_weights(train if counted is None else counted),
    }
    parameters = fits[policy]() if policy in FITTED_POLICIES else None
    return ExitRouter(
        len(temperatures),
        policy=policy,
        parameters=parameters,
        thresholds=CLOSED,
        temperatures=temperatures,
        temperature_bounds=cfg.ROUTING.TEMPERATURE_BOUNDS,
    )


def learns(policy: str) -> bool:
    """Whether it is fitted on training photos; one that only counts labels takes those of any photos."""
    return policy in FITTED_POLICIES and not getattr(FITTED_POLICIES[policy], "only_counts", False)


def require_deciding(policy: str, model: EarlyExitSSDLite, weights: str | os.PathLike[str]) -> None:
    """Raise where the policy lets nobody leave: every exit is empty, and it looks at what exits say."""
    if all(model.empty) and not foresees(policy):
        raise EarlyExitError(
            f"policy '{policy}' looks at logits, which the empty exits of {weights} have not; "
            "take foreseen_emptiness or learned_gain (ROUTING.POLICY)"
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


def fit_foreseen_emptiness(train: Replay, temperatures: Sequence[float]) -> list[dict[str, list | float]]:
    """Per early exit the regression of the full path's largest score; no label is looked at."""
    found, image_ids = train.recording.detections[-1], train.recording.image_ids
    boxes = ForeseenEmptiness.boxes
    largest = torch.tensor([max(found[image_id]["scores"].tolist(), default=0.0) for image_id in image_ids])
    return [
        fit_foresight(torch.cat([evidence(signals) for signals in _shown(train, index, temperatures, boxes)]), largest)
        for index in range(train.recording.early_exits)
    ]


def fit_class_weights(counted: Replay) -> list[float]:
    """A weight for every class, the more the fewer objects of it the photos show; crowds do not count.

    Raises:
        EarlyExitError: the photos show none, or have no labels.
    """
    truth = counted.ground_truth
    objects = Counter(one["category_id"] for one in truth.anns.values() if not one["iscrowd"])
    if not objects:
        raise EarlyExitError(
            "policy 'balanced_ambiguity' counts objects, and the photos have no labelled one; give labels (of "
            "DATA.TRAIN for a risk, else of DATA.CALIB), or take ambiguous_mass (ROUTING.POLICY)"
        )
    return class_weights([objects[category] for category in sorted(truth.getCatIds())])


def _inputs(train: Replay, index: int, temperatures: Sequence[float]) -> Tensor:
    """What the model of exit ``index`` sees of every photo, in the order of the recording."""
    model = GainModel(train.recording.taps[index].shape[1] // 2)
    return torch.cat([model.inputs(signals) for signals in _shown(train, index, temperatures, LearnedGain.boxes)])


def _shown(train: Replay, index: int, temperatures: Sequence[float], boxes: int) -> Iterator[ExitSignals]:
    """The signals of an exit as a policy sees them that looks at so many ``boxes``."""
    for signals in train.recording.signals(index):
        seen = looked_at(signals, boxes)
        yield ExitSignals(seen.logits / temperatures[index], seen.tap, seen.empty)
