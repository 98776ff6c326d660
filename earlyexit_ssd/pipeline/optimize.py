"""Search for the fastest variant of a detector within an accuracy budget, measured on this machine.

The steps of `optimize`:

1. Measure the candidates (`earlyexit_ssd.pipeline.candidates`) on the calib split. Before a candidate with exits is
   measured, a search finds its thresholds.
2. Choose one candidate. A candidate holds the budget if an upper bound of its loss on the calib split is within it.
3. Write the chosen model and the exported file.
4. Evaluate the chosen model on the test split, and recommend to ship it or not.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torchvision.models.detection.ssd import SSD, SSDScoringHead

from earlyexit_ssd import files
from earlyexit_ssd.calibration.certificate import Measured
from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.console import progress
from earlyexit_ssd.data import class_names, load_dataset
from earlyexit_ssd.data.dataset import fingerprint, to_coco
from earlyexit_ssd.data.duplicates import blocks_of
from earlyexit_ssd.deploy import Predictor
from earlyexit_ssd.errors import ConfigError, EarlyExitError, import_package
from earlyexit_ssd.evaluation.cost import ONNX_RUNTIME, OPENVINO, PlainPath, example_input, time_in_runtime
from earlyexit_ssd.evaluation.matches import ap_of_choice, bootstrap_choices, exit_matches, interval, photo_counts
from earlyexit_ssd.evaluation.outputs import collect_detections
from earlyexit_ssd.evaluation.results import JsonDataclass, Results
from earlyexit_ssd.evaluation.verdict import SHIP_INSTEAD
from earlyexit_ssd.modeling import COCO_CLASSES, Architecture, load_model, save_model
from earlyexit_ssd.modeling.checkpoint import ModelInfo, weights_hash
from earlyexit_ssd.modeling.heads import find_competing_rows, slice_rows
from earlyexit_ssd.modeling.retrofit import UNFOLDED, resize_detector
from earlyexit_ssd.pipeline import build, replay
from earlyexit_ssd.pipeline.calibrate import FoundThresholds, ThresholdSearch, certificate_of, draws_needed
from earlyexit_ssd.pipeline.candidates import (
    BASE_FILE,
    COMPACT,
    CUT,
    OWN_HEAD,
    Candidate,
    Goal,
    Plan,
    TestFigures,
    choose_candidate,
)
from earlyexit_ssd.pipeline.evaluate import evaluate_model, onnx_rivals
from earlyexit_ssd.pipeline.export import EXPORT_PHOTOS, SUFFIXES, Format, export_detector, open_any
from earlyexit_ssd.pipeline.int8 import detect, export_int8
from earlyexit_ssd.pipeline.phases import fine_tune
from earlyexit_ssd.pipeline.run import RunFolder
from earlyexit_ssd.pipeline.train import train_phases
from earlyexit_ssd.plain import read_json
from earlyexit_ssd.report.page import never_failing, search_page, write_page
from earlyexit_ssd.report.pictures import candidates_chart
from earlyexit_ssd.routing import ExitRouter
from earlyexit_ssd.routing.policies import POLICIES

logger = logging.getLogger(__name__)

FORMAT_OF_RUNTIME: dict[str, Format] = {ONNX_RUNTIME: "onnx", OPENVINO: "openvino"}  # runtime -> format of its files

MODEL_FILES = ("model.pth", "detector.onnx", "detector.xml", "detector.bin")  # the last two with OpenVINO
GLANCE_COST = 0.15
"""Approximate cost of a glance as a share of the detector's time. Every photo has this cost, so a glance can save time
only if a larger share of the photos leaves."""

NOT_IN_KEY = {"OUTPUT_DIR": "auto", "DATA.ROOT": "", "DATA.WORKERS": 0, "EVAL.RIVALS.ONNX": ()}
"""Settings that may change when a search continues, since the figures of the candidates do not depend on them."""

NetWeights = tuple[Architecture, dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Outcome(JsonDataclass):
    """Result of `optimize`, the content of optimize.json. Figures of candidates are on the calib split."""

    base: Candidate
    chosen: Candidate | None  # see `choose_candidate`
    candidates: tuple[Candidate, ...]  # the base detector first; with rivals
    test: TestFigures | None
    ship: bool  # see `TestFigures.worth_shipping`
    summary: str  # one paragraph
    untried: int = 0  # candidates that the time limit left out


@files.locks_folder("out_dir")
def optimize(
    cfg: CfgNode, goal: Goal, out_dir: str | os.PathLike[str], weights: str | os.PathLike[str] | None = None
) -> Outcome:
    """Run the search and write the chosen model. A stopped search keeps the measured candidates when it runs again.

    ``out_dir`` gets model.pth, detector.onnx, test/ (the evaluation of the chosen model), optimize.json,
    candidates.png, summary.txt and report.html. If OpenVINO is the runtime, ``out_dir`` also gets detector.xml. The
    runtime's file is in 8 bits if ``goal.int8`` is true and 8 bits hold the budget and are faster. The speed-up of 8
    bits is measured from photo to detections. The milliseconds in 8 bits are those in 32 bits divided by it.

    Args:
        weights: a trained model of this project, whose branches are tried too; None: MODEL.WEIGHTS.

    Raises:
        EarlyExitError: unusable weights, data or settings.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise EarlyExitError("optimize under torchrun: it times networks and runs in one process; start it without")
    runtime = cfg.EVAL.RUNTIME
    if goal.int8 and runtime not in FORMAT_OF_RUNTIME:
        raise EarlyExitError(f"8 bits do not run in {runtime}; add --runtime onnxruntime or --runtime openvino")
    if goal.int8 and runtime == OPENVINO:
        import_package("nncf")
    given, out = weights or cfg.MODEL.WEIGHTS, Path(out_dir)
    for name in (*MODEL_FILES, BASE_FILE):
        files.require_not_input(out / name, [given])
    _warn_if_busy()
    stop_at = np.inf if goal.minutes is None else time.monotonic() + 60 * goal.minutes
    search = CandidateSearch(cfg, weights, goal, out)
    if search.few_draws:
        logger.warning("%s", search.few_draws)
    (measured, untried), rivals = _measure_candidates(search, stop_at), search.rivals()
    measured, best = _choose(search, measured)
    chosen = None if best is None else best.candidate
    written = () if chosen is None else MODEL_FILES if runtime == OPENVINO else MODEL_FILES[:2]
    for path in (out / name for name in MODEL_FILES if name not in written):
        if path.exists():  # of an earlier search, and not to be taken for the result of this one
            with files.writing(path):
                os.replace(path, path.with_name(f"former_{path.name}"))
            logger.warning("%s is of an earlier search: renamed to former_%s", path, path.name)
    results, test, ship, int8 = None, None, False, None
    if best is None:
        summary = _summary_without_choice(measured, goal)
    else:
        chosen = _write_model(search, best)
        if goal.int8:
            chosen, int8 = _choose_8_bits(search, measured, best)
        measured = [chosen if candidate.key == chosen.key else candidate for candidate in measured]
        results = _evaluate(search)
        test = TestFigures.of(results)
        if int8 is not None:
            test = _test_in_8_bits(search, test, speed=chosen.ms / int8.ms)
            chosen = int8
        ship = test.worth_shipping(goal)
        summary = _summary(chosen, test, ship, goal)
        findings = results.verdict.findings if results.verdict else ()
        for better in (finding.line for finding in findings if finding.line.startswith(SHIP_INSTEAD)):
            summary += f" A rival is better on the test photos{better.removeprefix(SHIP_INSTEAD)}. Look at it first."
    if untried:
        summary += f" The search stopped after {goal.minutes:g} minutes: {untried} candidates were not tried."
    if search.few_draws:
        summary += f" The choice is uncertain: {search.few_draws}."
    candidates = (*measured, *rivals, *([int8] if int8 else []))
    outcome = Outcome(measured[0], chosen, candidates, test, ship, summary, untried)
    content = outcome.to_json()
    files.write_json(search.out / "optimize.json", content)
    files.write_text(search.out / "summary.txt", summary + "\n")
    files.write_image(search.out / "candidates.png", candidates_chart(content, runtime))
    with never_failing(search.out / "report.html"):
        write_page(search.out / "report.html", search_page(content, results))
    return outcome


def _warn_if_busy() -> None:
    """Log a warning if more processes run than there are cores."""
    cores, load = os.cpu_count() or 1, os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > cores:
        logger.warning("the machine is busy (load %.1f on %d cores): milliseconds will be unreliable", load, cores)


def _measure_candidates(search: CandidateSearch, stop_at: float) -> tuple[list[Candidate], int]:
    """Measure the candidates one after another, the base detector first. Return them, and the number of those that
    were left out because of the time.

    Each result is stored in candidates.json. A resumed search takes the stored results. After ``stop_at``, a time of
    `time.monotonic`, only the base detector is still measured.
    """
    path, plan = search.out / "candidates.json", search.candidates
    content = read_json(path, "candidates of a search", "delete it") if path.is_file() else {"key": search.key}
    measured: dict[str, Candidate] = {}
    if isinstance(content, dict) and content.get("key") == search.key:
        measured = {name: Candidate.from_json(each) for name, each in content.get("candidates", {}).items()}
    else:
        logger.info("%s is of a search with other settings, photos or weights: all candidates are measured again", path)
    search.base_ms = next((base.ms for base in measured.values()), None)

    def done(candidate: Candidate) -> bool:
        return candidate.key in measured or search.plan.skips(candidate, measured.values())

    for index, candidate in enumerate(progress(plan, desc="candidates")):
        if done(candidate):
            continue
        if measured and time.monotonic() > stop_at:
            untried = sum(not done(rest) for rest in plan[index:])
            logger.warning("stopped after %g minutes: %d candidates not tried", search.goal.minutes, untried)
            return list(measured.values()), untried
        candidate = search.measure(candidate).candidate
        net = measured.get(candidate.net.key)
        if net and candidate.exits and min(candidate.thresholds) >= CLOSED:  # the same network, timed again
            candidate = dataclasses.replace(candidate, ms=net.ms, speedup=net.speedup)
        measured[candidate.key] = candidate
        stored = {key: value.to_json() for key, value in measured.items()}
        files.write_json(path, {"key": search.key, "candidates": stored})
        logger.info("%s", measured[candidate.key])
    return list(measured.values()), 0


class MeasuredCandidate(NamedTuple):
    """A candidate with its figures, and what is needed to save it."""

    candidate: Candidate
    recorded: replay.ModelOnSplits
    search: ThresholdSearch | None = None  # None without exits
    found: FoundThresholds | None = None


class CandidateSearch:
    """Builds and measures the candidates of one detector. Arguments: see `optimize`.

    Attributes:
        model, architecture, info: the given detector, with its exits.
        plan, candidates: the `Plan`, and its candidates in the order in which they are tried.
        blocks: number of the block of each calib photo, int [n]; None: every photo is a block.
        base: the base detector's recorded outputs on the calib split.
        reference: the base detector's detections, which losses are measured against.
        key: hash of the weights, photos and settings that determine the figures of the candidates.
        base_ms: milliseconds of the base detector in its first measurement; None before it.
    """

    base_ms: float | None = None

    def __init__(self, cfg: CfgNode, weights: str | os.PathLike[str] | None, goal: Goal, out: Path) -> None:
        self.goal, self.out, self.device = goal, out, build.evaluation_device(cfg)
        cfg = build.with_values(cfg, {"CALIBRATION.COST": "ms", "EVAL.RIVALS.ENABLED": True})
        replay.check_settings(cfg, self.device)
        if weights is None and not cfg.MODEL.WEIGHTS:
            raise ConfigError("a search needs a trained detector: set MODEL.WEIGHTS, or give --weights")
        if weights is None:
            model, architecture = build.build_model(_without_untrained_branches(cfg), class_names(cfg))
            self.model, self.architecture, self.info = model, architecture, {"taken_over": True}
        else:
            whole_head = build.with_values(cfg, {"MODEL.FOLD": _fold_to_search(cfg)})
            self.model, self.architecture, self.info = build.open_model(whole_head, weights)
        self.cfg = cfg = build.with_classes(cfg, self.architecture.classes)
        self.model = self.model.to(self.device).eval()
        self.plan = Plan(cfg, goal, self.architecture)
        if self.plan.trains_jointly:  # raises if the folder holds a training with other settings
            RunFolder(out / "joint").require_free(self._joint_cfg, resume=True)
        # frames within a block may look alike
        splits = replay.disjoint_sets(cfg, ("CALIB", "TEST"), include_near_duplicates=goal.block is None)
        self.sets, self.duplicates = splits
        for name in ("TEST", "CALIB"):
            self.blocks = blocks_of(self.sets[name], goal.block)
            if self.blocks is not None and not self.blocks.any():
                photos = f"all {len(self.blocks)} photos of DATA.{name} are in one block"
                raise EarlyExitError(f"--block {goal.block}: {photos}; use shorter blocks, or more photos")
        self._replays: dict[tuple[Candidate, str], replay.Replay] = {}
        self.base = self._replay(Candidate("", self.architecture.image_size, OWN_HEAD), "CALIB")
        self.reference = self.base.detections[-1]
        self.candidates = self.plan.candidates(with_empty_exits=self.has_empty_photos)
        keys = [candidate.key for candidate in self.candidates]
        photos = [*map(fingerprint, (load_dataset(cfg, cfg.DATA.TRAIN, labels="optional"), self.sets["CALIB"]))]
        goal = dataclasses.replace(goal, minutes=None, int8=False)
        settings = build.with_values(cfg, NOT_IN_KEY).dump(), goal, self.architecture
        text = f"{weights_hash(self.model)} {photos} {settings} {keys}"
        self.key = hashlib.sha256(text.encode()).hexdigest()

    @property
    def has_empty_photos(self) -> bool:
        """Whether the base detector detects nothing in more than a share `GLANCE_COST` of the calib photos. Only then
        can glances save time."""
        photos = self.reference.values()
        empty = sum(not (detections["scores"] >= self.cfg.EVAL.SCORE).any() for detections in photos)
        return empty > GLANCE_COST * len(photos)

    @property
    def few_draws(self) -> str:
        """What the calib split lacks for the budget; empty if it has enough photos, or blocks of photos."""
        draws = len(self.base) if self.blocks is None else int(self.blocks.max()) + 1
        unit, size = ("photos", "") if self.blocks is None else ("blocks", f" of {self.goal.block} photos")
        needed, score = draws_needed(self.goal.budget), self.cfg.EVAL.SCORE
        objects = sum(int((detections["scores"] >= score).sum()) for detections in self.reference.values())
        found = f"the calib split has only {draws} {unit}{size}, where your detector finds {objects} objects"
        return "" if draws >= needed else f"{found}; a budget of {self.goal.ap_drop:g} needs at least {needed} {unit}"

    # Measurement.

    def measure(self, candidate: Candidate) -> MeasuredCandidate:
        """Measure a candidate on the calib split. With exits, return the fastest result of all `_policies` that holds
        the budget (the fastest of all if none holds it)."""
        recorded, calib = self._build(candidate), self._replay(candidate.net, "CALIB").only(candidate.exits)
        if not candidate.exits:
            plain = None if candidate.key == self.candidates[0].key else self.model  # the base is timed once
            costs = replay.measure_cost_model(self.cfg, recorded.model, ExitRouter(0), plain)
            unrouted = FoundThresholds((), np.zeros(len(calib), np.int64), Measured())
            return MeasuredCandidate(self._with_figures(candidate, calib, costs, unrouted), recorded)
        policies = self._policies(recorded.model.empty)
        results = [self._measure_routed(candidate, recorded, calib, policy) for policy in policies]
        return min(results, key=lambda result: (not result.candidate.holds, result.candidate.ms or np.inf))

    def _policies(self, empty: Sequence[bool]) -> list[str]:
        """Return the policies to try for exits that are ``empty`` or not. An empty exit needs a policy that reads the
        tap, so ROUTING.POLICY is tried only if every exit has a branch."""
        if all(empty):
            return ["foreseen_emptiness"]
        return ["learned_gain"] if any(empty) else list(dict.fromkeys([self.cfg.ROUTING.POLICY, "learned_gain"]))

    def _measure_routed(
        self, candidate: Candidate, recorded: replay.ModelOnSplits, calib: replay.Replay, policy: str
    ) -> MeasuredCandidate:
        """Fit the policy, search the thresholds that meet the goal, and measure the candidate with them."""
        cfg, model = self.cfg, recorded.model
        train = self._fitting_photos(candidate) if POLICIES.find(policy).needs_training_photos else None
        temperatures = replay.temperatures_of(replay.fit_temperatures(cfg, calib), model.exit_names)
        router, confidences = replay.fit_router(cfg, policy, temperatures, calib, train, groups=self.blocks)
        costs = replay.measure_cost_model(cfg, model, router, self.model)
        target = self.goal.target(self.base_ms or costs.plain)
        search = ThresholdSearch(
            cfg, target, router, confidences, calib, None, costs, self.blocks, baseline=self.reference
        )
        try:
            found = search.run()
        except EarlyExitError:  # the wanted speed is impossible even if every photo leaves at the first exit
            search = dataclasses.replace(search, target=self.goal.budget)
            found = search.run()
        candidate = dataclasses.replace(candidate, policy=policy, thresholds=found.thresholds)
        return MeasuredCandidate(self._with_figures(candidate, calib, costs, found), recorded, search, found)

    def _with_figures(
        self, candidate: Candidate, calib: replay.Replay, costs: replay.CostModel, found: FoundThresholds
    ) -> Candidate:
        """Return the candidate with its figures on the calib split, if the photos leave at ``found.exits``."""
        matches, base_choice = calib.matches_with_extra_exit(self.reference)
        choices = [base_choice, found.exits]
        before, after = (ap_of_choice(matches, choice, ap50_only=True).AP50 for choice in choices)

        def loss_bound(figure: str) -> float:
            draws = {"seed": self.cfg.SEED, "ap50_only": figure == "AP50", "blocks": self.blocks}
            base, routed = bootstrap_choices(matches, choices, **draws)
            return float(np.nanquantile(getattr(base, figure) - getattr(routed, figure), 1 - self.goal.delta))

        bound, ap_bound = found.measured.AP50_lost_bound, None
        bound = loss_bound("AP50") if bound is None else bound
        holds = bound <= self.goal.ap_drop
        if holds and self.goal.coco_ap_drop is not None:
            ap_bound = loss_bound("AP")
            holds = ap_bound <= self.goal.coco_ap_drop
        agreement = calib.agreement(found.exits, self.reference)
        speedup = costs.plain / float(costs.per_exit(found.thresholds)[found.exits].mean())
        self.base_ms = self.base_ms or costs.plain
        exits = zip(candidate.exits, found.thresholds, strict=True)
        opened = [name for name, threshold in exits if threshold < CLOSED]
        return dataclasses.replace(
            candidate,
            name=candidate.describe(opened, self.architecture.image_size),
            AP50=after,
            lost=_difference(before, after),
            lost_bound=bound,
            objects=agreement.objects,
            objects_kept=agreement.kept,
            ms=self.base_ms / speedup,
            speedup=speedup,
            holds=holds,
            AP_lost_bound=ap_bound,
        )

    def rivals(self) -> list[Candidate]:
        """Measure the detectors from ONNX files (EVAL.RIVALS.ONNX) on the calib split, for the chart."""
        measured, runs, threads = [], self.cfg.EVAL.TIMING_RUNS, self.cfg.EVAL.TIMING_THREADS
        for rival in onnx_rivals(self.cfg, self.architecture.classes):
            detections = collect_detections(rival.detector, build.evaluation_loader(self.cfg, self.sets["CALIB"]))
            networks, examples = [rival.network, PlainPath(self.model)], [rival.example, example_input(self.model)]
            timing, base_timing = time_in_runtime(networks, examples, ONNX_RUNTIME, runs, threads)
            # in the matches the rival is the last exit, and the full path is the exit before it
            matches, rival_choice = self.base.matches_with_extra_exit(detections)
            choices = [rival_choice - 1, rival_choice]
            before, after = (ap_of_choice(matches, choice, ap50_only=True).AP50 for choice in choices)
            speedup, name, ms = base_timing.ms / timing.ms, f"{rival.name} (in ONNX Runtime)", timing.ms
            if self.cfg.EVAL.RUNTIME == ONNX_RUNTIME:
                name, ms = rival.name, (self.base_ms or base_timing.ms) / speedup
            figures = {"ms": ms, "speedup": speedup, "mmacs": rival.mmacs}
            figures |= {"AP50": after, "lost": _difference(before, after)}
            measured.append(Candidate(name, int(rival.example.shape[-1]), "its own", **figures, rival=True))
        return measured

    # Recorded outputs.

    def _replay(self, net: Candidate, split: str) -> replay.Replay:
        """Return the outputs of a net with all its exits on a split. The latest of each split is kept in memory."""
        if (net, split) not in self._replays:
            self._replays = {key: stored for key, stored in self._replays.items() if key[1] != split}
            exits = tuple(exit_.name for exit_ in self.plan.exits_of(net))
            self._replays[net, split] = self._build(dataclasses.replace(net, exits=exits)).replay(split)
        return self._replays[net, split]

    def _fitting_photos(self, candidate: Candidate) -> replay.Replay:
        """Return the outputs on the training photos that the candidate's policy is fitted on.

        Candidates share these recordings. So the outputs are always those at the detector's own input size. A glance
        gets nearly the same small copy of a photo at every size. If the net is not newly trained, the outputs are those
        with the detector's own head.
        """
        net = dataclasses.replace(candidate.net, image_size=self.architecture.image_size)
        if not (net.fine_tuned or net.joint):
            net = dataclasses.replace(net, fold=OWN_HEAD)
        return self._replay(net, "TRAIN").only(candidate.exits)

    # Networks.

    def _build(self, candidate: Candidate) -> replay.ModelOnSplits:
        """Build the candidate's model. The result also has the splits and the folder of the net's recordings."""
        architecture, state = self.architecture, self.model.state_dict()
        if candidate.fine_tuned:
            architecture, state = self._fine_tuned
        elif candidate.joint:
            architecture, state = self._jointly_trained
        elif candidate.fold == CUT:
            architecture, state = self._cut
        elif candidate.fold == COMPACT:
            architecture, state = self._compact
        architecture = dataclasses.replace(
            architecture,
            image_size=candidate.image_size,
            trained_size=architecture.trained_size or architecture.image_size,
            exits=tuple(exit_ for exit_ in self.plan.exits_of(candidate) if exit_.name in candidate.exits),
        )
        model = architecture.build().to(self.device).eval()
        model.load_state_dict({key: state[key] for key in model.state_dict()})
        folder = self.out / "recordings" / candidate.net.key.replace(" ", "_")
        return replay.ModelOnSplits(self.cfg, model, architecture, self.info, self.sets, self.duplicates, folder)

    def full_path(self) -> SSD:
        """Return a copy of the detector's full path."""
        return resize_detector(self.model, self.architecture, self.architecture.image_size)

    @functools.cached_property
    def _compact(self) -> NetWeights:
        """The full path with a compact head (`earlyexit_ssd.modeling.heads`), at its own size."""
        detector = self.full_path()
        head = detector.head.classification_head
        wanted = self.architecture.folded_rows  # rows of the wanted classes in the folded head
        whole = detector.head.classification_head = SSDScoringHead(head.module_list, head.num_columns)
        photos = build.photos_for_compact_head(self.cfg, self.architecture.classes)
        competing = find_competing_rows(detector, wanted, photos, self.cfg.MODEL.COMPACT_TOLERANCE)
        slice_rows(whole, (*wanted, *competing))
        is_coco = head.num_columns == len(COCO_CLASSES) + 1
        architecture = dataclasses.replace(
            self.architecture,
            head_outputs=whole.num_columns,
            folded_rows=tuple(range(1, len(wanted) + 1)),
            competing=tuple(COCO_CLASSES[row - 1] if is_coco else f"class_{row}" for row in competing),
            folded_branches=True,
        )
        return architecture, detector.state_dict()

    @functools.cached_property
    def _cut(self) -> NetWeights:
        """The full path with a head of the wanted classes only, at its own size."""
        detector = resize_detector(self.model, self.architecture, self.architecture.image_size, cut=True)
        return dataclasses.replace(self.architecture, **UNFOLDED), detector.state_dict()

    @functools.cached_property
    def _fine_tuned(self) -> NetWeights:
        """The full path with the best head, fine-tuned at all tried sizes and at the sizes of the glances."""
        recorded = self._build(Candidate("", self.architecture.image_size, self.plan.best_head))
        student, architecture = recorded.model, recorded.architecture
        sizes = self.plan.sizes()
        sizes += [pixels for pixels, _ in self.plan.glances if self.has_empty_photos and student.any_size]
        fine_tune(self.cfg, student, architecture, self.model, sizes, self.sets["CALIB"], self.out / "fine_tuned")
        return architecture, student.state_dict()

    @functools.cached_property
    def _jointly_trained(self) -> NetWeights:
        """The detector with the configured exits after its last phase, which is the joint phase."""
        with files.locked_folder(self.out / "joint"):
            model, architecture, _ = load_model(train_phases(self._joint_cfg))
        return architecture, model.state_dict()

    @property
    def _joint_cfg(self) -> CfgNode:
        return build.with_values(self.cfg, {"OUTPUT_DIR": str(self.out / "joint"), "CALIBRATION.TARGET": ""})


def _fold_to_search(cfg: CfgNode) -> str:
    """Return MODEL.FOLD for the base detector, whose head is not compact, since compact heads are candidates."""
    return "rows" if cfg.MODEL.FOLD == "rows" else "exact"


def _without_untrained_branches(cfg: CfgNode) -> CfgNode:
    """Return the configuration for a checkpoint that is not trained further.

    The head is not compact. If any exit has a branch, which would be untrained, only the glances remain.
    """
    values = {"MODEL.FOLD": _fold_to_search(cfg)}
    if set(cfg.EXITS.LAYERS) != set(cfg.EXITS.EMPTY):
        values |= {"EXITS.LAYERS": (), "EXITS.EMPTY": ()}
        values |= {f"EXITS.{key}": cfg.EXITS[key][:1] for key in ("BRANCH", "COPY", "DEPTH")}
    return build.with_values(cfg, values)


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else before - after


def _choose(search: CandidateSearch, measured: Sequence[Candidate]) -> tuple[list[Candidate], MeasuredCandidate | None]:
    """Return the ``measured`` candidates, and the one to ship. It is measured again, since candidates.json has only
    figures. If other milliseconds then close all its exits, the choice is made again without it."""
    measured = list(measured)
    while (chosen := choose_candidate(measured, search.goal)) is not None:
        again = search.measure(chosen)
        measured = [again.candidate if each.key == chosen.key else each for each in measured]
        if not chosen.exits or min(again.candidate.thresholds) < CLOSED:
            return measured, again
        logger.info("%s: all exits closed in the second measurement, not chosen", again.candidate.name)
    return measured, None


def _write_model(search: CandidateSearch, measured: MeasuredCandidate) -> Candidate:
    """Write a measured model, and its exported files in 32 bits. Return the candidate."""
    out, recorded = search.out, measured.recorded
    info: ModelInfo = {**search.info, **({"phase": "joint"} if measured.candidate.joint else {})}
    if measured.search is None:
        routing = ("router", "certificate", "trained_temperatures")
        info = {key: value for key, value in info.items() if key not in routing}
    else:
        certificate = certificate_of(recorded, measured.search, measured.found)
        trained = info.get("trained_temperatures") or (info.get("router") or {}).get("temperatures", ())
        by_name = dict(zip(search.model.exit_names, trained, strict=False))
        # those of the router are fitted on the calib photos, so a later calibration must not use them for a risk
        trained = [by_name.get(name, 1.0) for name in recorded.model.exit_names[:-1]]
        info |= {"router": certificate.router, "certificate": certificate.to_dict(), "trained_temperatures": trained}
    save_model(out / "model.pth", recorded.model, recorded.architecture, info)
    photos = [record.path for record in recorded.sets["CALIB"].records[:EXPORT_PHOTOS]]
    export_detector(open_any(out / "model.pth"), out / "detector.onnx", "onnx", photos)
    if search.cfg.EVAL.RUNTIME == OPENVINO:
        export_detector(open_any(out / "model.pth"), out / "detector.xml", "openvino", photos)
    return measured.candidate


def _evaluate(search: CandidateSearch) -> Results:
    """Evaluate the written model on the test split, with the base detector as a rival."""
    out, plain = search.out, dataclasses.replace(search.architecture, exits=())
    save_model(out / BASE_FILE, plain.add_exits(search.full_path()), plain, {})
    # the base detector is the first rival, since `TestFigures.of` takes the first of this name
    rivals = (str(out / BASE_FILE), *search.cfg.EVAL.RIVALS.FULL_PATHS)
    cfg = build.with_values(search.cfg, {"EVAL.RIVALS.FULL_PATHS": rivals})
    return evaluate_model(cfg, out / "model.pth", out / "test", compare=False, block=search.goal.block)


def _choose_8_bits(
    search: CandidateSearch, measured: Sequence[Candidate], best: MeasuredCandidate
) -> tuple[Candidate, Candidate | None]:
    """Try 8 bits for the chosen candidate ``best`` and, if they are refused, for its net without exits.

    Returns:
        the candidate whose files are written, and that candidate in 8 bits. The second is None if no detector in 8 bits
        is faster than the chosen candidate in 32 bits.
    """
    chosen = best.candidate
    int8 = _in_8_bits(search, chosen)
    # some nets with the detector's own head are measured only with exits
    nets = [candidate for candidate in measured if candidate.net == chosen.net and not candidate.exits]
    if int8 is not None or not chosen.exits or not nets:
        return chosen, int8
    (net,) = nets
    net = _write_model(search, search.measure(net))  # with figures of now, like those of ``chosen``
    int8 = _in_8_bits(search, net)
    if int8 is None or int8.ms >= chosen.ms:
        return _write_model(search, best), None
    return net, int8


def _in_8_bits(search: CandidateSearch, chosen: Candidate) -> Candidate | None:
    """Return the written candidate in 8 bits. Its file replaces that in 32 bits. None if 8 bits do not hold the budget,
    are not faster, or cannot be made."""
    goal = search.goal
    try:
        model, file_format = open_any(search.out / "model.pth"), FORMAT_OF_RUNTIME[search.cfg.EVAL.RUNTIME]
        path = search.out / f"detector{SUFFIXES[file_format]}"
        limits = (goal.ap_drop, search.reference, goal.delta, goal.coco_ap_drop, goal.block)
        figures = export_int8(model, path, file_format, search.sets["CALIB"], *limits)
    except EarlyExitError as reason:
        logger.info("no candidate in 8 bits: %s", reason)
        return None
    (before, after), speed = figures.AP50, figures.speed.value
    return dataclasses.replace(
        chosen,
        name=f"{chosen.name}, 8 bits",
        holds=True,
        AP50=after,
        lost=before - after,
        lost_bound=figures.lost_bound,
        AP_lost_bound=figures.AP_lost_bound,
        objects=figures.objects,
        objects_kept=figures.objects_kept,
        ms=chosen.ms / speed,
        speedup=chosen.speedup * speed,
    )


def _test_in_8_bits(search: CandidateSearch, test: TestFigures, speed: float) -> TestFigures:
    """Return the test figures of the file in 8 bits. ``test`` has those in 32 bits. The accuracy is measured, and
    the time is that in 32 bits divided by ``speed``."""
    cfg, dataset = search.cfg, search.sets["TEST"]
    base = collect_detections(open_any(search.out / BASE_FILE), build.evaluation_loader(cfg, dataset))
    path = search.out / f"detector{SUFFIXES[FORMAT_OF_RUNTIME[cfg.EVAL.RUNTIME]]}"
    quantised = detect(Predictor(path, cfg.EVAL.RUNTIME), dataset)
    matches = exit_matches(to_coco(dataset), [base, quantised], cfg.EVAL.IOU)
    choices = [np.full(matches.photos, index) for index in range(2)]
    figures = ap_of_choice(matches, choices[1])
    blocks = blocks_of(dataset, search.goal.block)
    base_draws, quantised_draws = bootstrap_choices(matches, choices, seed=cfg.SEED, blocks=blocks)
    return dataclasses.replace(
        test,
        AP=figures.AP,
        AP50=figures.AP50,
        AP50_lost_interval=interval(base_draws.AP50 - quantised_draws.AP50),
        objects_found=int(photo_counts(matches, cfg.EVAL.SCORE).true_positives[:, 1].sum()),
        ms=test.ms / speed,
    )


def _summary(chosen: Candidate, test: TestFigures, ship: bool, goal: Goal) -> str:
    """Return the verdict, the test figures, and what the budget was compared with."""
    values = *test.AP50_lost_interval, test.AP50_base - test.AP50, test.AP_base - test.AP
    low, high, lost, ap_lost = (round(value, 3) + 0.0 for value in values)  # no -0.000
    losses = f"{lost:.3f} AP50 lost [{low:.3f}, {high:.3f}], {ap_lost:.3f} AP lost"
    times = f"{test.ms:.1f} ms against {test.ms_base:.1f}, {test.runtime}, threads: {test.threads}"
    objects = f"{test.objects_found} objects found where your detector finds {test.objects_found_base}"
    figures = (
        f"{chosen.name}: {test.speedup:.2f} times as fast as your detector ({times}), {losses}, {objects}, on "
        f"{test.photos} test photos ({', '.join(test.splits)})"
    )
    budget = f"{goal.ap_drop:g} AP50"
    budget += "" if goal.coco_ap_drop is None else f" and {goal.coco_ap_drop:g} AP"
    compared = (
        f"This verdict compares the budget of {budget} with the loss measured on the test photos. The search compared "
        f"it with the loss that {100 * (1 - goal.delta):g} % of the bootstrap draws of the calib photos do not exceed"
    )
    if ship:
        verdict = "ship it."
        if test.AP50_lost_interval[1] > goal.ap_drop:
            compared += ". The interval includes losses above the budget: more test photos would tell"
    elif not test.base_detects:
        verdict = f"do not ship it: your detector itself does not detect (AP50 {test.AP50_base:.3f})."
    else:
        verdict = f"do not ship it: on the test photos it {'exceeds the budget' if test.faster else 'is no faster'}."
    return f"{verdict} {figures}. {compared}."


def _summary_without_choice(measured: Sequence[Candidate], goal: Goal) -> str:
    """Return the summary if no candidate is chosen, with the candidate of the smallest bound."""
    with_loss = [candidate for candidate in measured[1:] if candidate.lost is not None]
    nearest = min(with_loss, key=lambda candidate: candidate.lost_bound, default=None)
    closest = "" if nearest is None else f"; the nearest: {nearest} (bound {nearest.lost_bound:.3f})"
    verdict = f"no faster candidate holds the budget of {goal.ap_drop:g} AP50 on the calib split"
    return f"{verdict}: ship the detector as it is{closest}"
