#!/usr/bin/env python
"""Detect on your own photos with weights that come with the package: what is found, and at which exit."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from earlyexit_ssd import EarlyExitSSDLite, EarlyExitSSDLite_Weights
from earlyexit_ssd.config import load_config
from earlyexit_ssd.errors import DataError, EarlyExitError
from earlyexit_ssd.files import make_folder, sha256, write_image
from earlyexit_ssd.pipeline.command_line import run_tool
from earlyexit_ssd.pipeline.demo import Answer, look, open_demo, photo_paths, picture_paths, require_score, warm_up
from earlyexit_ssd.progress import write_line

NAMES = [name.lower() for name in EarlyExitSSDLite_Weights.__members__]
DEFAULT = "voc_animals" if "voc_animals" in NAMES else NAMES[0]
EXAMPLES = f"""
examples:
  python tools/demo.py dog.jpg street.png
      print what is found and write output/demo/dog.png and street.png
  python tools/demo.py ~/photos --all-exits --score 0.3
      every picture of a folder; what each exit sees, side by side, the exit taken framed
  python tools/demo.py room.jpg --weights output/quickstart/model.pth
      a model of your own
  python tools/demo.py room.jpg --weights checkpoint.pth --config mine.yaml
      exits that torchvision's train.py trained; the configuration describes them and their routing

Shipped weights: {", ".join(NAMES)}; what they are worth: docs/model_zoo.md
exit codes: 0 done, 2 some photo could not be read (the others are done)
"""


def main(arguments: list[str] | None = None) -> int:
    """Parse, detect, print, write pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="photos, or folders of them")
    parser.add_argument("--weights", default=DEFAULT, help=f"a shipped name or a model.pth; {DEFAULT} by default")
    parser.add_argument("--config", help="YAML file that describes a checkpoint, and routes")
    parser.add_argument("--out", default="output/demo", help="folder of the pictures; output/demo by default")
    parser.add_argument("--score", type=float, default=0.5, help="least score of what is shown; 0.5")
    parser.add_argument("--all-exits", action="store_true", help="show what every exit sees")
    args = parser.parse_args(arguments)
    return run_tool(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """All photos; those that cannot be read are named, and the run ends as a failure."""
    require_score(args.score)
    photos = photo_paths(args.photos)
    make_folder(args.out)
    model = open_demo(args.weights, load_config(args.config) if args.config else None)
    note_calibration_photos(model, photos)
    warm_up(model)
    failed = 0
    for photo, picture in zip(photos, picture_paths(photos, args.out), strict=True):
        try:
            answer = look(model, photo, args.score, args.all_exits)
        except DataError as error:
            write_line(f"error: {error}")
            failed += 1
            continue
        write_image(picture, answer.picture)
        print(report(photo, answer, picture))
    if failed:
        raise EarlyExitError(f"{failed} of {len(photos)} photos could not be used, see above")


def note_calibration_photos(model: EarlyExitSSDLite, photos: list[Path]) -> None:
    """Say which photos calibrated the model's routing: what it does on them flatters."""
    certificate = getattr(model.router, "certificate", None)
    if certificate is None:
        return
    try:
        certificate.require_unseen((photo, sha256(photo)) for photo in photos if photo.is_file())
    except EarlyExitError as error:
        write_line(f"note: {error}")


def report(photo: Path, answer: Answer, picture: Path) -> str:
    """A line about the photo and one for each detection."""
    sure = "" if answer.confidence is None else f", confidence {answer.confidence:.2f}"
    lines = [f"{photo}: {answer.exit_name}{sure}, {answer.ms:.0f} ms, {len(answer.found)} found -> {picture}"]
    for name, score, box in answer.found:
        lines.append(f"  {name} {score:.2f} at {', '.join(f'{value:.0f}' for value in box)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
