"""The command ``earlyexit``: its subcommands with their arguments, examples and jobs.

This module is not in the package, because importing the package imports torch. A job imports the package when it
starts, so ``--help`` and argument errors are fast. The scripts in tools/ run the same commands.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shlex import quote

SHIPPED = sorted(path.stem for path in (Path(__file__).parent / "earlyexit_ssd" / "weights").glob("*.json"))
DEFAULT_WEIGHTS = "voc_animals"

TOP_EXAMPLES = """
examples:
  earlyexit train --config configs/quickstart.yaml
      render photos, train a detector and an exit from scratch, evaluate: no download, minutes on a CPU
  earlyexit predict dog.jpg
      detect in your photo with weights of the package
  earlyexit train --help
      the arguments of a command, with more examples
"""
TRAIN_EXAMPLES = """
examples:
  %(prog)s --config configs/quickstart.yaml
      render photos, train a detector and an exit from scratch, evaluate: no download, minutes on a CPU
  %(prog)s --config configs/voc_animals.yaml DATA.ROOT ~/data MODEL.WEIGHTS COCO_V1
      add exits to torchvision's COCO detector, for seven classes
  %(prog)s --config my.yaml --resume
      continue a run that was stopped or killed
  torchrun --nproc-per-node 2 tools/train_net.py --config my.yaml
      two processes share each batch and the photos of the evaluation

exit codes: 0 done, 2 bad input, 3 a gate failed (the figures and what to try are printed), 130 stopped by a signal
Every key and its default: docs/config.md
"""
EVALUATE_EXAMPLES = """
examples:
  %(prog)s --config configs/quickstart.yaml --out results
      OUTPUT_DIR/model.pth on the test split of the configuration
  %(prog)s --config configs/voc_animals.yaml --weights model.pth --out results \\
      ROUTING.POLICY max_foreground ROUTING.THRESHOLDS "(0.5, 0.7)"
      other weights, another routing
  %(prog)s --config configs/voc_animals.yaml --out results EVAL.RUNTIME onnxruntime \\
      EVAL.RIVALS.ONNX "['yolox:yolox_nano.onnx']" EVAL.RIVALS.SINGLE_EXITS "[output/exit12/model.pth]"
      two more rivals, in addition to smaller inputs and each exit alone; all are timed in ONNX Runtime
  torchrun --nproc-per-node 2 tools/eval_exits.py --config configs/voc_animals.yaml --out results
      two processes share the photos; the first measures the milliseconds and writes the results

How to read the figures: docs/metrics.md
"""
CALIBRATE_EXAMPLES = """
examples:
  %(prog)s --config configs/voc_animals.yaml --risk 0.02 --delta 0.05
      the expected loss of a photo (missed and added detections, as a share of the full path's detections) is at most
      0.02, with probability 0.95
  %(prog)s --config configs/chair_stream.yaml --ap-drop 0.01 ROUTING.POLICY foreseen_emptiness
      the smallest cost with at most 0.01 AP50 lost in 95 %% of the bootstrap draws of calibration photos
  %(prog)s --config configs/voc_animals.yaml --speedup 1.4 EVAL.RUNTIME onnxruntime
      the best AP50 at 1/1.4 of the cost of the detector without exits, measured in ONNX Runtime
  %(prog)s --config configs/voc_animals.yaml --risk 0.05 --block 5s --fps 5 \\
      DATA.DATASETS "[[learn, '', frames/learn], [calib, '', frames/calib], [test, '', frames/test]]" \\
      DATA.TRAIN "[learn]" DATA.CALIB "[calib]" DATA.TEST "[test]"
      unlabelled frames of a camera, 5 per second; the frames of 5 s count as one photo, because they are alike
  torchrun --nproc-per-node 2 tools/calibrate.py --config configs/voc_animals.yaml --ap-drop 0.01
      two processes share the photos

Thresholds are searched on DATA.CALIB, policies with parameters are fitted on DATA.TRAIN, DATA.TEST is not used. The
result is a model.pth with this routing (for --weights of evaluate and predict, and for from_pretrained) and a
certificate (for ROUTING.CERTIFICATE). How it works: docs/routing.md
"""
OPTIMIZE_EXAMPLES = """
examples:
  %(prog)s --config mine.yaml --ap-drop 0.01
      the fastest detector that loses at most 0.01 AP50 in 95 %% of the bootstrap draws of calib photos
  %(prog)s --config mine.yaml --weights output/mine/model.pth --speedup 2
      at least twice as fast, with the least loss; the trained branches of the model are candidates too
  %(prog)s --config mine.yaml --train
      also fine-tune the detector for smaller inputs; minutes to hours on a CPU
  %(prog)s --config mine.yaml --ms 20 --budget-minutes 30 EVAL.RIVALS.ONNX "['yolox:yolox_nano.onnx']"
      at most 20 ms per photo; start no candidate after 30 minutes; compare with YOLOX-nano in the chart

Candidates are compared on DATA.CALIB. Policies are fitted on DATA.TRAIN. The chosen detector is evaluated once on
DATA.TEST. To continue a stopped search, run the command again. What to expect: docs/choosing.md
"""
PREDICT_EXAMPLES = f"""
examples:
  %(prog)s dog.jpg street.png
      weights of the package; print the detections, and write output/predict/dog.png and street.png
  %(prog)s --weights detector.onnx ~/photos "frames/*.jpg" --save json,counts
      an exported detector, without PyTorch; a folder and a pattern; detections.json (COCO results) and counts.csv
  %(prog)s --weights detector.onnx street.mp4 --save pictures,csv --stride 2
      every second frame of a video: output/predict/street.mp4 with boxes, exit and milliseconds, and detections.csv
  %(prog)s --weights detector.onnx 0 --show --save none
      the first camera, in a window; Ctrl-C or q ends it. An address (rtsp://...) works too
  %(prog)s --weights detector.onnx monday.mp4 --calibrate-stream 0.02 --stream camera.json
  %(prog)s --weights detector.onnx rtsp://... --stream camera.json --save counts
      calibrate a rule on frames of this camera, then repeat the last detections while the picture changes little; at
      most 2 %% of the frames get other detections than without the rule
  %(prog)s room.jpg --weights output/quickstart/model.pth --all-exits --score 0.3
      a model in PyTorch; the detections of every exit side by side, the exit taken with a frame
  %(prog)s room.jpg --weights checkpoint.pth --config mine.yaml
      exits trained with torchvision's train.py; the configuration describes the exits and their routing

Shipped weights: {", ".join(SHIPPED)}; their figures: docs/model_zoo.md. More: docs/predict.md
exit codes: 0 done, 2 bad input (all other inputs are processed), 130 stopped by a signal
"""
EXPORT_EXAMPLES = """
examples:
  %(prog)s output/chair/model.pth --out chair.onnx
      one file from photo to detections, with the model's routing; its detections in rendered photos are compared with
      the model's before it is written
  %(prog)s voc_animals --out animals --format staged --photos ~/photos
      shipped weights; a folder with one file per segment, compared with the model in your photos
  %(prog)s output/chair/model.pth --out chair.xml --format openvino
      OpenVINO's own format (pip install openvino)
  %(prog)s output/chair/model.pth --out chair.onnx --int8 --photos frames --annotations frames.json
      in 8 bits (with --format openvino: pip install nncf); an error if the file is slower on this machine than in 32
      bits, or loses more AP50 than --ap-drop

How to run the file without PyTorch: docs/deploy.md
"""
BENCHMARK_EXAMPLES = """
examples:
  %(prog)s chair.onnx chair_full.onnx coco.onnx --photos ~/photos
      the gain of routing: the detector with exits, its full path (export --full), and the original detector
  %(prog)s chair.onnx coco.onnx chair.xml coco.xml coco.pth compile:coco.pth --photos ~/photos --threads 1 \\
      --batch 1 --rounds 3 --out benchmark.json
      in ONNX Runtime, in OpenVINO (.xml), in eager PyTorch and with torch.compile; each photo three times
  %(prog)s chair.onnx yolox:yolox_nano.onnx --photos ~/photos --most 100
      compare with YOLOX-nano on 100 of the photos

Every detector runs in its own process; they take turns on each photo. Exported detectors need no PyTorch.
How to read the table: docs/deploy.md
"""
DOCTOR_EXAMPLES = """
examples:
  %(prog)s data --config mine.yaml
      before a training: object sizes, empty photos, copies across splits, boxes that match no default box, rare classes
  %(prog)s model --config configs/voc_animals.yaml --weights voc_animals DATA.ROOT ~/data
      check detections, exits, temperatures and routing of a model on 200 photos of DATA.CALIB
  %(prog)s model --config mine.yaml --weights checkpoint.pth --out output/doctor
      a checkpoint of torchvision's SSDLite, with or without exits; write doctor.json too

exit codes: 0 no bad finding, 1 bad findings, 2 bad input
What each figure means: docs/doctor.md
"""


def add_config(parser: argparse.ArgumentParser, what: str) -> None:
    """Add ``--config`` and the keys that override it."""
    parser.add_argument("--config", required=True, help=f"YAML file {what}; configs/ has examples")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="override keys of the configuration")


def train_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, "of the run")
    parser.add_argument("--resume", action="store_true", help="continue the run in OUTPUT_DIR")
    parser.add_argument("--force", action="store_true", help="continue after a failed gate; later reports mention it")


def train(args: argparse.Namespace) -> None:
    """Train a detector with early exits, phase by phase, each with its gate, and evaluate it."""
    from earlyexit_ssd.config import load_config
    from earlyexit_ssd.pipeline import train
    from earlyexit_ssd.report.tables import text_report

    cfg = load_config(args.config, args.overrides)
    metrics = train(cfg, args.resume, args.force)
    if metrics:
        print(text_report(metrics))
        print(f"\nresults: {cfg.OUTPUT_DIR}/ (report.html, metrics.json, model.pth, pictures)")


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, "that names the test split (DATA.TEST)")
    parser.add_argument("--weights", help="model.pth, shipped weights or a checkpoint; OUTPUT_DIR/model.pth by default")
    parser.add_argument("--out", required=True, help="folder for metrics.json, the table, the charts and the pictures")


def evaluate(args: argparse.Namespace) -> None:
    """Evaluate every exit of a trained detector, the routed detector and rivals; recommend what to ship."""
    from earlyexit_ssd.config import load_config
    from earlyexit_ssd.pipeline import evaluate_model
    from earlyexit_ssd.report.tables import text_report

    cfg = load_config(args.config, args.overrides)
    metrics = evaluate_model(cfg, args.weights or Path(cfg.OUTPUT_DIR) / "model.pth", args.out)
    if metrics:
        print(text_report(metrics))
        print(f"\nresults: {args.out}/ (report.html, metrics.json, table, charts, pictures)")


def calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, "that names the splits (DATA)")
    parser.add_argument("--weights", help="model.pth, shipped weights or a checkpoint; OUTPUT_DIR/model.pth by default")
    parser.add_argument("--out", help="folder of the certificate; OUTPUT_DIR/calibration by default")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--speedup", type=float, help="smallest ratio of the mean cost without exits to the routed one")
    target.add_argument("--ap-drop", type=float, help="largest loss of AP50, in 1 - delta of the bootstrap draws")
    target.add_argument("--risk", type=float, help="largest expected loss per photo, with probability 1 - delta")
    delta = "failure probability of --risk, --ap-drop; CALIBRATION.DELTA by default"
    parser.add_argument("--delta", type=float, help=delta)
    parser.add_argument("--learned", action="store_true", help="learn thresholds by gradient descent, not by a search")
    add_block(parser, "for --risk and --ap-drop: ")


def add_block(parser: argparse.ArgumentParser, condition: str = "") -> None:
    block = f"{condition}consecutive frames that count as one photo, such as 25, or 5s with --fps"
    parser.add_argument("--block", metavar="SECONDS|N", help=block)
    parser.add_argument("--fps", type=float, help="frames per second, for --block in seconds")


def block_of(args: argparse.Namespace) -> int | None:
    """Return the number of photos of --block; None without it."""
    from earlyexit_ssd.data.duplicates import parse_block
    from earlyexit_ssd.errors import EarlyExitError

    if args.fps is not None and args.block is None:
        raise EarlyExitError("--fps is for --block in seconds, such as --block 5s")
    return None if args.block is None else parse_block(args.block, args.fps)


def calibrate(args: argparse.Namespace) -> None:
    """Calibrate the routing of a trained detector for a speed-up, a loss of AP50 or a risk; write a certificate."""
    from earlyexit_ssd.config import load_config
    from earlyexit_ssd.errors import EarlyExitError
    from earlyexit_ssd.pipeline.calibrate import CalibrationTarget, calibrate

    cfg = load_config(args.config, args.overrides)
    out = Path(args.out or Path(cfg.OUTPUT_DIR) / "calibration")
    kind = next(kind for kind in ("speedup", "ap_drop", "risk") if getattr(args, kind) is not None)
    if args.delta is not None and kind == "speedup":
        raise EarlyExitError("--delta is for --risk and --ap-drop; leave it out with --speedup")
    delta = cfg.CALIBRATION.DELTA if args.delta is None else args.delta
    target = CalibrationTarget(kind, getattr(args, kind), delta, block_of(args), args.learned)
    if calibrate(cfg, args.weights or Path(cfg.OUTPUT_DIR) / "model.pth", target, out):
        print((out / "calibration.txt").read_text(encoding="utf-8"))
        print(f"results: {out}/ (report.html, model.pth with this routing, certificate.json, calibration.txt)")


def optimize_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, "that names the detector (MODEL.WEIGHTS) and the splits (DATA)")
    parser.add_argument("--weights", help="model.pth to start from; the checkpoint MODEL.WEIGHTS by default")
    parser.add_argument("--ap-drop", type=float, default=0.01, help="largest loss of AP50 (default 0.01)")
    parser.add_argument("--coco-ap-drop", type=float, help="largest loss of AP (IoU 0.5 to 0.95); no limit by default")
    share = "share of bootstrap draws that may lose more; CALIBRATION.DELTA by default"
    parser.add_argument("--delta", type=float, help=share)
    add_block(parser)
    wanted = parser.add_mutually_exclusive_group()
    wanted.add_argument("--speedup", type=float, help="smallest ratio of the original detector's time to the result's")
    wanted.add_argument("--ms", type=float, help="largest mean milliseconds per photo on this machine")
    runtimes = ("onnxruntime", "openvino", "eager")
    runtime = "runtime of the timing; by default EVAL.RUNTIME, or onnxruntime if that is eager"
    parser.add_argument("--runtime", choices=runtimes, help=runtime)
    parser.add_argument("--budget-minutes", type=float, help="start no candidate after this time")
    parser.add_argument("--train", action="store_true", help="also fine-tune for smaller inputs (section FINE_TUNING)")
    int8 = "also try the chosen detector in 8 bits (OpenVINO: pip install nncf)"
    parser.add_argument("--int8", action="store_true", help=int8)
    parser.add_argument("--out", help="folder of the results; OUTPUT_DIR/optimize by default")


def optimize(args: argparse.Namespace) -> None:
    """Search for the fastest detector within a limit on the loss of AP50: input size, head, glances and exits."""
    from earlyexit_ssd.config import load_config
    from earlyexit_ssd.pipeline.optimize import Goal, optimize

    configured = load_config(args.config, args.overrides).EVAL.RUNTIME
    runtime = args.runtime or ("onnxruntime" if configured == "eager" else configured)
    cfg = load_config(args.config, [*args.overrides, "EVAL.RUNTIME", runtime])
    out = Path(args.out or Path(cfg.OUTPUT_DIR) / "optimize")
    delta = cfg.CALIBRATION.DELTA if args.delta is None else args.delta
    limits = {"ap_drop": args.ap_drop, "coco_ap_drop": args.coco_ap_drop, "delta": delta, "block": block_of(args)}
    tried = {"train": args.train, "int8": args.int8}
    goal = Goal(**limits, speedup=args.speedup, ms=args.ms, minutes=args.budget_minutes, **tried)
    outcome = optimize(cfg, goal, out, args.weights)
    print(*outcome.candidates, f"\n{outcome.summary}", sep="\n")
    files = "report.html, summary.txt, optimize.json" + (", model.pth, test/" if outcome.chosen else "")
    print(f"\nresults: {out}/ ({files})")
    if outcome.chosen is not None:
        file = "detector.xml" if cfg.EVAL.RUNTIME == "openvino" else "detector.onnx"
        print("run it:" if outcome.ship else "try it, but do not ship it:", predict_line(f"{out}/{file}"))


def predict_line(file: str) -> str:
    """Return the command that runs an exported detector."""
    option = " --runtime openvino" if file.endswith(".xml") else ""
    return f"earlyexit predict --weights {quote(file)}{option} PHOTO"


def predict_arguments(parser: argparse.ArgumentParser) -> None:
    sources = "photo, folder, pattern, video, number of a camera, or address (rtsp://...)"
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help=sources)
    weights = "exported detector (.onnx, .xml, staged folder), or shipped weights or model.pth, which run in PyTorch; "
    weights += f"{DEFAULT_WEIGHTS} by default"
    parser.add_argument("--weights", default=DEFAULT_WEIGHTS, help=weights)
    parser.add_argument("--config", help="YAML file with the exits and the routing of a PyTorch checkpoint")
    runtimes = ("onnxruntime", "openvino")
    parser.add_argument("--runtime", choices=runtimes, default="onnxruntime", help="runtime of exported files")
    parser.add_argument("--threads", type=int, help="CPU threads; 1 for exported detectors, all for PyTorch")
    parser.add_argument("--out", default="output/predict", help="folder of the results; output/predict by default")
    saves = "pictures (PNG, MP4; default), json (COCO results), csv (row per detection), counts (row per frame), "
    saves += "labels (data set in COCO format), none"
    parser.add_argument("--save", default="pictures", metavar="WHAT,...", help=saves)
    parser.add_argument("--show", action="store_true", help="show the pictures in a window too")
    parser.add_argument("--score", type=float, default=0.5, help="score threshold of detections (default 0.5)")
    parser.add_argument("--stride", type=int, default=1, help="use every n-th frame of videos and cameras (default 1)")
    parser.add_argument("--frames", type=int, help="largest number of frames of each video or camera")
    parser.add_argument("--all-exits", action="store_true", help="draw the detections of every exit (PyTorch only)")
    stream = parser.add_argument_group("streams", "repeat the last detections while the picture changes little")
    stream.add_argument("--stream", metavar="RULE.json", help="rule to use, or to write with --calibrate-stream")
    share = "calibrate a rule on the sources, which changes the detections of at most this share of frames"
    stream.add_argument("--calibrate-stream", type=float, metavar="SHARE", help=share)
    stream.add_argument("--delta", help="failure probability (default 0.05); none: no guarantee")
    block = "consecutive frames that count as one independent draw (default 150)"
    stream.add_argument("--block", type=int, help=block)
    stream.add_argument("--most-repeats", type=int, help="largest number of repeats in a row (default 10)")


def predict(args: argparse.Namespace) -> None:
    """Detect in photos, videos and cameras; print the detections, the exit and the milliseconds."""
    from earlyexit_ssd.console import write_line
    from earlyexit_ssd.deploy.predict import TABLES, annotate, is_exported, open_predictor, predict
    from earlyexit_ssd.deploy.sources import find_sources
    from earlyexit_ssd.deploy.stream import load_stream_rule
    from earlyexit_ssd.errors import DataError, EarlyExitError, shown

    if not 0 <= args.score <= 1:
        raise EarlyExitError(f"score {args.score}: expected a number in [0, 1]")
    for flag, limit in (("frames", 2**31), ("stride", 2**31), ("threads", 1024)):
        if (value := getattr(args, flag)) is not None and not 1 <= value <= limit:
            raise EarlyExitError(f"--{flag} {shown(value)}: expected 1 to {limit}")
    for flag in ("delta", "block", "most_repeats"):
        if getattr(args, flag) is not None and args.calibrate_stream is None:
            raise EarlyExitError(f"--{flag.replace('_', '-')} is for --calibrate-stream; leave it out")
    sources, draw = find_sources(args.sources), annotate
    if is_exported(args.weights):
        if args.config or args.all_exits:
            raise EarlyExitError(f"{args.weights} is exported; --config and --all-exits are for a model.pth")
        detector = open_predictor(args.weights, args.runtime, args.threads or 1, args.score)
    else:
        if args.runtime == "openvino":
            raise EarlyExitError(f"{args.weights} runs in PyTorch; for OpenVINO write a file with earlyexit export")
        try:
            import torch
        except ImportError:
            fix = "install it, or name an exported detector (earlyexit export) with --weights"
            raise EarlyExitError(f"{args.weights} runs in PyTorch, which is not installed; {fix}") from None
        from earlyexit_ssd.config import load_config
        from earlyexit_ssd.pipeline.predictor import open_torch_predictor

        if args.threads:
            torch.set_num_threads(args.threads)
        detector = open_torch_predictor(args.weights, load_config(args.config) if args.config else None)
        detector.note_calibration_photos(source.name for source in sources if source.kind == "photo")
        draw = detector.side_by_side if args.all_exits else draw
    if args.calibrate_stream is not None:
        return _calibrate_stream(args, detector, sources)
    rule = load_stream_rule(args.stream) if args.stream else None
    settings = {"save": args.save.split(","), "score": args.score, "stride": args.stride, "most_frames": args.frames}
    failed = 0
    for answer in predict(detector, sources, args.out, **settings, show=args.show, rule=rule, draw=draw):
        if isinstance(answer, DataError):
            failed += 1
            write_line(f"error: {answer}")
        else:
            print(answer)
    tables = [TABLES[name] for name in map(str.strip, settings["save"]) if name in TABLES]
    if tables:
        print(f"results: {args.out}/ ({', '.join(tables)})")
    if failed:
        raise EarlyExitError(f"{failed} of the photos, frames or sources could not be used, see above")


def _calibrate_stream(args: argparse.Namespace, detector: object, sources: list) -> None:
    from earlyexit_ssd.deploy.predict import images_of
    from earlyexit_ssd.deploy.sources import count_frames
    from earlyexit_ssd.deploy.stream import FEW_EVENTS, calibrate_stream
    from earlyexit_ssd.errors import EarlyExitError
    from earlyexit_ssd.files import make_folder, require_not_input

    if not args.stream:
        raise EarlyExitError("--calibrate-stream writes a rule: name its file with --stream, such as rule.json")
    require_not_input(args.stream, [args.weights, *(source.name for source in sources)])
    if args.frames is None and any(source.kind == "live" for source in sources):
        raise EarlyExitError("--calibrate-stream on a camera needs --frames: the number of frames to record")
    try:
        delta = None if args.delta == "none" else float(args.delta or "0.05")
    except ValueError:
        raise EarlyExitError(f"--delta {args.delta}: expected a number in (0, 1), or none") from None
    frames, most = images_of(sources, args.stride, args.frames), count_frames(sources, args.stride, args.frames)
    make_folder(Path(args.stream).parent)
    numbers = {"block": args.block, "most_repeats": args.most_repeats, "most_frames": most}
    numbers = {name: number for name, number in numbers.items() if number is not None}
    rule = calibrate_stream(detector, frames, args.calibrate_stream, delta, score=args.score, **numbers)
    rule = replace(rule, stride=args.stride)
    rule.save(args.stream)
    print(f"{args.stream}: repeat the last detections while the change is at most {rule.threshold:.2f} grey levels")
    print(rule.figures)
    if rule.figures.events < FEW_EVENTS:
        print("the detections changed too seldom to test the rule: record frames of busier hours")
    if not rule.figures.wins:
        print("every n-th frame (--stride) is at least as good on these frames: use --stride instead")


def export_arguments(parser: argparse.ArgumentParser) -> None:
    models = f"model.pth of a run, torchvision checkpoint, or shipped weights: {', '.join(SHIPPED)}"
    parser.add_argument("model", help=models)
    parser.add_argument("--out", required=True, help="file (.onnx, .xml) to write, or folder with --format staged")
    parser.add_argument("--format", default="onnx", choices=("onnx", "staged", "openvino"), help="onnx by default")
    parser.add_argument("--photos", nargs="+", default=[], help="photos of the comparison; rendered by default")
    parser.add_argument("--full", action="store_true", help="export the full path without exits")
    parser.add_argument(
        "--int8", action="store_true", help="write the detector in 8 bits; OpenVINO needs pip install nncf"
    )
    boxes = "for --int8: labels of --photos (COCO JSON); by default the detections in 32 bits are the labels"
    parser.add_argument("--annotations", help=boxes)
    parser.add_argument("--ap-drop", type=float, help="for --int8: largest loss of AP50 (default 0.01)")


def export(args: argparse.Namespace) -> None:
    """Write a detector with its routing as one file for ONNX Runtime or OpenVINO, without PyTorch."""
    from earlyexit_ssd.deploy.sources import find_sources
    from earlyexit_ssd.errors import EarlyExitError
    from earlyexit_ssd.files import require_not_input
    from earlyexit_ssd.pipeline.export import export_detector, open_any

    require_not_input(args.out, [args.model, *args.photos])
    model = open_any(args.model, router=not args.full)
    if args.int8:
        from earlyexit_ssd.pipeline.int8 import export_int8, photos_to_quantise_on

        if len(args.photos) != 1:
            raise EarlyExitError("--int8 needs one folder of photos like those of use: --photos DIR")
        ap_drop = 0.01 if args.ap_drop is None else args.ap_drop
        if not 0 <= ap_drop <= 1:
            raise EarlyExitError(f"--ap-drop is {ap_drop:g}, expected a number in [0, 1]")
        dataset = photos_to_quantise_on(args.photos[0], args.annotations, model.classes)
        print(export_int8(model, args.out, args.format, dataset, ap_drop))
    else:
        for flag, value in (("--annotations", args.annotations), ("--ap-drop", args.ap_drop)):
            if value is not None:
                raise EarlyExitError(f"{flag} is for --int8; leave it out, or add --int8")
        photos = [source.name for source in find_sources(args.photos) if source.kind == "photo"]
        if args.photos and not photos:
            raise EarlyExitError(f"--photos {' '.join(args.photos)[:80]} has no photo; name photos or their folder")
        print(export_detector(model, args.out, args.format, photos))
    print("run it:", predict_line(args.out))


def benchmark_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "detectors",
        nargs="+",
        metavar="DETECTOR",
        help="exported detector (.onnx, .xml for OpenVINO, staged folder), the routed detector first; model.pth, "
        "checkpoint or shipped weights, in eager PyTorch; compile:FILE, the full path with torch.compile; "
        "FORMAT:FILE, an ONNX file of another project (yolox:, nanodet:, picodet:, boxes:)",
    )
    parser.add_argument("--photos", nargs="+", required=True, help="photos or folders, preferably photos of use")
    parser.add_argument("--most", type=int, help="largest number of photos, chosen at random (default: all)")
    parser.add_argument("--threads", type=int, nargs="+", help="numbers of CPU threads (default: 1 and all)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="batch sizes (default: 1 and 16)")
    parser.add_argument("--rounds", type=int, default=1, help="passes over the photos (default 1)")
    parser.add_argument("--score", type=float, default=0.5, help="score threshold of detections (default 0.5)")
    parser.add_argument("--out", default="output/benchmark.json", help="JSON file of the figures (default %(default)s)")


def benchmark(args: argparse.Namespace) -> None:
    """Time detectors side by side on your photos and machine, from a decoded photo to its detections."""
    import os
    import random

    from earlyexit_ssd.console import write_line
    from earlyexit_ssd.deploy.benchmark import benchmark, machine, table
    from earlyexit_ssd.deploy.sources import Source, find_sources, read_frames
    from earlyexit_ssd.errors import DataError, EarlyExitError
    from earlyexit_ssd.files import make_folder, require_not_input, write_json

    if Path(args.out).suffix.lower() != ".json" or Path(args.out).is_dir():
        raise EarlyExitError(f"--out {args.out}: expected a JSON file, such as benchmark.json")
    if args.most is not None and args.most < 1:
        raise EarlyExitError(f"--most {args.most}: expected at least 1")
    contestants = [_contestant(argument) for argument in args.detectors]
    photos = [source.name for source in find_sources(args.photos) if source.kind == "photo"]
    if args.most is not None and len(photos) > args.most:
        photos = sorted(random.Random(0).sample(photos, args.most))
    for photo in list(photos):
        if isinstance(problem := next(read_frames(Source(photo, "photo"))), DataError):
            write_line(f"left out: {problem}")
            photos.remove(photo)
    require_not_input(args.out, [*args.detectors, *photos])
    threads = args.threads or sorted({1, os.cpu_count() or 1})
    make_folder(Path(args.out).parent)
    machine_before = machine()  # its load must not include this benchmark
    rows = benchmark(contestants, photos, threads, args.batch, args.rounds, args.score)
    settings = {"detectors": args.detectors, "photos": len(photos), "rounds": args.rounds, "score": args.score}
    print(table(rows))  # before the file, which may turn out not to be writable
    write_json(args.out, {"machine": machine_before, "settings": settings, "rows": [*map(asdict, rows)]})
    versions = ", ".join(f"{name} {number}" for name, number in machine_before["versions"].items())
    print(f"{machine_before['processor']}, {machine_before['cores']} cores, {machine_before['system']}; {versions}")
    load = machine_before["load"]
    if load is not None and load > 0.5:
        print(f"the load was {load:.1f} before the start, so other programs ran too; trust the CPU time")
    print(f"results: {args.out}")


def _contestant(argument: str) -> object:
    """Return the detector of a DETECTOR argument."""
    from earlyexit_ssd.deploy.benchmark import ExportedFile
    from earlyexit_ssd.deploy.predict import is_exported
    from earlyexit_ssd.errors import EarlyExitError

    kind, colon, path = argument.partition(":")
    if not colon or len(kind) == 1:  # one letter is a Windows drive
        kind, path = "", argument
    if not kind and is_exported(path):
        return ExportedFile(path)
    try:
        from earlyexit_ssd.pipeline.predictor import RivalFile, TorchModel
    except ImportError as error:
        raise EarlyExitError(f"{argument} needs PyTorch ({error}); name files of earlyexit export") from None
    return RivalFile(path, kind) if kind not in ("", "compile") else TorchModel(path, compiled=bool(kind))


def doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("data", "model"), help="what to check")
    add_config(parser, "that names the splits (DATA) and the detector (MODEL)")
    weights = "for a model: model.pth, checkpoint or shipped name; OUTPUT_DIR/model.pth by default"
    parser.add_argument("--weights", help=weights)
    parser.add_argument("--photos", type=int, help="for a model: number of DATA.CALIB photos (default 200)")
    parser.add_argument("--out", help="folder for doctor.json")


def doctor(args: argparse.Namespace) -> int:
    """Check data or a model for failures that raise no error."""
    from earlyexit_ssd.config import load_config
    from earlyexit_ssd.errors import EarlyExitError
    from earlyexit_ssd.pipeline.doctor import doctor_data, doctor_model

    cfg = load_config(args.config, args.overrides)
    if args.what == "data":
        for flag, value in (("--weights", args.weights), ("--photos", args.photos)):
            if value is not None:
                raise EarlyExitError(f"{flag} {value}: is for doctor model; leave it out for doctor data")
        report = doctor_data(cfg)
    else:
        weights = args.weights or Path(cfg.OUTPUT_DIR) / "model.pth"
        report = doctor_model(cfg, weights, 200 if args.photos is None else args.photos)
    print(report)
    if args.out:
        report.write(args.out)
        print(f"results: {Path(args.out) / 'doctor.json'}")
    return 1 if report.diagnosis.bad else 0


@dataclass(frozen=True)
class Command:
    """A subcommand. The docstring of ``job`` is its summary in the help."""

    job: Callable[[argparse.Namespace], int | None]  # returns the exit code; None is 0
    add_arguments: Callable[[argparse.ArgumentParser], None]
    examples: str  # end of the help
    after_a_stop: str = "run it again"  # advice to the user after a signal or a full disk


COMMANDS = {
    "train": Command(train, train_arguments, TRAIN_EXAMPLES, after_a_stop="go on with --resume"),
    "evaluate": Command(evaluate, evaluate_arguments, EVALUATE_EXAMPLES),
    "calibrate": Command(calibrate, calibrate_arguments, CALIBRATE_EXAMPLES),
    "optimize": Command(optimize, optimize_arguments, OPTIMIZE_EXAMPLES, after_a_stop="run it again to continue"),
    "predict": Command(predict, predict_arguments, PREDICT_EXAMPLES),
    "export": Command(export, export_arguments, EXPORT_EXAMPLES),
    "benchmark": Command(benchmark, benchmark_arguments, BENCHMARK_EXAMPLES),
    "doctor": Command(doctor, doctor_arguments, DOCTOR_EXAMPLES),
}


PACKAGES_OF_MODELS = ("torch", "torchvision", "pycocotools", "fvcore", "albumentations", "scipy", "yaml", "cv2")
"""Packages for training and for models in PyTorch. Exported detectors run on photos without them."""


def run(name: str, prog: str, arguments: Sequence[str] | None = None) -> int:
    """Run the subcommand ``name`` with ``arguments`` (``sys.argv[1:]`` by default). Return the exit code, see
    `earlyexit_ssd.console.run_tool`. ``prog`` is the program's name in the help."""
    command = COMMANDS[name]
    parser = _parser(prog, command.job.__doc__, command.examples)
    command.add_arguments(parser)
    args = parser.parse_intermixed_args(arguments)
    from earlyexit_ssd.console import run_tool
    from earlyexit_ssd.errors import EarlyExitError

    def job() -> int | None:
        for name, value in vars(args).items():
            if value == "" or (isinstance(value, list) and "" in value and name != "overrides"):
                raise EarlyExitError(f"{name} is empty (an unset shell variable?); give a value, or leave it out")
        try:
            return command.job(args)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in PACKAGES_OF_MODELS:
                raise
            fix = "install the project with its dependencies (pip install -e .); predict and benchmark need no PyTorch"
            raise EarlyExitError(f"{prog} needs the package {package}, which is missing: {fix}") from None

    return run_tool(job, command.after_a_stop)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``earlyexit``. The first argument is the name of the subcommand."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = _parser("earlyexit", "Train, calibrate and deploy SSDLite detectors with early exits.", TOP_EXAMPLES)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, command in COMMANDS.items():
        subparsers.add_parser(name, help=command.job.__doc__, add_help=False)
    name = parser.parse_args(words[:1]).command
    return run(name, f"earlyexit {name}", words[1:])


def _parser(prog: str, description: str, examples: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


if __name__ == "__main__":
    sys.exit(main())
