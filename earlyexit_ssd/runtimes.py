"""Run exported graphs in ONNX Runtime or OpenVINO on the CPU, without PyTorch."""

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
    """Convert any exception inside to an EarlyExitError. Runtimes raise many types for damaged and unsuitable files."""
    try:
        yield
    except Exception as error:
        reason = one_line(str(error))[:120] or type(error).__name__
        raise EarlyExitError(f"{name}: {problem} ({reason}); {fix}") from None


class OnnxRuntime:
    """An ONNX graph in ONNX Runtime on the CPU.

    Args:
        content: path of a file, or its bytes.
        name: name for messages, by default the path.
        spinning: whether idle threads wait actively for the next call. This is faster, but slows other networks.

    Attributes:
        session: ONNX Runtime's session.
        metadata: the file's metadata, text by key.
        inputs: names of the inputs.
    """

    def __init__(self, content: Path | bytes, name: object = None, threads: int = 1, spinning: bool = True) -> None:
        self._name = name or content
        runtime = import_package("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 4
        options.add_session_config_entry("session.load_model_format", "ONNX")  # not ONNX Runtime's own format
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        with _in_one_line(self._name, "ONNX Runtime cannot load it", "export it again"):
            # from bytes, so that no external data is read; this project writes none
            self.session = runtime.InferenceSession(
                content if isinstance(content, bytes) else content.read_bytes(),
                options,
                providers=["CPUExecutionProvider"],
                enable_fallback=0,
            )
            self.metadata = dict(self.session.get_modelmeta().custom_metadata_map)
        inputs = [*self.session.get_inputs(), *self.session.get_overridable_initializers()]
        self.inputs = [node.name for node in inputs]
        self._outputs = [node.name for node in self.session.get_outputs()]

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        with _in_one_line(self._name, "it does not run", "export it again"):
            feeds = {name: feeds[name] for name in self.inputs if name in feeds}  # ONNX Runtime reports missing inputs
            return dict(zip(self._outputs, self.session.run(None, feeds), strict=True))


def compile_in_openvino(model: Any, threads: int) -> Any:
    """Compile an OpenVINO model for the CPU, in fp32 and for low latency."""
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    with _own_signal_stack():
        return import_package("openvino").Core().compile_model(model, "CPU", settings)


class _Stack(ctypes.Structure):
    _fields_ = (("ss_sp", ctypes.c_void_p), ("ss_flags", ctypes.c_int), ("ss_size", ctypes.c_size_t))


@contextlib.contextmanager
def _own_signal_stack() -> Iterator[None]:
    """Restore this thread's stack for signal handlers at the end of the context.

    OpenVINO 2026.4 sets another stack in the thread that compiles a model, and the model owns it. If models are deleted
    in the order of their creation, the thread keeps the stack of a deleted model. The next signal with a Python
    handler, such as that of torch's DataLoader, then kills the process.
    """
    if sys.platform != "linux":
        yield
        return
    system, before = ctypes.CDLL(None), _Stack()
    succeeded = system.sigaltstack(None, ctypes.byref(before)) == 0
    try:
        yield
    finally:
        if succeeded:
            system.sigaltstack(ctypes.byref(before), None)


class OpenVino:
    """A graph in OpenVINO on the CPU, in fp32, with the interface of `OnnxRuntime`."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        openvino = import_package("openvino")
        with _in_one_line(path, "OpenVINO cannot load it", "write it with earlyexit export --format openvino"):
            model = openvino.Core().read_model(path)
            info = model.get_rt_info("framework").value if model.has_rt_info("framework") else {}  # of the ONNX file
            values = {key: model.get_rt_info(["framework", key]).value for key in info}
            self.metadata = {key: value for key, value in values.items() if isinstance(value, str)}
            # read names before compilation, which may move names of removed nodes to inputs and outputs
            self.inputs = [node.any_name for node in model.inputs]
            # an output may have several names, for example if it is a constant
            self._outputs = {name: index for index, node in enumerate(model.outputs) for name in node.names}
            self._compiled = compile_in_openvino(model, threads)
        self._name, self._local = path, threading.local()

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        if not hasattr(self._local, "request"):  # one per thread, because a request holds the tensors of a call
            self._local.request = self._compiled.create_infer_request()
        with _in_one_line(self._name, "it does not run", "export it again"):
            tensors = {index: feeds[name] for index, name in enumerate(self.inputs)}
            results = self._local.request.infer(tensors, share_inputs=True)  # does not copy the photo
            arrays = [np.array(results[index]) for index in range(len(results))]
            return {name: arrays[index] for name, index in self._outputs.items()}
