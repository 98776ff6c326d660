"""Runtimes do not change the state of the process."""

import subprocess
import sys

import pytest

DELETED_IN_ORDER = """
import gc, io, signal, subprocess, sys
import torch
from earlyexit_ssd.evaluation.cost import in_runtime

signal.signal(signal.SIGCHLD, lambda *_: None)
networks = [in_runtime(torch.nn.Conv2d(3, 8, 3).eval(), torch.rand(1, 3, 32, 32), "openvino") for _ in range(2)]
while networks:
    del networks[0]
    gc.collect()
subprocess.run([sys.executable, "-c", "pass"], check=True)
print("alive")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="stacks for signal handlers are set on Linux only")
def test_deleted_openvino_models_do_not_end_the_process():
    pytest.importorskip("openvino", reason="needs OpenVINO: pip install openvino")
    done = subprocess.run([sys.executable, "-c", DELETED_IN_ORDER], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "alive" in done.stdout, done.stderr
