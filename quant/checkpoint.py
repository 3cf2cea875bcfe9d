"""`quantized.safetensors`: a calibrated network in one self-describing file.

Weights are unsigned integer codes packed to their real width, least significant bit first (4 bit:
two per byte); scales, zero points, norms, biases and the tables of a correction or bypass are as
they are; the metadata hold the recipe, so that the file loads in a fresh process without
calibration data and without the full-precision checkpoint."""

from pathlib import Path

import torch

from base.files import load_tensors, save_tensors
from quant.convert import convert
from quant.network import Bypass, Correction, QuantizedNet, quant_layers
from quant.packing import pack, unpack
from quant.timeline import Timeline

FORMAT = "tinydm-quantized/1"


def stored_names(net: QuantizedNet) -> dict[str, torch.Tensor]:
    """The state dict of a network under the names of its file, which are those of the float
    network, `bypass.gain` and `correction.*`."""
    return {name.removeprefix("net."): value for name, value in net.state_dict().items()}


def quantized_state(net):
    """Tensors of a hardened network as they are stored."""
    tensors, layers = {}, quant_layers(net)
    for name, value in stored_names(net).items():
        owner, _, part = name.rpartition(".")
        if part == "weight_int":
            layer = layers[owner]
            tensors[f"{owner}.weight_codes"] = pack(
                layer.unsigned_codes(), layer.weight_quantizer.spec.bits
            )
        elif name.endswith("weight_quantizer.zero_point"):
            tensors[name] = value.to(torch.uint8)  # 0..2^bits-1
        else:
            tensors[name] = value
    return tensors


def bytes_of(layer):
    """Of the packed codes of a layer's weight."""
    return (int(torch.Size(layer.codes_shape).numel()) * layer.weight_quantizer.spec.bits + 7) // 8


def packed_bytes(net):
    """Bytes of a converted network's tensors in such a file, hardened or not; the recipe comes on
    top."""
    packed, layers = 0, quant_layers(net)
    for name, layer in layers.items():
        if layer.weight_quantizer is not None:
            packed += bytes_of(layer)
    for name, value in stored_names(net).items():
        owner, _, part = name.rpartition(".")
        if (
            owner in layers
            and layers[owner].weight_quantizer is not None
            and part in ("weight", "weight_int")
        ):
            continue
        packed += value.numel() * (
            1 if name.endswith("weight_quantizer.zero_point") else value.element_size()
        )
    return packed


def save_quantized(path, net, recipe):
    """Write a hardened network. `recipe` is a JSON-able dict with at least name, network, rules and
    weights_hash."""
    meta = {"format": FORMAT, "recipe": recipe, "boundaries": net.timeline.boundaries.tolist()}
    save_tensors(path, quantized_state(net), meta)


def read_recipe(path):
    """Metadata of a quantized file -> (recipe, boundaries). Raises ValueError for a file that is
    none."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"quantized model {path} does not exist; scripts/quantize.py makes it")
    meta = load_tensors(path, only_metadata=True)[1]
    if meta.get("format") != FORMAT:
        raise ValueError(
            f"{path} is a safetensors file, but not a quantized model of this project (format "
            f"'{meta.get('format')}', expected '{FORMAT}')"
        )
    return meta["recipe"], meta["boundaries"]


def load_quantized(path, build_network, *, expected=None):
    """The hardened network of a file. `build_network(**options)` makes the float network of the
    recipe; `expected` is the weights hash of the float model it must belong to. Raises ValueError
    in one sentence if it does not fit."""
    recipe, boundaries = read_recipe(path)
    if expected is not None and recipe["weights_hash"] != expected:
        raise ValueError(
            f"{path} was made from other weights of '{recipe['name']}' (hash "
            f"{recipe['weights_hash'][:12]}, this model has {expected[:12]}); use the model it "
            "was made "
            "from or quantize again"
        )
    net = convert(
        build_network(**recipe["network"]).requires_grad_(False),
        recipe["rules"],
        Timeline(boundaries),
    )
    stored, _ = load_tensors(path)
    for name, layer in quant_layers(net).items():
        codes = stored.pop(f"{name}.weight_codes", None)
        q, zero_point = layer.weight_quantizer, stored.get(f"{name}.weight_quantizer.zero_point")
        if (
            codes is None
            or q is None
            or zero_point is None
            or zero_point.shape != q.zero_point.shape
        ):
            # the comparison with the net's own state says so
            continue
        if len(codes) != bytes_of(layer):
            raise ValueError(
                f"{path}: the weight of {name} has {len(codes)} bytes, which does not fit "
                f"{tuple(layer.codes_shape)} at {q.spec.bits} bits; the file is damaged, quantize "
                "again"
            )
        zero_point = zero_point.float()
        q.zero_point.copy_(zero_point)
        layer.set_unsigned_codes(unpack(codes, q.spec.bits, layer.codes_shape))
        stored[f"{name}.weight_int"], stored[f"{name}.weight_quantizer.zero_point"] = (
            layer.weight_int,
            zero_point,
        )
    times, rows, columns = (
        stored.get(f"correction.{name}") for name in ("times", "rows", "columns")
    )
    if times is not None and rows is not None and columns is not None:
        net.correction = Correction(times, rows.shape[1], *rows.shape[2:3], *columns.shape[3:4])
    gain = stored.get("bypass.gain")
    if gain is not None:
        net.bypass = Bypass(net.timeline, *gain.shape[1:])
    own = stored_names(net)
    wrong = sorted(set(own) ^ set(stored)) + [
        k for k in own if k in stored and own[k].shape != stored[k].shape
    ]
    if wrong:
        raise ValueError(
            f"{path} does not fit its own recipe ({len(wrong)} tensors, first "
            f"{', '.join(wrong[:3])}); "
            "it was written by another version, quantize again"
        )
    full_names = {name.removeprefix("net."): name for name in net.state_dict()}
    net.load_state_dict({full_names[name]: value for name, value in stored.items()})
    net.recipe = recipe
    return net.eval()
