"""Runs an exported file: by ONNX Runtime, by OpenVINO. Both compute on the CPU, what is not integer
in float32."""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from quant.export.packages import needed

# kinds of nodes that multiply matrices -> whether they do so on integers
ORT_PRODUCTS = dict.fromkeys(("Conv", "FusedConv", "MatMul", "FusedMatMul", "Gemm"), False)
ORT_PRODUCTS |= dict.fromkeys(
    ("QLinearConv", "ConvInteger", "MatMulIntegerToFloat", "QLinearMatMul", "QGemm"), True
)
Products = dict[str, dict[str, int]]  # "integer" or "float" -> {kind: how many}
OPENVINO_PRODUCTS = ("Convolution", "FullyConnected", "MatMul")


class OnnxRuntime:
    """An ONNX file as a function of its inputs, by ONNX Runtime."""

    package = "onnxruntime"

    def __init__(self, path: Path | str, threads: int):
        needed(self.package)
        self.path, self.threads = str(path), threads
        self.session = self._session()

    def _session(self, **changes):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = self.threads, 3
        # threads that wait busily would slow what is measured beside it
        options.add_session_config_entry("session.force_spinning_stop", "1")
        for name, value in changes.items():
            setattr(options, name, value)
        return onnxruntime.InferenceSession(self.path, options, ["CPUExecutionProvider"])

    def __call__(self, *arguments: torch.Tensor) -> torch.Tensor:
        """The answer to x, t[, cond]."""
        return torch.from_numpy(self.session.run(None, self._feed(arguments))[0])

    def _feed(self, arguments):
        names = [entry.name for entry in self.session.get_inputs()]
        return {name: argument.numpy() for name, argument in zip(names, arguments)}

    def products(self, *arguments: torch.Tensor) -> Products:
        """Which kernels multiplied, counted by kind."""
        with tempfile.TemporaryDirectory() as folder:
            session = self._session(
                enable_profiling=True, profile_file_prefix=str(Path(folder, "profile"))
            )
            session.run(None, self._feed(arguments))
            events = json.loads(Path(session.end_profiling()).read_text())
        kernels = (e for e in events if e.get("cat") == "Node" and "kernel_time" in e["name"])
        kinds = (event["args"]["op_name"] for event in kernels)
        return counted((kind, ORT_PRODUCTS[kind]) for kind in kinds if kind in ORT_PRODUCTS)


class OpenVINO:
    """An ONNX or OpenVINO file as a function of its inputs, by OpenVINO."""

    package = "openvino"

    def __init__(self, path: Path | str, threads: int):
        needed(self.package)
        self.path, self.threads = str(path), threads
        self.request = self._request()

    def _request(self, **changes):
        import openvino

        # processors with bfloat16 would compute in that what is not integer
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": self.threads}
        model = openvino.Core().compile_model(self.path, "CPU", options | changes)
        return model.create_infer_request()

    def __call__(self, *arguments: torch.Tensor) -> torch.Tensor:
        """The answer to x, t[, cond]."""
        answer = self.request.infer([argument.numpy() for argument in arguments])[0]
        return torch.from_numpy(answer.copy())

    def products(self, *arguments: torch.Tensor) -> Products:
        """Which kernels multiplied, counted by kind."""
        request = self._request(PERF_COUNT=True)
        request.infer([argument.numpy() for argument in arguments])
        nodes = [
            (node.node_type, node.exec_type.endswith("I8"))
            for node in request.get_profiling_info()
            if node.status == node.Status.EXECUTED
        ]
        return counted(node for node in nodes if node[0].startswith(OPENVINO_PRODUCTS))


def counted(kinds: Iterable[tuple[str, bool]]) -> Products:
    """From (kind, whether on integers) of every product."""
    kinds = list(kinds)
    return {
        word: dict(Counter(kind for kind, on_integers in kinds if on_integers == wanted))
        for word, wanted in (("integer", True), ("float", False))
    }
