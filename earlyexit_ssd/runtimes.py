"""Exported graphs in ONNX Runtime or OpenVINO on the CPU, without PyTorch."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from earlyexit_ssd.errors import EarlyExitError, import_package, one_line

Array = np.ndarray


@contextlib.contextmanager
def _in_one_line(name: object, problem: str, fix: str) -> Iterator[None]:
    """Raise any exception inside as an EarlyExitError: runtimes raise many kinds for damaged and foreign files."""
    try:
        yield
    except Exception as error:
        reason = one_line(str(error))[:120] or type(error).__name__
        raise EarlyExitError(f"{name}: {problem} ({reason}); {fix}") from None


class OnnxRuntime:
    """An ONNX graph in ONNX Runtime on the CPU.

    Args:
        content: a file, or its bytes.
        name: its name for messages; by default the file's path.

    Attributes:
        metadata, inputs: the file's metadata (text by key), and the names of its inputs.
    """

    def __init__(self, content: Path | bytes, name: object = None, threads: int = 1) -> None:
        self._name = name or content
        runtime = import_package("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 4
        options.add_session_config_entry("session.load_model_format", "ONNX")
        with _in_one_line(self._name, "ONNX Runtime cannot load it", "write it with earlyexit export"):
            # from bytes: external data is not read, since this project writes none
            self._session = runtime.InferenceSession(
                content if isinstance(content, bytes) else content.read_bytes(),
                options,
                providers=["CPUExecutionProvider"],
                enable_fallback=0,
            )
            self.metadata = dict(self._session.get_modelmeta().custom_metadata_map)
        named = [*self._session.get_inputs(), *self._session.get_overridable_initializers()]
        self.inputs = [one.name for one in named]
        self._outputs = [one.name for one in self._session.get_outputs()]

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        with _in_one_line(self._name, "it does not run", "export anew"):
            given = {name: feeds[name] for name in self.inputs if name in feeds}  # ONNX Runtime reports missing ones
            return dict(zip(self._outputs, self._session.run(None, given), strict=True))


def compile_in_openvino(model: Any, threads: int) -> Any:
    """An OpenVINO model compiled for the CPU, in fp32 and for a low latency."""
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    with _own_signal_stack():
        return import_package("openvino").Core().compile_model(model, "CPU", settings)


class _Stack(ctypes.Structure):
    _fields_ = (("ss_sp", ctypes.c_void_p), ("ss_flags", ctypes.c_int), ("ss_size", ctypes.c_size_t))


@contextlib.contextmanager
def _own_signal_stack() -> Iterator[None]:
    """Context manager: at the end this thread has the stack for signal handlers that it had before.

    OpenVINO 2026.4 gives a thread that compiles a model another such stack, which belongs to the model. If models are
    deleted in the order of their making, the thread is left with the stack of a deleted one. The next signal with a
    Python handler, such as that of torch's DataLoader, then ends the process.
    """
    if sys.platform != "linux":
        yield
        return
    system, before = ctypes.CDLL(None), _Stack()
    known = system.sigaltstack(None, ctypes.byref(before)) == 0
    try:
        yield
    finally:
        if known:
            system.sigaltstack(ctypes.byref(before), None)


class OpenVino:
    """A file in OpenVINO on the CPU, in fp32; see `OnnxRuntime`."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        with _in_one_line(path, "OpenVINO cannot load it", "write it with earlyexit export"):
            model = import_package("openvino").Core().read_model(path)
            self.metadata = _openvino_metadata(model)
            # before compilation, which may move names of removed nodes to inputs and outputs
            self.inputs = [one.any_name for one in model.inputs]
            # an output may have further names: that of a constant, if it is one
            self._outputs = {name: place for place, one in enumerate(model.outputs) for name in one.names}
            self._compiled = compile_in_openvino(model, threads)
        self._name, self._local = path, threading.local()

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        if not hasattr(self._local, "request"):  # a request holds the tensors of one call
            self._local.request = self._compiled.create_infer_request()
        with _in_one_line(self._name, "it does not run", "export anew"):
            given = {place: feeds[name] for place, name in enumerate(self.inputs)}
            found = self._local.request.infer(given, share_inputs=True)  # without a copy of the photo
            arrays = [np.array(found[place]) for place in range(len(found))]
            return {name: arrays[place] for name, place in self._outputs.items()}


def _openvino_metadata(model: Any) -> dict[str, str]:
    """The metadata of the ONNX file that the model was converted from."""
    if not model.has_rt_info("framework"):
        return {}
    found = {key: model.get_rt_info(["framework", key]).value for key in model.get_rt_info("framework").value}
    return {key: value for key, value in found.items() if isinstance(value, str)}
