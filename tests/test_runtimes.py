"""Runtimes do not change the state of the process."""

import ctypes
import subprocess
import sys

import pytest

from earlyexit_ssd.runtimes import _own_signal_stack, _Stack

linux = pytest.mark.skipif(sys.platform != "linux", reason="stacks for signal handlers are set on Linux only")


def signal_stack() -> tuple[int | None, int, int]:
    stack = _Stack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack)) == 0
    return stack.ss_sp, stack.ss_flags, stack.ss_size


@linux
def test_signal_stack_of_the_thread_is_restored():
    before, memory = signal_stack(), ctypes.create_string_buffer(1 << 16)
    with pytest.raises(ValueError, match="while compiling"), _own_signal_stack():
        other = _Stack(ctypes.addressof(memory), 0, len(memory))
        assert ctypes.CDLL(None).sigaltstack(ctypes.byref(other), None) == 0
        assert signal_stack() != before
        raise ValueError("while compiling")
    assert signal_stack() == before


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


@linux
def test_deleted_openvino_models_do_not_end_the_process():
    pytest.importorskip("openvino", reason="needs OpenVINO: pip install openvino")
    done = subprocess.run([sys.executable, "-c", DELETED_IN_ORDER], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "alive" in done.stdout, done.stderr
