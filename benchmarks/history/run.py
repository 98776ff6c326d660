#!/usr/bin/env python
"""Reproduce the nine attempts of the history in small, with its assignment of default boxes and with the package's.

The trunk has the package's weights and is frozen. All heads are new in every attempt.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed

from benchmarks.history.attempts import ATTEMPTS, EXITS, LIGHT, PLAIN, Attempt, Detector  # noqa: E402
from benchmarks.history.features import Features  # noqa: E402
from benchmarks.history.figures import Trial, measure  # noqa: E402
from benchmarks.history.report import (  # noqa: E402
    attempts_table,
    curves_picture,
    detections_picture,
    light_table,
    rule_table,
    scores_table,
)
from benchmarks.history.training import CurvePoint, HeadLosses, build_heads, train_heads  # noqa: E402
from earlyexit_ssd.config import load_config  # noqa: E402
from earlyexit_ssd.console import progress, run_tool  # noqa: E402
from earlyexit_ssd.data import load_dataset  # noqa: E402
from earlyexit_ssd.evaluation.cost import example_input, time_in_runtime  # noqa: E402
from earlyexit_ssd.files import locks_folder, write_image, write_json, write_text, write_torch  # noqa: E402
from earlyexit_ssd.modeling import EarlyExitSSDLite  # noqa: E402
from earlyexit_ssd.modeling.detector import AllOutputs  # noqa: E402
from earlyexit_ssd.plain import build, read_json  # noqa: E402

DATA = {
    "rendered": (
        ROOT / "configs" / "quickstart.yaml",
        ["DATA.SYNTHETIC.SIZES", "[800, 100, 300]", "MODEL.IMAGE_SIZE", "160"],
    ),
    "voc_animals": (ROOT / "configs" / "voc_animals.yaml", ["DATA.LIMIT", "800", "MODEL.IMAGE_SIZE", "224"]),
}
"""Name -> configuration file of the photos, and keys that replace its keys."""
EXAMPLES = """
examples:
  python benchmarks/history/run.py --out output/history
      rendered rooms; about 20 minutes on one core
  python benchmarks/history/run.py --out output/history --data voc_animals --parts attempts -- DATA.ROOT path/to/photos
      the attempts on 800 photos of VOC, without the branches

You can stop the command at any time. The same command continues with the first missing training.
"""
PARTS = ("attempts", "branches")
SEEDS = (0, 1, 2)  # for the branches with and without their parts
SHOWN = "1.2"  # the attempt whose detections are drawn
EPOCHS, LR = 10, 0.003
TIMING_RUNS = 100


@dataclass(frozen=True)
class Splits:
    """The stored features of the three splits, and what new heads for them are built from."""

    train: Features
    calib: Features  # for the curves
    test: Features  # for all other figures
    trunk: EarlyExitSSDLite  # the detector whose trunk is used
    size: int  # side of the input, pixels
    classes: tuple[str, ...]  # names of the labels 1..K

    @classmethod
    def load(cls, data: str, overrides: Sequence[str], folder: Path) -> Splits:
        """Read the photos of ``data``, and run the trunk on them unless ``folder`` has its outputs."""
        path, own = DATA[data]
        cfg = load_config(path, [*own, *overrides])
        torch.set_num_threads(cfg.THREADS or 1)
        size, trunk = cfg.MODEL.IMAGE_SIZE, EarlyExitSSDLite.from_pretrained("voc_animals", router=False)
        features, classes = {}, ()
        for name in ("train", "calib", "test"):
            dataset = load_dataset(cfg, cfg.DATA[name.upper()], train=name == "train")
            dataset.transforms, classes = None, dataset.classes
            model = build_heads(trunk, LIGHT[0], size, classes, 0)
            features[name] = Features(folder / "features" / name, model, dataset)
        return cls(**features, trunk=trunk, size=size, classes=classes)

    def build(self, training: Training) -> HeadLosses:
        """Return untrained heads."""
        model = build_heads(self.trunk, training.detector, self.size, self.classes, training.seed)
        return HeadLosses(model, training.detector, training.matching, training.attempts)


@dataclass(frozen=True)
class Training:
    """One training of the heads of ``detector``, and of the routing of ``attempts``."""

    detector: Detector
    matching: str
    seed: int
    attempts: tuple[Attempt, ...]

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"{self.detector.name} {self.detector.negatives:g} {self.matching} {self.seed}".replace(" ", "_")

    def heads(self, splits: Splits, folder: Path) -> tuple[HeadLosses, list[list[CurvePoint]], bool]:
        """Return the trained heads, the curves, and whether ``folder`` had them already."""
        losses, path = splits.build(self), folder / f"{self.name}.pth"
        settings = repr((self, EPOCHS, LR, splits.train.key))
        stored = torch.load(path, weights_only=True) if path.is_file() else {}
        is_stored = stored.get("settings") == settings
        if not is_stored:
            curves = train_heads(losses, splits.train, splits.calib, self.seed, EPOCHS, LR)
            points = [[dataclasses.asdict(point) for point in curve] for curve in curves]
            stored = {"settings": settings, "state": losses.state_dict(), "curves": points}
            write_torch(path, stored)
        losses.load_state_dict(stored["state"])
        return losses, [[CurvePoint(**point) for point in curve] for curve in stored["curves"]], is_stored

    def result(self, splits: Splits, folder: Path) -> Trial:
        """Train and measure, unless ``folder`` has the result."""
        losses, curves, is_stored = self.heads(splits, folder)
        path = folder / f"{self.name}.json"
        if not (is_stored and path.is_file()):
            trial = measure(losses, splits.test, curves, self.detector.name, self.seed)
            write_json(path, dataclasses.asdict(trial))
        return build(Trial, read_json(path, "result", "delete it"))


def trainings(parts: Sequence[str]) -> list[Training]:
    """Return the attempts with both assignments of default boxes, then the branches with and without their parts."""
    planned = []
    if "attempts" in parts:
        for detector in dict.fromkeys(attempt.detector for attempt in ATTEMPTS):
            attempts = tuple(attempt for attempt in ATTEMPTS if attempt.detector == detector)
            planned += [Training(detector, matching, 0, attempts) for matching in ("random", "iou")]
    if "branches" in parts:
        planned += [Training(detector, "iou", seed, (PLAIN,)) for seed in SEEDS for detector in LIGHT]
    return planned


def milliseconds(splits: Splits, training: Training) -> list[float]:
    """Time the network to each exit for one photo, with the earlier branches, in ONNX Runtime on one thread."""
    model = splits.build(training).model.eval()
    paths = [AllOutputs(model, index) for index in range(len(EXITS))]
    examples = [example_input(model)] * len(paths)
    return [timing.ms for timing in time_in_runtime(paths, examples, "onnxruntime", TIMING_RUNS, 1)]


@locks_folder("out")
def reproduce(data: str, out: Path, parts: Sequence[str], overrides: Sequence[str]) -> str:
    """Run the missing trainings, write results, tables and pictures to ``out``, and return the tables.

    ``data`` is a key of `DATA`, and ``parts`` are some of `PARTS`.
    """
    folder, planned = out / data, trainings(parts)
    splits = Splits.load(data, overrides, folder)
    trials = [training.result(splits, folder) for training in progress(planned, desc=f"trainings on {data}")]
    times = folder / "ms.json"
    if not times.is_file():
        write_json(times, milliseconds(splits, planned[0]))
    ms = read_json(times, "list of milliseconds", "delete it")
    write_json(out / f"{data}.json", {"ms": ms, "trials": [dataclasses.asdict(trial) for trial in trials]})
    tables = "\n\n".join([attempts_table(trials, ms), scores_table(trials), light_table(trials), rule_table(trials)])
    write_text(out / f"{data}.md", tables + "\n")
    if "attempts" in parts:
        write_image(out / f"{data}_curves.png", curves_picture(trials))
        shown = [training for training in planned if training.attempts[0].name == SHOWN]
        losses = {training.matching: training.heads(splits, folder)[0] for training in shown}
        write_image(out / f"{data}_detections.png", detections_picture(losses, splits.test, splits.classes))
    return tables


def main(arguments: list[str] | None = None) -> int:
    """Parse the arguments, reproduce the attempts and print the tables. Return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of features, weights, results and pictures")
    parser.add_argument("--data", choices=DATA, default="rendered", help="photos; rendered by default")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to train; both by default")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="override keys of the configuration")
    args = parser.parse_intermixed_args(arguments)

    def job() -> None:
        print(reproduce(args.data, args.out, args.parts, args.overrides))

    return run_tool(job, after_a_stop="the same command continues")


if __name__ == "__main__":
    sys.exit(main())
