"""Gather what the report page of a job shows. The results are on disk by then, so nothing here may end a run."""

from __future__ import annotations

import itertools
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode

from earlyexit_ssd.calibration.certificate import Certificate
from earlyexit_ssd.calibration.thresholds import FittedTemperature
from earlyexit_ssd.config import CLOSED, PHASE_SECTIONS
from earlyexit_ssd.data import DetectionDataset
from earlyexit_ssd.engine import read_log
from earlyexit_ssd.evaluation.cost import mmacs_of_path
from earlyexit_ssd.evaluation.evaluate import Evaluation
from earlyexit_ssd.evaluation.matches import ExitMatches
from earlyexit_ssd.evaluation.outputs import Collected
from earlyexit_ssd.evaluation.results import Results
from earlyexit_ssd.modeling import EarlyExitSSDLite
from earlyexit_ssd.plain import read_json
from earlyexit_ssd.report.page import (
    Section,
    calibration_page,
    evaluation_page,
    never_failing,
    training_page,
    training_section,
    write_page,
)
from earlyexit_ssd.report.page_photos import Attention, OpenCosts, PagePhotos, attention_pictures, by_gain
from earlyexit_ssd.routing import ExitRouter

ATTENTION_PHOTOS = 6  # photos with attention maps: the first of the gallery
MOST_OPEN_SETS = 8  # sets of open exits whose operations are counted; with more, only the evaluated one is known
NAME = "report.html"


def write_evaluation_page(
    folder: Path,
    cfg: CfgNode,
    weights: Any,
    model: EarlyExitSSDLite,
    router: ExitRouter,
    dataset: DetectionDataset,
    collected: Collected,
    evaluation: Evaluation,
    results: Results,
) -> None:
    """Write report.html of an evaluation into ``folder``; of a training too, if it is the folder of one."""
    with never_failing(folder / NAME):
        order = np.argsort(collected.image_ids, kind="stable")
        photos = PagePhotos(
            ground_truth=evaluation.ground_truth,
            detections=collected.detections,
            matches=evaluation.matches,
            exit_names=model.exit_names,
            confidences=np.array([one.numpy()[order] for one in collected.confidences[:-1]]),
            thresholds=router.thresholds.tolist(),
            costs=_open_costs(model, router, results),
            plain_mmacs=results.without_exits.mmacs,
            plain_ms=results.without_exits.ms,
            score=results.context.score,
            labelled=results.context.labelled,
            attention=_attention(model, dataset, evaluation.matches, results.context.score),
        )
        training, _ = read_training(folder, cfg.ROUTING.TEMPERATURE_BOUNDS)
        calibration = {"the calibration": f"calibration/{NAME}"} if (folder / "calibration" / NAME).is_file() else {}
        page = evaluation_page(
            results,
            photos=photos,
            sections=(training,) if training else (),
            command=calibrate_command(sys.argv, weights),
            links=calibration,
        )
        write_page(folder / NAME, page)


def write_calibration_page(
    folder: Path,
    weights: Any,
    recorded: Any,
    search: Any,
    curve: Sequence[Any],
    certificate: Certificate,
    temperatures: Sequence[FittedTemperature],
) -> None:
    """Write report.html of a calibration into ``folder``; arguments as `earlyexit_ssd.pipeline.calibrate` has them."""
    with never_failing(folder / NAME):
        model, calib, costs = recorded.model, search.calib, search.costs
        photos = PagePhotos(
            ground_truth=calib.ground_truth,
            detections=calib.recording.detections,
            matches=calib.matches,
            exit_names=model.exit_names,
            confidences=np.array(search.confidences),
            thresholds=certificate.router["thresholds"],
            costs=[
                OpenCosts(opened, **{costs.unit: costs.per_exit([0.0 if one else CLOSED for one in opened]).tolist()})
                for opened in itertools.product((True, False), repeat=model.num_early_exits)
            ],
            **{f"plain_{unit}": costs.plain if unit == costs.unit else None for unit in ("mmacs", "ms")},
            score=calib.score,
            labelled=calib.labelled,
            chosen_here=True,
            attention=_attention(model, recorded.sets["CALIB"], calib.matches, calib.score),
        )
        command = calibrate_command(sys.argv, weights)
        write_page(folder / NAME, calibration_page(certificate, temperatures, curve, photos, command))


def write_training_page(folder: Path, cfg: CfgNode) -> None:
    """Write report.html of a training that is not evaluated yet into its ``folder``."""
    with never_failing(folder / NAME):
        section, gates = read_training(folder, cfg.ROUTING.TEMPERATURE_BOUNDS)
        if section is not None:
            write_page(folder / NAME, training_page(section, gates, ", ".join(cfg.DATA.TRAIN)))


def read_training(folder: Path, bounds: Sequence[float]) -> tuple[Section | None, list[dict[str, Any]]]:
    """The section of a run's logs and gates, and the gates; None and no gate if ``folder`` is not a run's."""
    files = [path for name in PHASE_SECTIONS if (path := folder / name / "gate.json").is_file()]
    gates = [read_json(path, "gate of a phase", "delete it") for path in files]
    logs = {name: read_log(folder / name) for name in PHASE_SECTIONS}
    return (training_section(logs, gates, bounds) if gates or any(logs.values()) else None), gates


def _open_costs(model: EarlyExitSSDLite, router: ExitRouter, results: Results) -> list[OpenCosts]:
    """MMACs of every set of open exits; milliseconds of the evaluated set, the only one that was timed."""
    own = tuple(value < CLOSED for value in router.thresholds.tolist())
    known = {own[:index]: one.mmacs for index, one in enumerate(results.exits)}  # of the exit behind these early ones
    found = [OpenCosts(own, [one.mmacs for one in results.exits], [one.ms for one in results.exits])]
    others = [one for one in itertools.product((True, False), repeat=len(own)) if one != own]
    for opened in others if len(others) < MOST_OPEN_SETS else ():
        thresholds = [0.0 if one else CLOSED for one in opened]
        other = ExitRouter(**{**router.to_dict(), "thresholds": thresholds}).to(router.thresholds.device)
        for index in range(len(own) + 1):
            if opened[:index] not in known:
                known[opened[:index]] = mmacs_of_path(model, index, other)
        found.append(OpenCosts(opened, [known[opened[:index]] for index in range(len(own) + 1)]))
    return found


def _attention(
    model: EarlyExitSSDLite, dataset: DetectionDataset, matches: ExitMatches, score: float
) -> tuple[Attention, ...]:
    places = {record.image_id: place for place, record in enumerate(dataset.records)}
    first = by_gain(matches, score)[:ATTENTION_PHOTOS].tolist()
    return attention_pictures(model, [(one, dataset[places[matches.image_ids[one]]][0]) for one in first])


def calibrate_command(arguments: Sequence[str], weights: Any) -> str:
    """The command that calibrates ``weights`` to a ``{target}``, with the configuration and the keys of this command.

    Empty if these ``arguments`` name no configuration, as in a notebook.
    """
    if "--config" not in arguments[:-1]:
        return ""
    config = arguments[list(arguments).index("--config") + 1]
    pairs = [pair for pair in itertools.pairwise(arguments) if re.fullmatch(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)*", pair[0])]
    keys = [text for pair in pairs if pair[0] != "ROUTING.CERTIFICATE" for text in pair]
    words = ["earlyexit", "calibrate", "--config", config, "--weights", str(weights), "--out", "calibrated"]
    return f"{shlex.join(words)} {{target}} {shlex.join(keys)}".strip()
