"""A training that takes seconds: 32 rendered scenes, 64 px, a quarter of the width."""

from __future__ import annotations

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

from earlyexit_ssd.files import write_text
from earlyexit_ssd.report import pictures
from earlyexit_ssd.routing import policies
from tools import train_net

ROOT = Path(__file__).resolve().parents[2]
QUICK_FIT_STEPS = 60  # of a fitted policy, a tenth of the usual number
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
    """The rendered scenes, made by the first run."""
    return made_once("datasets", lambda folder: None)


@pytest.fixture
def without_evaluation(monkeypatch):
    """Trainings of this process end before their evaluation, which takes as long as they do."""
    module = importlib.import_module("earlyexit_ssd.pipeline.train")  # `pipeline.train` is the function
    monkeypatch.setattr(module, "evaluate_model", lambda *_: None)


def plain_figure(**settings: object) -> Figure:
    """A chart in few pixels, whose parts are not moved until all texts fit: that takes half of an evaluation."""
    return Figure(**{**settings, "layout": None, "dpi": 64})


@pytest.fixture(autouse=True)
def plain_charts(monkeypatch):
    """What the tools draw, but for `trained`, which draws charts as they are; so does tests/report."""
    monkeypatch.setattr(pictures, "Figure", plain_figure)


@pytest.fixture(autouse=True)
def quick_fits(monkeypatch):
    """Policies are fitted in a tenth of the steps; tests/routing fits them as they are."""
    monkeypatch.setattr(policies, "FIT_STEPS", QUICK_FIT_STEPS)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, made_once, data_root) -> tuple[Path, list[str]]:
    """A folder with ``run``, trained once by the tiny configuration, and the arguments of the tools that look at it."""

    def arguments(root: Path) -> list[str]:
        overrides = ["OUTPUT_DIR", str(root / "run"), "DATA.ROOT", str(data_root), "EVAL.SCORE", "0.02"]
        return ["--config", str(root / "tiny.yaml"), *overrides]

    def train(root: Path) -> None:
        write_text(root / "tiny.yaml", TINY)
        assert train_net.main([*arguments(root), "--force"]) == 0

    root = tmp_path_factory.mktemp("trained")
    shutil.copytree(made_once("trained_once", train), root, dirs_exist_ok=True)
    return root, arguments(root)


@pytest.fixture
def tiny(tmp_path, data_root):
    """Arguments of train_net.py for the tiny configuration; more may follow."""
    write_text(tmp_path / "tiny.yaml", TINY)

    def arguments(output: str, *more: str) -> list[str]:
        overrides = ["OUTPUT_DIR", str(tmp_path / output), "DATA.ROOT", str(data_root)]
        flags = [item for item in more if item.startswith("--")]
        return [
            "--config",
            str(tmp_path / "tiny.yaml"),
            *flags,
            *overrides,
            *[item for item in more if item not in flags],
        ]

    return arguments


METHODS = multiprocessing.get_all_start_methods()
FORKS = multiprocessing.get_context("forkserver" if "forkserver" in METHODS else "spawn")
FORKS.set_forkserver_preload(["earlyexit_ssd.pipeline", "scipy.stats", __name__])  # what every process would import


def start_training(
    arguments: list[str], stderr: str | Path = os.devnull, tool: str = "train_net", **environment: str
) -> BaseProcess:
    """train_net.py in a process of its own, forked from one that has imported torch: that takes seconds."""
    process = FORKS.Process(target=_train, args=(tool, arguments, stderr, environment))
    process.start()
    return process


def _train(tool: str, arguments: list[str], stderr: str | Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    pictures.Figure = plain_figure
    policies.FIT_STEPS = QUICK_FIT_STEPS
    for number, path in ((1, os.devnull), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.exit(importlib.import_module(f"tools.{tool}").main(arguments))


def run_in_two_processes(tool: str, arguments: list[str], folder: Path) -> tuple[list[int | None], list[str]]:
    """The exit codes, and what each printed to stderr (kept in ``folder``), of a tool as torchrun starts it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    errors = [folder / f"stderr{rank}" for rank in range(2)]
    both = [
        start_training(arguments, errors[rank], tool, RANK=str(rank), LOCAL_RANK=str(rank), **group)
        for rank in range(2)
    ]
    for process in both:
        process.join(timeout=120)
    return [process.exitcode for process in both], [path.read_text() for path in errors]


def run_with_torchrun(tool: str, arguments: list[str], stderr: Path, timeout: int = 120) -> None:
    """A tool in two processes of torchrun's launcher, which starts them as functions, forked as above."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {timeout} s")

    config = LaunchConfig(
        1, 1, 2, run_id="test", rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", max_restarts=0,
        start_method=FORKS.get_start_method(),
    )  # fmt: skip
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # the launcher takes these
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
    """Run this Python with these arguments to the end and fail with what it printed."""
    command = [sys.executable, *command]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of a run that is finished."""
    return torch.load(folder / "model.pth", weights_only=True)["model"]


def log(folder: Path, phase: str) -> list[dict]:
    """The lines that a phase of a run logged."""
    return [json.loads(line) for line in (folder / phase / "log.jsonl").read_text().splitlines()]
