"""Collect the data of a job's report page and write the page.

The results are on disk already, so an error in this file must not end the job (`never_failing`).
"""

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

ATTENTION_PHOTOS = 6  # number of photos with attention maps, the first of the gallery
MAX_OPEN_SETS = 8  # if there are more sets of open exits, operations are counted for the evaluated set only
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
    """Write report.html of an evaluation into ``folder``. If it is the folder of a training, the page includes the
    training."""
    with never_failing(folder / NAME):
        order = np.argsort(collected.image_ids, kind="stable")
        photos = PagePhotos(
            ground_truth=evaluation.ground_truth,
            detections=collected.detections,
            matches=evaluation.matches,
            exit_names=model.exit_names,
            confidences=np.array([values.numpy()[order] for values in collected.confidences[:-1]]),
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
    """Write report.html of a calibration into ``folder``. The arguments are results of
    `earlyexit_ssd.pipeline.calibrate`."""
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
                OpenCosts(opened, **{costs.unit: costs.per_exit(_thresholds(opened)).tolist()})
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
    """Write report.html of a training that is not evaluated yet into its ``folder``. Nothing is written if there is no
    log entry and no gate yet."""
    with never_failing(folder / NAME):
        section, gates = read_training(folder, cfg.ROUTING.TEMPERATURE_BOUNDS)
        if section is not None:
            write_page(folder / NAME, training_page(section, gates, ", ".join(cfg.DATA.TRAIN)))


def read_training(folder: Path, bounds: Sequence[float]) -> tuple[Section | None, list[dict[str, Any]]]:
    """Return the page section of a training's logs and gates, and the gates. They are None and [] if ``folder`` has
    neither logs nor gates."""
    files = [path for name in PHASE_SECTIONS if (path := folder / name / "gate.json").is_file()]
    gates = [read_json(path, "gate of a phase", "delete it") for path in files]
    logs = {name: read_log(folder / name) for name in PHASE_SECTIONS}
    return (training_section(logs, gates, bounds) if gates or any(logs.values()) else None), gates


def _open_costs(model: EarlyExitSSDLite, router: ExitRouter, results: Results) -> list[OpenCosts]:
    """Return the costs of the exits for the evaluated set of open exits, and the MMACs for all other sets. Only the
    evaluated set was timed."""
    evaluated = tuple(threshold < CLOSED for threshold in router.thresholds.tolist())
    # key: which of the earlier exits are open; value: MMACs up to the exit after them
    mmacs = {evaluated[:index]: row.mmacs for index, row in enumerate(results.exits)}
    costs = [OpenCosts(evaluated, [row.mmacs for row in results.exits], [row.ms for row in results.exits])]
    others = [opened for opened in itertools.product((True, False), repeat=len(evaluated)) if opened != evaluated]
    for opened in others if len(others) < MAX_OPEN_SETS else ():
        values = {**router.to_dict(), "thresholds": _thresholds(opened)}
        other_router = ExitRouter(**values).to(router.thresholds.device)
        paths = [opened[:index] for index in range(len(evaluated) + 1)]
        for index, path in enumerate(paths):
            if path not in mmacs:
                mmacs[path] = mmacs_of_path(model, index, other_router)
        costs.append(OpenCosts(opened, [mmacs[path] for path in paths]))
    return costs


def _thresholds(opened: Sequence[bool]) -> list[float]:
    """Return thresholds at which exactly the exits in ``opened`` are open."""
    return [0.0 if is_open else CLOSED for is_open in opened]


def _attention(
    model: EarlyExitSSDLite, dataset: DetectionDataset, matches: ExitMatches, score: float
) -> tuple[Attention, ...]:
    rows = {record.image_id: row for row, record in enumerate(dataset.records)}
    photos = by_gain(matches, score)[:ATTENTION_PHOTOS].tolist()
    return attention_pictures(model, [(photo, dataset[rows[matches.image_ids[photo]]][0]) for photo in photos])


def calibrate_command(arguments: Sequence[str], weights: Any) -> str:
    """Return a command that calibrates ``weights``, with ``{target}`` in place of the target.

    The configuration file and the configuration keys are taken from ``arguments``, a command line. The result is empty
    if they have no ``--config``, as in a notebook.
    """
    if "--config" not in arguments[:-1]:
        return ""
    config = arguments[list(arguments).index("--config") + 1]
    pairs = [pair for pair in itertools.pairwise(arguments) if re.fullmatch(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)*", pair[0])]
    keys = [text for pair in pairs if pair[0] != "ROUTING.CERTIFICATE" for text in pair]
    words = ["earlyexit", "calibrate", "--config", config, "--weights", str(weights), "--out", "calibrated"]
    return f"{shlex.join(words)} {{target}} {shlex.join(keys)}".strip()
