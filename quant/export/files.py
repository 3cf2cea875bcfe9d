"""Writes a hardened network as ONNX, and that as OpenVINO's format.

Both have the inputs x, t and, where the network has a condition, cond, and the output answer, with
any number of samples. Weights of up to 4 bits lie in the file as 4-bit numbers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from base.files import write_atomically
from quant.export.grids import OPSET
from quant.export.packages import needed
from quant.export.twin import Portable
from quant.network import QuantizedNet
from quant.packing import pack

if TYPE_CHECKING:
    from onnx import ModelProto

NAMES = ("x", "t", "cond")


def write_onnx(
    path: Path | str, net: QuantizedNet, arguments: tuple[torch.Tensor, ...]
) -> dict[str, list[str]]:
    """Writes `net`, which is called with `arguments` (any values, 2 samples or more), and returns
    what of it computes in floating point: reason -> names of layers and products. Raises
    ValueError for a network that one graph does not hold, or a package that is missing."""
    portable = Portable(net).cpu().eval()
    model = traced(portable, tuple(argument.cpu() for argument in arguments))
    write_atomically(path, lambda part: part.write_bytes(model.SerializeToString()))
    return dict(portable.floating)


@torch.no_grad()
def traced(net: nn.Module, arguments: tuple[torch.Tensor, ...]) -> ModelProto:
    """What `net` does with `arguments` as an ONNX model."""
    needed("onnx", "onnxscript")
    batch = torch.export.Dim("N")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about names of axes
        program = torch.onnx.export(
            net,
            arguments,
            dynamo=True,
            opset_version=OPSET,
            input_names=NAMES[: len(arguments)],
            output_names=["answer"],
            dynamic_shapes=tuple({0: batch} for _ in arguments),
            verbose=False,
        )
    model = program.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # where in the source it came from, with the machine's paths
    pack_weights(model)
    return model


def pack_weights(model: ModelProto) -> None:
    """Replaces the int8 weights of an ONNX model whose outputs each need no more than 16 values by
    UINT4 ones, converted to int8 and shifted as they are loaded. Runtimes fold that; of 4-bit
    numbers given to DequantizeLinear OpenVINO makes a product in floating point."""
    import onnx
    from onnx import helper, numpy_helper

    axes = {
        node.input[0]: next((a.i for a in node.attribute if a.name == "axis"), 1)
        for node in model.graph.node
        if node.op_type == "DequantizeLinear"
    }
    initializers, nodes = list(model.graph.initializer), []
    for tensor in initializers:
        if tensor.data_type != onnx.TensorProto.INT8 or tensor.name not in axes:
            continue
        values = torch.from_numpy(numpy_helper.to_array(tensor).copy()).int()
        axis = axes[tensor.name]
        others = [i for i in range(values.dim()) if i != axis]
        low, high = values.amin(others, keepdim=True), values.amax(others, keepdim=True)
        if values.shape[axis] == 1 or (high - low).max() > 15:
            continue
        codes, name = pack(values - low, 4).numpy().tobytes(), tensor.name
        model.graph.initializer.remove(tensor)
        model.graph.initializer.extend(
            [
                helper.make_tensor(
                    f"{name}.codes", onnx.TensorProto.UINT4, values.shape, codes, raw=True
                ),
                numpy_helper.from_array(low.to(torch.int8).numpy(), f"{name}.low"),
            ]
        )
        to_int8 = {"to": onnx.TensorProto.INT8}
        nodes += [
            helper.make_node("Cast", [f"{name}.codes"], [f"{name}.wide"], **to_int8),
            helper.make_node("Add", [f"{name}.wide", f"{name}.low"], [name]),
        ]
    for node in reversed(nodes):
        model.graph.node.insert(0, node)


def write_openvino(path: Path | str, onnx_path: Path | str) -> None:
    """Writes an ONNX file as OpenVINO's pair of files, `path` (.xml) and its .bin."""
    needed("openvino")
    import openvino

    model = openvino.convert_model(onnx_path)
    openvino.save_model(model, path, compress_to_fp16=False)  # scales stay as they are
