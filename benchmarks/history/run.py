#!/usr/bin/env python
"""Reproduce the nine attempts of the history, small: each with the history's assignment of default boxes, and with the
package's. The trunk is that of the shipped weights, frozen; all heads are new in every attempt.
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

from benchmarks.history.attempts import ATTEMPTS, EXITS, LIGHT, Attempt  # noqa: E402
from benchmarks.history.features import Features  # noqa: E402
from benchmarks.history.figures import Trial, measure  # noqa: E402
from benchmarks.history.report import (  # noqa: E402
    attempts_table,
    curves_picture,
    detections_picture,
    light_table,
    rule_table,
)
from benchmarks.history.training import (  # noqa: E402
    EPOCHS,
    LR,
    AttemptLosses,
    CurvePoint,
    build_heads,
    train_heads,
)
from earlyexit_ssd.command_line import run_tool  # noqa: E402
from earlyexit_ssd.config import load_config  # noqa: E402
from earlyexit_ssd.data import load_dataset  # noqa: E402
from earlyexit_ssd.errors import ConfigError, nearest  # noqa: E402
from earlyexit_ssd.evaluation.cost import example_input, time_in_runtime  # noqa: E402
from earlyexit_ssd.files import locks_folder, write_image, write_json, write_text, write_torch  # noqa: E402
from earlyexit_ssd.modeling import EarlyExitSSDLite  # noqa: E402
from earlyexit_ssd.modeling.detector import AllOutputs, PathToExit  # noqa: E402
from earlyexit_ssd.plain import build, read_json  # noqa: E402
from earlyexit_ssd.progress import progress  # noqa: E402

DATA = {
    "rendered": (
        ROOT / "configs" / "quickstart.yaml",
        ["DATA.SYNTHETIC.SIZES", "[800, 100, 300]", "MODEL.IMAGE_SIZE", "160"],
    ),
    "voc_animals": (ROOT / "configs" / "voc_animals.yaml", ["DATA.LIMIT", "800", "MODEL.IMAGE_SIZE", "224"]),
}
"""Name -> configuration that the photos come from, and keys in its place."""
EXAMPLES = """
examples:
  python benchmarks/history/run.py --out output/history
      rendered rooms; about 20 minutes on one core
  python benchmarks/history/run.py --out output/history --data voc_animals DATA.ROOT path/to/photos
      800 photos of VOC; longer
  python benchmarks/history/run.py --out output/history --only 1.2 1.7
      two attempts

Stop it at any time: the same command goes on with the first training that is missing.
"""
SEEDS = (0, 1, 2)
"""Of the branches with and without their parts."""
SHOWN = "1.2"
"""Attempt whose detections are drawn."""


@dataclass(frozen=True)
class Splits:
    """The stored features of the three splits, and how heads for them are built.

    Attributes:
        train, calib, test: the heads are trained on ``train``; the curves come from ``calib``; the rest from ``test``.
        trunk: detector whose trunk is frozen.
        size: side of the input, pixels.
        classes: names of the labels 1..K.
    """

    train: Features
    calib: Features
    test: Features
    trunk: EarlyExitSSDLite
    size: int
    classes: tuple[str, ...]

    @classmethod
    def load(cls, data: str, overrides: Sequence[str], folder: Path) -> Splits:
        """Read the photos of ``data`` and run the trunk on them, unless ``folder`` has its outputs."""
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

    def build(self, attempt: Attempt, matching: str, seed: int) -> AttemptLosses:
        """Untrained heads."""
        return AttemptLosses(build_heads(self.trunk, attempt, self.size, self.classes, seed), attempt, matching)


@dataclass(frozen=True)
class Training:
    """One training of the reproduction."""

    attempt: Attempt
    matching: str
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.attempt.name}_{self.matching}_{self.seed}".replace(" ", "_")

    def heads(self, splits: Splits, folder: Path) -> tuple[AttemptLosses, list[CurvePoint], bool]:
        """The trained heads, their curve, and whether they were in ``folder`` already."""
        losses, path = splits.build(self.attempt, self.matching, self.seed), folder / f"{self.name}.pth"
        settings = repr((self, EPOCHS, LR, splits.train.key))
        stored = torch.load(path, weights_only=True) if path.is_file() else {}
        known = stored.get("settings") == settings
        if not known:
            curve = train_heads(losses, splits.train, splits.calib, self.seed)
            points = [dataclasses.asdict(one) for one in curve]
            stored = {"settings": settings, "state": losses.state_dict(), "curve": points}
            write_torch(path, stored)
        losses.load_state_dict(stored["state"])
        return losses, [CurvePoint(**one) for one in stored["curve"]], known

    def result(self, splits: Splits, data: str, folder: Path) -> Trial:
        """Train and measure, unless ``folder`` has the result."""
        losses, curve, known = self.heads(splits, folder)
        path = folder / f"{self.name}.json"
        if not (known and path.is_file()):
            write_json(path, dataclasses.asdict(measure(losses, splits.test, curve, data, self.seed)))
        return build(Trial, read_json(path, "result", "delete it"))


def trainings(only: Sequence[str]) -> list[Training]:
    """All trainings, or those of the attempts with the names ``only``; ``light`` stands for the branches' parts.

    Raises:
        ConfigError: an unknown name.
    """
    names = [one.name for one in ATTEMPTS] + ["light"]
    for name in only:
        if name not in names:
            raise ConfigError(f"--only {name}: expected some of {', '.join(names)}{nearest(name, names)}")
    wanted = only or names
    pairs = [(seed, one) for seed, one in enumerate(ATTEMPTS) if one.name in wanted]
    found = [Training(one, matching, seed) for seed, one in pairs for matching in ("random", "iou")]
    if "light" in wanted:
        found += [Training(one, "iou", seed) for seed in SEEDS for one in LIGHT]
    return found


def milliseconds(splits: Splits) -> list[float]:
    """Of the network to each exit for one photo, branches before it included, in ONNX Runtime on one thread."""
    model = splits.build(LIGHT[0], "iou", 0).model.eval()
    paths = [AllOutputs(PathToExit(model, index)) for index in range(len(EXITS))]
    examples = [example_input(model)] * len(paths)
    return [one.ms for one in time_in_runtime(paths, examples, "onnxruntime", 100, 1)]


@locks_folder("out")
def reproduce(data: str, out: Path, only: Sequence[str], overrides: Sequence[str]) -> str:
    """Do what is missing in ``out``, and write results, tables and pictures there.

    Args:
        data: key of `DATA`.
        only: see `trainings`.
        overrides: keys and values of the configuration.

    Returns:
        the tables.
    """
    folder = out / data
    planned = trainings(only)
    splits = Splits.load(data, overrides, folder)
    results = [one.result(splits, data, folder) for one in progress(planned, desc=f"trainings on {data}")]
    known = folder / "ms.json"
    if not known.is_file():
        write_json(known, milliseconds(splits))
    ms = read_json(known, "list of milliseconds", "delete it")
    write_json(out / f"{data}.json", {"ms": ms, "trials": [dataclasses.asdict(one) for one in results]})
    tables = "\n\n".join([attempts_table(results, ms), light_table(results), rule_table(results)])
    write_text(out / f"{data}.md", tables + "\n")
    shown = [one for one in planned if one.attempt.name == SHOWN]
    if shown and data == "rendered":
        losses = {one.matching: one.heads(splits, folder)[0] for one in shown}
        write_image(out / "detections.png", detections_picture(losses, splits.test))
    if {"1.7", "1.9"} <= {one.attempt for one in results}:
        write_image(out / f"{data}_curves.png", curves_picture(results))
    return tables


def main(arguments: list[str] | None = None) -> int:
    """Parse, reproduce, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of features, weights, results and pictures")
    parser.add_argument("--data", choices=DATA, default="rendered", help="photos; rendered by default")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="attempts such as 1.2, or light; all")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="override keys of the configuration")
    args = parser.parse_intermixed_args(arguments)

    def job() -> None:
        print(reproduce(args.data, args.out, args.only, args.overrides))

    return run_tool(job, after_a_stop="the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
