"""The command ``earlyexit``: its subcommands with their arguments, examples and jobs.

The module lies beside the package, because importing the package imports torch. A job imports the package when it
starts, so that ``--help`` and wrong arguments need no torch. The scripts in tools/ are the same commands.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

SHIPPED = sorted(path.stem for path in (Path(__file__).parent / "earlyexit_ssd" / "weights").glob("*.json"))
DEFAULT_WEIGHTS = "voc_animals" if "voc_animals" in SHIPPED else "".join(SHIPPED[:1])

TOP_EXAMPLES = """
examples:
  earlyexit train --config configs/quickstart.yaml
      render a synthetic data set, train everything from scratch, evaluate: no download, minutes on a CPU
  earlyexit predict dog.jpg
      detect on a photo of yours with weights that come with the package
  earlyexit train --help
      the arguments of a command, with more examples
"""
TRAIN_EXAMPLES = """
examples:
  %(prog)s --config configs/quickstart.yaml
      render a synthetic data set, train everything from scratch, evaluate: no download, minutes on a CPU
  %(prog)s --config configs/voc_animals.yaml DATA.ROOT ~/data MODEL.WEIGHTS COCO_V1
      put exits on torchvision's COCO detector for seven classes
  %(prog)s --config my.yaml --resume
      continue a run that was stopped or killed
  torchrun --nproc-per-node 2 tools/train_net.py --config my.yaml
      two processes that share each batch, and the photos of evaluations

exit codes: 0 done, 2 bad input, 3 a gate failed (the figures and what to try are printed), 130 stopped by a signal
Every key and its default: docs/config.md
"""
EVALUATE_EXAMPLES = """
examples:
  %(prog)s --config configs/quickstart.yaml --out results
      the model.pth in OUTPUT_DIR of the configuration, on its test split
  %(prog)s --config configs/voc_animals.yaml --weights model.pth --out results \\
      ROUTING.POLICY max_foreground ROUTING.THRESHOLDS "(0.5, 0.7)"
      other weights, another routing
  %(prog)s --config configs/voc_animals.yaml --out results EVAL.RUNTIME onnxruntime \\
      EVAL.RIVALS.ONNX "['yolox:yolox_nano.onnx']" EVAL.RIVALS.SINGLE_EXITS "[output/exit12/model.pth]"
      two more rivals, beside plain detectors with smaller inputs and each exit alone; all timed in ONNX Runtime
  torchrun --nproc-per-node 2 tools/eval_exits.py --config configs/voc_animals.yaml --out results
      two processes share the photos; the first one measures milliseconds and writes

How to read the figures: docs/metrics.md
"""
CALIBRATE_EXAMPLES = """
examples:
  %(prog)s --config configs/voc_animals.yaml --risk 0.02 --delta 0.05
      the expected loss of a photo (missed and added detections / those of the full path) is at most 0.02, with
      probability 0.95
  %(prog)s --config configs/chair_stream.yaml --ap-drop 0.01 ROUTING.POLICY foreseen_emptiness
      the least cost with at most 0.01 AP50 lost in 95 %% of the bootstrap draws of calibration photos
  %(prog)s --config configs/voc_animals.yaml --speedup 1.4 EVAL.RUNTIME onnxruntime
      the best AP50 at 1/1.4 of the cost of the detector without exits, measured in ONNX Runtime
  %(prog)s --config configs/voc_animals.yaml --risk 0.05 --block 5s --fps 5 \\
      DATA.DATASETS "[[learn, '', frames/learn], [calib, '', frames/calib], [test, '', frames/test]]" \\
      DATA.TRAIN "[learn]" DATA.CALIB "[calib]" DATA.TEST "[test]"
      frames of a camera without labels, 5 per second; frames of 5 s count as one draw
  torchrun --nproc-per-node 2 tools/calibrate.py --config configs/voc_animals.yaml --ap-drop 0.01
      two processes share the photos

The calib split (DATA.CALIB) chooses the thresholds. TRAIN fits a policy that has parameters. TEST is not used. The
result is a model.pth with this routing (for --weights of evaluate and predict, and for from_pretrained) and a
certificate (for ROUTING.CERTIFICATE). How it works: docs/routing.md
"""
OPTIMIZE_EXAMPLES = """
examples:
  %(prog)s --config mine.yaml --ap-drop 0.01
      the fastest detector that loses at most 0.01 AP50 in 95 %% of the bootstrap draws of calib photos
  %(prog)s --config mine.yaml --weights output/mine/model.pth --speedup 2
      at least twice as fast, with the least loss; the branches of a trained model are candidates too
  %(prog)s --config mine.yaml --train
      try smaller inputs with fine-tuned weights too; minutes to hours on a CPU
  %(prog)s --config mine.yaml --ms 20 --budget-minutes 30 EVAL.RIVALS.ONNX "['yolox:yolox_nano.onnx']"
      at most 20 ms a photo; start no candidate after 30 minutes; compare with YOLOX-nano in the chart

The calib split (DATA.CALIB) chooses, TRAIN fits policies, TEST is used once, at the end. Run the command again to
continue a search that was stopped. docs/choosing.md says what to expect.
"""
PREDICT_EXAMPLES = f"""
examples:
  %(prog)s dog.jpg street.png
      with weights that come with the package: print what is found and write output/predict/dog.png and street.png
  %(prog)s --weights detector.onnx ~/photos "frames/*.jpg" --save json,counts
      an exported detector, without PyTorch; a folder and a pattern; detections.json (COCO results) and counts.csv
  %(prog)s --weights detector.onnx street.mp4 --save pictures,csv --stride 2
      every second frame of a video: output/predict/street.mp4 with boxes, exit and milliseconds, and detections.csv
  %(prog)s --weights detector.onnx 0 --show --save none
      the first camera, in a window; Ctrl-C or q ends it. rtsp://... is taken too
  %(prog)s --weights detector.onnx monday.mp4 --calibrate-stream 0.02 --stream camera.json
  %(prog)s --weights detector.onnx rtsp://... --stream camera.json --save counts
      calibrate on this camera's frames, then repeat the last detections while the picture changes little: at most
      2 %% of the frames get other detections than without the rule
  %(prog)s room.jpg --weights output/quickstart/model.pth --all-exits --score 0.3
      a model in PyTorch; the detections of every exit side by side, with a frame around the exit taken
  %(prog)s room.jpg --weights checkpoint.pth --config mine.yaml
      exits trained with torchvision's train.py; the configuration has the exits and their routing

Shipped weights: {", ".join(SHIPPED)}; their figures: docs/model_zoo.md. More: docs/predict.md
exit codes: 0 done, 2 something could not be read (the rest is done), 130 stopped by a signal
"""
EXPORT_EXAMPLES = """
examples:
  %(prog)s output/chair/model.pth --out chair.onnx
      one file from photo to detections, with the calibrated routing; first compared with the model on rendered photos
  %(prog)s voc_animals --out animals --format staged --photos ~/photos
      shipped weights; a folder with a file for each segment, compared with the model on your photos
  %(prog)s output/chair/model.pth --out chair.xml --format openvino
      OpenVINO's own format (pip install openvino)
  %(prog)s output/chair/model.pth --out chair.xml --format openvino --int8 --photos frames --annotations frames.json
      in 8 bits (pip install nncf); refused if it is slower here, or loses more AP50 than --ap-drop

How to run what it writes, without PyTorch: docs/deploy.md
"""
BENCHMARK_EXAMPLES = """
examples:
  %(prog)s chair.onnx chair_full.onnx coco.onnx --photos ~/photos
      what routing brings: the exported detector, the same one exported with --full, and the one that it comes from
  %(prog)s chair.onnx coco.onnx chair.xml coco.xml coco.pth compile:coco.pth --photos ~/photos --threads 1 \\
      --batch 1 --rounds 3 --out benchmark.json
      in ONNX Runtime, in OpenVINO (.xml), in eager PyTorch and with torch.compile; each photo three times
  %(prog)s chair.onnx yolox:yolox_nano.onnx --photos ~/photos --most 100
      against a small net of another kind, on 100 of the photos

Every detector runs in a process of its own, in turns on each photo. Without PyTorch it takes exported detectors.
How to read the table: docs/deploy.md
"""

DOCTOR_EXAMPLES = """
examples:
  %(prog)s data --config mine.yaml
      before a training: sizes, empty photos, copies across splits, boxes that fit no default box, rare classes
  %(prog)s model --config configs/voc_animals.yaml --weights voc_animals DATA.ROOT ~/data
      200 photos of DATA.CALIB through a model: does it detect, and do its exits, temperatures and routing make sense?
  %(prog)s model --config mine.yaml --weights checkpoint.pth --out output/doctor
      any checkpoint of torchvision's SSDLite, with or without exits; doctor.json too

exit codes: 0 nothing bad was found, 1 something was, 2 bad input
What each figure means: docs/doctor.md
"""


def add_config(parser: argparse.ArgumentParser, what: str) -> None:
    """Add ``--config`` and the keys that override it."""
    parser.add_argument("--config", required=True, help=f"YAML file {what}; configs/ has examples")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="override keys of the configuration")


def train_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, "of the run")
    parser.add_argument("--resume", action="store_true", help="continue the run in OUTPUT_DIR")
    parser.add_argument("--force", action="store_true", help="continue after a failed gate; every later report says so")


def train(args: argparse.Namespace) -> None:
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
    target.add_argument("--speedup", type=float, help="least mean cost without exits / mean cost routed")
    target.add_argument("--ap-drop", type=float, help="largest loss of AP50, in 1 - delta of the draws")
    target.add_argument("--risk", type=float, help="largest expected loss per photo, with probability 1 - delta")
    parser.add_argument("--delta", type=float, default=0.05, help="failure probability for --risk and --ap-drop; 0.05")
    parser.add_argument("--learned", action="store_true", help="learn thresholds by gradient descent, not by a search")
    parser.add_argument(
        "--block",
        metavar="SECONDS|N",
        help="for --risk and --ap-drop: consecutive photos of a folder (frames of a video) that count as one draw, "
        "25 (photos) or 5s (seconds, with --fps)",
    )
    parser.add_argument("--fps", type=float, help="photos of a folder per second, for --block in seconds")


def calibrate(args: argparse.Namespace) -> None:
    from earlyexit_ssd.config import load_config
    from earlyexit_ssd.data.repeats import parse_block
    from earlyexit_ssd.errors import EarlyExitError
    from earlyexit_ssd.pipeline.calibrate import Target, calibrate

    cfg = load_config(args.config, args.overrides)
    out = Path(args.out or Path(cfg.OUTPUT_DIR) / "calibration")
    kind = next(kind for kind in ("speedup", "ap_drop", "risk") if getattr(args, kind) is not None)
    if args.fps is not None and args.block is None:
        raise EarlyExitError("--fps is for --block in seconds, such as --block 5s")
    block = None if args.block is None else parse_block(args.block, args.fps)
    target = Target(kind, getattr(args, kind), args.delta, block, args.learned)
    if calibrate(cfg, args.weights or Path(cfg.OUTPUT_DIR) / "model.pth", target, out):
        print((out / "calibration.txt").read_text(encoding="utf-8"))
        print(f"results: {out}/ (report.html, model.pth with this routing, certificate.json, calibration.txt)")


def optimize_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, "that names the detector (MODEL.WEIGHTS) and the splits (DATA)")
    parser.add_argument("--weights", help="a model.pth to start from; by default the checkpoint MODEL.WEIGHTS")
    parser.add_argument("--ap-drop", type=float, default=0.01, help="largest loss of AP50, 0.01")
    parser.add_argument("--coco-ap-drop", type=float, help="largest loss of AP over IoU 0.5 to 0.95; not limited")
    parser.add_argument("--delta", type=float, default=0.05, help="share of the draws that may lose more; 0.05")
    wanted = parser.add_mutually_exclusive_group()
    wanted.add_argument("--speedup", type=float, help="least time of the detector as it is / time of the result")
    wanted.add_argument("--ms", type=float, help="largest mean milliseconds per photo on this machine")
    parser.add_argument(
        "--runtime", choices=("onnxruntime", "openvino", "eager"), default="onnxruntime", help="for timing; onnxruntime"
    )
    parser.add_argument("--budget-minutes", type=float, help="start no further candidate after this time")
    parser.add_argument(
        "--train",
        action="store_true",
        help="fine-tune for smaller inputs too, on DATA.TRAIN (section FINE_TUNING)",
    )
    parser.add_argument("--out", help="folder of the results; OUTPUT_DIR/optimize by default")


def optimize(args: argparse.Namespace) -> None:
    from earlyexit_ssd.config import load_config
    from earlyexit_ssd.pipeline.optimize import Goal, optimize

    cfg = load_config(args.config, [*args.overrides, "EVAL.RUNTIME", args.runtime])
    out = Path(args.out or Path(cfg.OUTPUT_DIR) / "optimize")
    limits = {"ap_drop": args.ap_drop, "coco_ap_drop": args.coco_ap_drop, "delta": args.delta}
    goal = Goal(**limits, speedup=args.speedup, ms=args.ms, minutes=args.budget_minutes, train=args.train)
    outcome = optimize(cfg, goal, out, args.weights)
    for one in outcome.candidates:
        print(one)
    print(f"\n{outcome.summary}")
    print(f"\nresults: {out}/ (report.html, summary.txt, model.pth, optimize.json, test/)")
    if outcome.chosen is not None:
        file = "detector.xml --runtime openvino" if args.runtime == "openvino" else "detector.onnx"
        print(f"run it: earlyexit predict --weights {out}/{file} PHOTO")


def predict_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="photo, folder, pattern, video, number of a camera, or address (rtsp://...)",
    )
    parser.add_argument(
        "--weights",
        default=DEFAULT_WEIGHTS,
        help="an exported detector (.onnx, .xml, a folder of stages), a shipped name or a model.pth (these two run in "
        f"PyTorch); {DEFAULT_WEIGHTS} by default",
    )
    parser.add_argument("--config", help="YAML file with the exits and the routing of a PyTorch checkpoint")
    parser.add_argument("--runtime", choices=["onnxruntime", "openvino"], default="onnxruntime", help="for exports")
    parser.add_argument("--threads", type=int, help="CPU threads; by default 1 for an export, all for PyTorch")
    parser.add_argument("--out", default="output/predict", help="folder of the results; output/predict by default")
    parser.add_argument(
        "--save",
        default="pictures",
        metavar="WHAT,...",
        help="pictures (PNG, MP4), json (COCO results), csv (a row for each detection), counts (a row for each frame), "
        "none; pictures",
    )
    parser.add_argument("--show", action="store_true", help="show the pictures in a window too")
    parser.add_argument("--score", type=float, default=0.5, help="least score of a detection; 0.5")
    parser.add_argument("--stride", type=int, default=1, help="use every n-th frame of videos and cameras; 1")
    parser.add_argument("--frames", type=int, help="largest number of frames of each video or camera")
    parser.add_argument("--all-exits", action="store_true", help="draw the detections of every exit (PyTorch only)")
    stream = parser.add_argument_group("streams", "repeat the last detections while the picture changes little")
    stream.add_argument("--stream", metavar="RULE.json", help="rule to use, or to write with --calibrate-stream")
    stream.add_argument(
        "--calibrate-stream",
        type=float,
        metavar="SHARE",
        help="write a rule that changes the detections of at most this share of frames, fitted on the sources",
    )
    stream.add_argument("--delta", default="0.05", help="failure probability, or none for no guarantee; 0.05")
    stream.add_argument("--block", type=int, default=150, help="consecutive frames that count as one draw; 150")
    stream.add_argument("--most-repeats", type=int, default=10, help="largest number of repeats in a row; 10")


def predict(args: argparse.Namespace) -> None:
    from earlyexit_ssd.deploy.predict import annotate, is_exported, open_predictor, predict
    from earlyexit_ssd.deploy.sources import find_sources
    from earlyexit_ssd.deploy.stream import load_stream_rule
    from earlyexit_ssd.errors import DataError, EarlyExitError
    from earlyexit_ssd.progress import write_line

    if not 0 <= args.score <= 1:
        raise EarlyExitError(f"score {args.score}: expected a number in [0, 1]")
    if args.frames is not None and args.frames < 1:
        raise EarlyExitError(f"--frames {args.frames}: expected at least 1")
    sources, draw = find_sources(args.sources), annotate
    if is_exported(args.weights):
        if args.config or args.all_exits:
            raise EarlyExitError(f"{args.weights} is exported; --config and --all-exits are for a model.pth")
        detector = open_predictor(args.weights, args.runtime, args.threads or 1, args.score)
    else:
        try:
            import torch
        except ImportError:
            raise EarlyExitError(
                f"{args.weights} runs in PyTorch, which is not installed; name an exported detector with --weights, as "
                "earlyexit export writes it"
            ) from None
        from earlyexit_ssd.config import load_config
        from earlyexit_ssd.pipeline.predictor import open_torch_predictor

        if args.threads:
            torch.set_num_threads(args.threads)
        detector = open_torch_predictor(args.weights, load_config(args.config) if args.config else None)
        detector.note_calibration_photos(source.name for source in sources if source.kind == "photo")
        draw = detector.side_by_side if args.all_exits else draw
    if args.calibrate_stream is not None:
        _calibrate_stream(args, detector, sources)
        return
    rule = load_stream_rule(args.stream) if args.stream else None
    settings = {"save": args.save.split(","), "score": args.score, "stride": args.stride, "most_frames": args.frames}
    failed = 0
    for answer in predict(detector, sources, args.out, **settings, show=args.show, rule=rule, draw=draw):
        if isinstance(answer, DataError):
            failed += 1
            write_line(f"error: {answer}")
        else:
            print(answer)
    if failed:
        raise EarlyExitError(f"{failed} photos or frames could not be used, see above")


def _calibrate_stream(args: argparse.Namespace, detector: object, sources: list) -> None:
    from earlyexit_ssd.deploy.predict import images_of
    from earlyexit_ssd.deploy.stream import FEW_EVENTS, calibrate_stream
    from earlyexit_ssd.errors import EarlyExitError

    if not args.stream:
        raise EarlyExitError(
            "--calibrate-stream writes a rule: name its file with --stream, such as --stream rule.json"
        )
    try:
        delta = None if args.delta == "none" else float(args.delta)
    except ValueError:
        raise EarlyExitError(f"--delta {args.delta}: expected a number in (0, 1), or none") from None
    rule = calibrate_stream(
        detector,
        images_of(sources, args.stride, args.frames),
        args.calibrate_stream,
        delta,
        args.block,
        args.score,
        args.most_repeats,
    )
    rule.save(args.stream)
    print(
        f"{args.stream}: an answer is repeated at a change of at most {rule.threshold:.2f} grey levels\n{rule.figures}"
    )
    if rule.figures.events < FEW_EVENTS:
        print("that is little: record hours in which more happens, since the rule is as good as what was there to miss")
    if not rule.figures.wins:
        print("every n-th frame (--stride) is at least as good on these frames: use that instead")


def deploy_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=f"model.pth of a run, or shipped weights: {', '.join(SHIPPED)}")
    parser.add_argument("--out", required=True, help="file (.onnx, .xml) to write, or folder with --format staged")
    parser.add_argument("--format", default="onnx", choices=("onnx", "staged", "openvino"), help="onnx by default")
    parser.add_argument("--photos", nargs="+", default=[], help="photos for the comparison; rendered ones by default")
    parser.add_argument("--full", action="store_true", help="export the full path without exits")
    parser.add_argument(
        "--int8", action="store_true", help="weights and activations in 8 bits, if faster here (pip install nncf)"
    )
    parser.add_argument(
        "--annotations", help="of --int8: boxes of --photos (COCO JSON); without them agreement is measured"
    )
    parser.add_argument("--ap-drop", type=float, default=0.01, help="of --int8: AP50 that it may lose; 0.01")


def export(args: argparse.Namespace) -> None:
    from earlyexit_ssd.deploy.sources import find_sources
    from earlyexit_ssd.errors import EarlyExitError
    from earlyexit_ssd.pipeline.export import export_detector, open_any

    model = open_any(args.model, router=not args.full)
    if args.int8:
        from earlyexit_ssd.pipeline.int8 import export_int8, photos_to_quantise_on

        if len(args.photos) != 1:
            raise EarlyExitError("--int8 needs one folder of photos like those of use: --photos DIR")
        if not 0 <= args.ap_drop <= 1:
            raise EarlyExitError(f"--ap-drop is {args.ap_drop:g}, expected a number in [0, 1]")
        dataset = photos_to_quantise_on(args.photos[0], args.annotations, model.classes)
        print(export_int8(model, args.out, args.format, dataset, args.ap_drop))
    else:
        if args.annotations:
            raise EarlyExitError("--annotations is for --int8; leave it out, or add --int8")
        photos = [source.name for source in find_sources(args.photos) if source.kind == "photo"]
        print(export_detector(model, args.out, args.format, photos))
    runtime = ", 'openvino'" if args.format == "openvino" else ""
    print(f"run it: from earlyexit_ssd.deploy import Predictor; Predictor({args.out!r}{runtime})(photo)")


def benchmark_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "detectors",
        nargs="+",
        metavar="DETECTOR",
        help="what earlyexit export wrote (.onnx, .xml in OpenVINO, a folder of stages), the routed one first; a "
        "model.pth, a checkpoint or shipped weights in eager PyTorch; compile:FILE, its full path with torch.compile; "
        "FORMAT:FILE, an ONNX file of another kind (yolox:, nanodet:, picodet:, boxes:)",
    )
    parser.add_argument("--photos", nargs="+", required=True, help="photos or folders; best those of use")
    parser.add_argument("--most", type=int, help="take so many of the photos at most, a seeded choice; all")
    parser.add_argument("--threads", type=int, nargs="+", help="of each detector, in turn; 1 and all")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="photos in a call, in turn; 1 and 16")
    parser.add_argument("--rounds", type=int, default=1, help="times over all photos; 1")
    parser.add_argument("--score", type=float, default=0.5, help="least score of a detection; 0.5")
    parser.add_argument("--out", default="output/benchmark.json", help="file for all figures; output/benchmark.json")


def benchmark(args: argparse.Namespace) -> None:
    import dataclasses
    import os
    import random

    from earlyexit_ssd.deploy.benchmark import benchmark, machine, table
    from earlyexit_ssd.deploy.sources import find_sources
    from earlyexit_ssd.errors import EarlyExitError
    from earlyexit_ssd.files import make_folder, write_json

    if args.most is not None and args.most < 1:
        raise EarlyExitError(f"--most {args.most}: expected at least 1")
    contestants = [_contestant(word) for word in args.detectors]
    photos = [source.name for source in find_sources(args.photos) if source.kind == "photo"]
    if args.most is not None and len(photos) > args.most:
        photos = sorted(random.Random(0).sample(photos, args.most))
    threads = args.threads or sorted({1, os.cpu_count() or 1})
    before = machine()
    rows = benchmark(contestants, photos, threads, args.batch, args.rounds, args.score)
    settings = {"detectors": args.detectors, "photos": len(photos), "rounds": args.rounds, "score": args.score}
    figures = {"machine": before, "settings": settings, "rows": [dataclasses.asdict(row) for row in rows]}
    make_folder(Path(args.out).parent)
    write_json(args.out, figures)
    print(table(rows))
    versions = ", ".join(f"{name} {number}" for name, number in before["versions"].items())
    print(f"{before['processor']}, {before['cores']} cores, {before['system']}; {versions}")
    if before["load"] is not None and before["load"] > 0.5:
        print(f"the load was {before['load']:.1f} before the start: others computed too; trust the CPU's time")
    print(f"results: {args.out}")


def _contestant(word: str) -> object:
    from earlyexit_ssd.deploy.benchmark import ExportedFile
    from earlyexit_ssd.deploy.predict import is_exported
    from earlyexit_ssd.errors import EarlyExitError

    kind, colon, path = word.partition(":")
    if not colon or len(kind) == 1:  # C:\...
        kind, path = "", word
    if not kind and is_exported(path):
        return ExportedFile(path)
    try:
        from earlyexit_ssd.pipeline.predictor import Rival, TorchModel
    except ImportError as error:
        raise EarlyExitError(f"{word} needs PyTorch ({error}); name files that earlyexit export wrote") from None
    return Rival(path, kind) if kind not in ("", "compile") else TorchModel(path, compiled=bool(kind))


def doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("data", "model"), help="what to look at")
    add_config(parser, "that names the splits (DATA) and the detector (MODEL)")
    parser.add_argument("--weights", help="of a model: a file or a shipped name; OUTPUT_DIR/model.pth by default")
    parser.add_argument("--photos", type=int, default=200, help="of DATA.CALIB, for a model; 200")
    parser.add_argument("--out", help="folder for doctor.json")


def doctor(args: argparse.Namespace) -> int:
    from earlyexit_ssd.config import load_config
    from earlyexit_ssd.pipeline.doctor import doctor_data, doctor_model

    cfg = load_config(args.config, args.overrides)
    weights = args.weights or Path(cfg.OUTPUT_DIR) / "model.pth"
    report = doctor_data(cfg) if args.what == "data" else doctor_model(cfg, weights, args.photos)
    print(report)
    if args.out:
        report.write(args.out)
        print(f"results: {Path(args.out) / 'doctor.json'}")
    return 1 if report.diagnosis.bad else 0


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        summary: its line in ``earlyexit --help``.
        examples: the end of its help; ``%(prog)s`` is replaced by the command.
        add_arguments: function that adds its arguments to a parser.
        job: function that runs it; it returns the exit code, None for 0.
        after_a_stop: advice to the user after a signal or a full disk has stopped the job.
    """

    summary: str
    examples: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    job: Callable[[argparse.Namespace], int | None]
    after_a_stop: str = "run it again"


COMMANDS = {
    "train": Command(
        "Train a detector with early exits, phase by phase, each with its gate, and evaluate it.",
        TRAIN_EXAMPLES, train_arguments, train, after_a_stop="go on with --resume",
    ),
    "evaluate": Command(
        "Evaluate every exit of a trained detector, the routed detector and rivals; recommend what to ship.",
        EVALUATE_EXAMPLES, evaluate_arguments, evaluate,
    ),
    "calibrate": Command(
        "Calibrate the routing of a trained detector for a target of yours, and write a certificate.",
        CALIBRATE_EXAMPLES, calibrate_arguments, calibrate,
    ),
    "optimize": Command(
        "Search for the fastest detector within an accuracy budget, over input sizes, heads, glances and exits.",
        OPTIMIZE_EXAMPLES, optimize_arguments, optimize, after_a_stop="run it again to continue",
    ),
    "predict": Command(
        "Detect in photos, videos and cameras; print the detections, the exit and the milliseconds.",
        PREDICT_EXAMPLES, predict_arguments, predict,
    ),
    "export": Command(
        "Write a detector with its routing as one file that ONNX Runtime or OpenVINO runs, without PyTorch.",
        EXPORT_EXAMPLES, deploy_arguments, export,
    ),
    "benchmark": Command(
        "Time detectors side by side on your photos and machine, from a decoded photo to its detections.",
        BENCHMARK_EXAMPLES, benchmark_arguments, benchmark,
    ),
    "doctor": Command(
        "Check data or a model for the known ways in which a training goes wrong without an error.",
        DOCTOR_EXAMPLES, doctor_arguments, doctor,
    ),
}  # fmt: skip


WHOLE_INSTALLATION = ("torch", "torchvision", "pycocotools", "fvcore", "albumentations", "scipy", "yaml", "cv2")
"""Packages that a device without PyTorch may lack."""


def run(name: str, prog: str, arguments: Sequence[str] | None = None) -> int:
    """Parse ``arguments`` (by default those of the process) for the subcommand ``name`` and run its job.

    Args:
        prog: name of the program in the help.

    Returns:
        the exit code, see :func:`earlyexit_ssd.command_line.run_tool`.
    """
    command = COMMANDS[name]
    parser = _parser(prog, command.summary, command.examples)
    command.add_arguments(parser)
    args = parser.parse_intermixed_args(arguments)
    from earlyexit_ssd.command_line import run_tool
    from earlyexit_ssd.errors import EarlyExitError

    def job() -> int | None:
        try:
            return command.job(args)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in WHOLE_INSTALLATION:
                raise
            fix = "install the project with its dependencies (pip install -e .); predict and benchmark need no PyTorch"
            raise EarlyExitError(f"{prog} needs the package {package}, which is missing: {fix}") from None

    return run_tool(job, command.after_a_stop)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command ``earlyexit``: the first word names the subcommand, the others are its arguments."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = _parser("earlyexit", "Train, calibrate and deploy SSDLite detectors with early exits.", TOP_EXAMPLES)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, command in COMMANDS.items():
        subparsers.add_parser(name, help=command.summary, add_help=False)
    name = parser.parse_args(words[:1]).command
    return run(name, f"earlyexit {name}", words[1:])


def _parser(prog: str, description: str, examples: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=prog, description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )


if __name__ == "__main__":
    sys.exit(main())
