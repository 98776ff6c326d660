import os
import signal
from functools import partial

import pytest
from torch.utils.data import DataLoader, Dataset

from earlyexit_ssd.errors import DataError
from earlyexit_ssd.pipeline.command_line import run_tool


class Broken(Dataset):
    """Its photo cannot be decoded."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise DataError("train.json: photo cat.jpg (id 3): Error: cannot be decoded; replace it")


@pytest.fixture(autouse=True)
def _handlers():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_input_is_one_line_also_from_a_worker(capsys, workers):
    assert run_tool(lambda: list(DataLoader(Broken(), num_workers=workers))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: train.json: photo cat.jpg (id 3): Error: cannot be decoded; replace it"


def test_a_signal_ends_with_130_wherever_it_comes(capsys):
    stopped = partial(os.kill, os.getpid(), signal.SIGTERM)
    assert run_tool(stopped) == run_tool(stopped, after_a_stop="go on with --resume") == 130
    assert capsys.readouterr().err.splitlines() == ["stopped; run it again", "stopped; go on with --resume"]
