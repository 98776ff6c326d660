"""A training of seconds: 40 rendered photos, 64 px, a quarter of the width."""

import gc
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.utils._python_dispatch import TorchDispatchMode

from earlyexit_ssd.evaluation import cost
from earlyexit_ssd.evaluation.matches import bootstrap_choices
from earlyexit_ssd.evaluation.metrics import EvaluationSettings
from earlyexit_ssd.files import write_text
from earlyexit_ssd.report import pictures
from earlyexit_ssd.routing import policies
from tools import train_net

ROOT = Path(__file__).resolve().parents[2]
TINY = """
DATA:
  CLASSES: [chair]
  SYNTHETIC: {SIZES: [24, 8, 8], IMAGE_SIZE: 64}
  WORKERS: 0
MODEL: {IMAGE_SIZE: 64, WIDTH: 0.25}
EXITS: {CHANNELS: 16, DEPTH: 1}
BASELINE: {EPOCHS: 2, BATCH_SIZE: 4}
EXITS_PHASE: {EPOCHS: 2, BATCH_SIZE: 4, CACHE_VIEWS: 1}
JOINT: {EPOCHS: 1, BATCH_SIZE: 4}
ENGINE: {LOG_PERIOD: 1}
EVAL: {TIMING_RUNS: 1, PICTURES: 0, RIVALS: {ENABLED: false}}
THREADS: 1
"""


@pytest.fixture(scope="session")
def data_root(made_once) -> Path:
    """Folder of the rendered photos, which the first run makes."""
    return made_once("datasets", lambda folder: None)


@pytest.fixture
def without_evaluation(monkeypatch):
    """Trainings of this process skip the evaluation."""
    module = importlib.import_module("earlyexit_ssd.pipeline.train")  # `pipeline.train` is the function
    monkeypatch.setattr(module, "evaluate_model", lambda *_: None)


def plain_figure(**settings: object) -> Figure:
    """A chart in few pixels without the layout of texts, which takes half of an evaluation."""
    return Figure(**{**settings, "layout": None, "dpi": 64})


class QuickCounter(TorchDispatchMode):
    """The counts of PyTorch's FlopCounterMode without those of each module, which take twice the time of the rest."""

    def __init__(self, display: bool) -> None:
        super().__init__()
        self.counts = dict.fromkeys(cost.COUNTED, 0)

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        output, kind = operator(*arguments, **(keywords or {})), operator.overloadpacket
        if kind in self.counts:
            weights = arguments[1][0] if kind == torch.ops.aten.convolution else arguments[-1][:, 0]
            self.counts[kind] += 2 * output.numel() * weights.numel()
        return output

    def get_flop_counts(self) -> dict:
        return {"Global": self.counts}


QUICK = [
    (pictures, "Figure", plain_figure),
    (pictures, "place_labels", lambda *_: None),
    (cost, "FlopCounterMode", QuickCounter),
    (importlib.import_module("earlyexit_ssd.pipeline.evaluate"), "ATTENTION_PHOTOS", 1),
    (policies, "FIT_STEPS", 60),  # instead of 600
    (bootstrap_choices, "__defaults__", (20, 0)),  # draws (instead of 200), and seed
    (EvaluationSettings.__init__, "__defaults__", (*EvaluationSettings.__init__.__defaults__[:-2], 20, 0)),
]
"""What is replaced in tests: object, name, value. The training of `trained` is without the first four."""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Faster charts, counts, fits and bootstraps."""
    for replaced in QUICK:
        monkeypatch.setattr(*replaced)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, made_once, data_root) -> tuple[Path, list[str]]:
    """A folder with the trained ``run``, and arguments for the tools that use it."""

    def arguments(root: Path) -> list[str]:
        overrides = ["OUTPUT_DIR", str(root / "run"), "DATA.ROOT", str(data_root), "EVAL.SCORE", "0.02"]
        return ["--config", str(root / "tiny.yaml"), *overrides]

    def train(root: Path) -> None:
        write_text(root / "tiny.yaml", TINY)
        with pytest.MonkeyPatch.context() as patch:
            for replaced in QUICK[4:]:
                patch.setattr(*replaced)
            assert train_net.main([*arguments(root), "--force"]) == 0

    root = tmp_path_factory.mktemp("trained")
    shutil.copytree(made_once("trained_once", train), root, dirs_exist_ok=True)
    return root, arguments(root)


@pytest.fixture
def tiny(tmp_path, data_root):
    """Function that returns arguments of train_net.py for the tiny configuration."""
    write_text(tmp_path / "tiny.yaml", TINY)

    def arguments(output: str, *more: str) -> list[str]:
        overrides = ["OUTPUT_DIR", str(tmp_path / output), "DATA.ROOT", str(data_root)]
        return ["--config", str(tmp_path / "tiny.yaml"), *overrides, *more]

    return arguments


METHODS = multiprocessing.get_all_start_methods()
FORKS = multiprocessing.get_context("forkserver" if "forkserver" in METHODS else "spawn")
FORKS.set_forkserver_preload(["earlyexit_ssd.pipeline", "scipy.stats", __name__])


def start_training(
    arguments: list[str], stderr: str | Path = os.devnull, tool: str = "train_net", **environment: str
) -> BaseProcess:
    """Start a tool in another process, forked from a process that has imported torch."""
    process = FORKS.Process(target=_train, args=(tool, arguments, stderr, environment))
    process.start()
    return process


def _train(tool: str, arguments: list[str], stderr: str | Path, environment: dict[str, str]) -> None:
    gc.freeze()  # the modules of the process that this one was forked from
    os.environ.update(environment)
    for replaced in QUICK:
        setattr(*replaced)
    for number, path in ((1, os.devnull), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.exit(importlib.import_module(f"tools.{tool}").main(arguments))


def run_in_two_processes(tool: str, arguments: list[str], folder: Path) -> tuple[list[int | None], list[str]]:
    """Run a tool with the environment of torchrun. Return the exit codes, and the stderr files of ``folder``."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    errors = [folder / f"stderr{rank}" for rank in range(2)]
    processes = [
        start_training(arguments, path, tool, RANK=str(rank), LOCAL_RANK=str(rank), **group)
        for rank, path in enumerate(errors)
    ]
    for process in processes:
        process.join(timeout=120)
    return [process.exitcode for process in processes], [path.read_text() for path in errors]


def run_with_torchrun(tool: str, arguments: list[str], stderr: Path, timeout: int = 120) -> None:
    """Run a tool in two processes of torchrun's launcher, forked as in `start_training`."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {timeout} s")

    config = LaunchConfig(
        1, 1, 2, run_id="test", rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", max_restarts=0,
        start_method=FORKS.get_start_method(),
    )  # fmt: skip
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # the launcher handles these
    before = {number: signal.getsignal(number) for number in (signal.SIGALRM, *signals)}
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(timeout)
    try:
        elastic_launch(config, _train)(tool, arguments, stderr, {})
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)


def run_command(command: list[str], timeout: float = 120) -> subprocess.CompletedProcess:
    """Run Python with these arguments. Fail with its stderr."""
    command = [sys.executable, *command]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Load the weights of a finished run."""
    return torch.load(folder / "model.pth", weights_only=True)["model"]


def log(folder: Path, phase: str) -> list[dict]:
    """Return the log entries of a phase of a run."""
    return [json.loads(line) for line in (folder / phase / "log.jsonl").read_text().splitlines()]
