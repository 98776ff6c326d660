#!/usr/bin/env python
"""Calibrate the routing of a trained detector to what you state, and write a certificate of it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from earlyexit_ssd.config import load_config
from earlyexit_ssd.data.repeats import Block
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.pipeline.calibrate import Target, calibrate
from earlyexit_ssd.pipeline.command_line import run_tool

EXAMPLES = """
examples:
  python tools/calibrate.py --config configs/voc_animals.yaml --risk 0.02 --delta 0.05
      with probability 0.95, a photo loses at most 2 % of what the full path finds, on average
  python tools/calibrate.py --config configs/chair_stream.yaml --ap-drop 0.01 ROUTING.POLICY foreseen_emptiness
      as cheap as it gets with at most 0.01 AP50 lost in 95 % of the draws of calibration photos
  python tools/calibrate.py --config configs/voc_animals.yaml --speedup 1.4 EVAL.RUNTIME onnxruntime
      as good as it gets at a mean cost of the detector without exits / 1.4, measured in ONNX Runtime

  python tools/calibrate.py --config configs/voc_animals.yaml --risk 0.05 --block 5s --fps 5 \
      DATA.DATASETS "[[learn, '', frames/learn], [calib, '', frames/calib], [test, '', frames/test]]" \
      DATA.TRAIN "[learn]" DATA.CALIB "[calib]" DATA.TEST "[test]"
      on a camera's own frames, which nobody labelled, five of them a second: blocks of 5 s count, not frames

Only the calib split (DATA.CALIB) decides; TRAIN fits what a policy has to fit, TEST is not looked at. The
model.pth that it writes routes as calibrated wherever a model is taken (--weights of tools/eval_exits.py and
tools/demo.py, from_pretrained); the certificate alone goes into ROUTING.CERTIFICATE. How it works: docs/routing.md
"""


def main(arguments: list[str] | None = None) -> int:
    """Parse, calibrate, print the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file that names the splits (DATA)")
    parser.add_argument("--weights", help="a model.pth, or a checkpoint with exits; by default that of OUTPUT_DIR")
    parser.add_argument("--out", help="folder of the certificate; OUTPUT_DIR/calibration by default")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--speedup", type=float, help="at least, against the detector without exits, in mean cost")
    target.add_argument("--ap-drop", type=float, help="AP50 lost against the full path, at most, in 1 - delta of draws")
    target.add_argument("--risk", type=float, help="expected loss per photo, at most, with probability 1 - delta")
    parser.add_argument("--delta", type=float, default=0.05, help="of --risk and --ap-drop; 0.05")
    parser.add_argument("--learned", action="store_true", help="learn thresholds with a soft exit instead of a search")
    parser.add_argument(
        "--block",
        metavar="SECONDS|N",
        help="of --risk and --ap-drop: consecutive photos of a folder, such as frames of a video, count as one draw: "
        "25 (photos) or 5s (seconds, with --fps)",
    )
    parser.add_argument("--fps", type=float, help="photos of a folder per second, for --block in seconds")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="override keys of the configuration")
    args = parser.parse_intermixed_args(arguments)

    def job() -> None:
        cfg = load_config(args.config, args.overrides)
        weights = args.weights or Path(cfg.OUTPUT_DIR) / "model.pth"
        out = Path(args.out or Path(cfg.OUTPUT_DIR) / "calibration")
        chosen = {"speedup": args.speedup, "ap_drop": args.ap_drop, "risk": args.risk}
        kind, value = next((kind, value) for kind, value in chosen.items() if value is not None)
        if args.fps is not None and args.block is None:
            raise EarlyExitError("--fps is for --block in seconds, such as --block 5s")
        block = None if args.block is None else Block.parse(args.block, args.fps)
        calibrate(cfg, weights, Target(kind, value, args.delta, block, args.learned), out)
        print((out / "calibration.txt").read_text(encoding="utf-8"))
        print(f"results: {out}/ (model.pth, which routes so; certificate.json, calibration.txt, reliability.png)")

    return run_tool(job)


if __name__ == "__main__":
    sys.exit(main())
