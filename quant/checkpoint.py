"""`quantized.safetensors`: a calibrated network in one self-describing file.

Weights are unsigned integer codes packed to their real width, least significant bit first (4 bit:
two per byte); scales, zero points, norms, biases and the tables of a correction or bypass are as
they are; the metadata hold the recipe, so that the file loads in a fresh process without
calibration data and without the full-precision checkpoint."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from base.files import load_tensors, save_tensors
from quant.convert import convert
from quant.layers import QuantLayer
from quant.network import Bypass, Correction, QuantizedNet, harden, quant_layers
from quant.packing import pack, unpack
from quant.quantizer import Quantizer
from quant.scales import SoftScale
from quant.timeline import Timeline

FORMAT = "tinydm-quantized/1"


def stored_names(net: QuantizedNet) -> dict[str, torch.Tensor]:
    """The state dict of a network under the names of its file, which are those of the float
    network, `bypass.gain` and `correction.*`; without what gave its scales."""
    gone = tuple(f"{name}." for name, m in net.named_modules() if isinstance(m, SoftScale))
    state = {name: v for name, v in net.state_dict().items() if not name.startswith(gone)}
    return {name.removeprefix("net."): value for name, value in state.items()}


def quantized_state(net: QuantizedNet) -> dict[str, torch.Tensor]:
    """Tensors of a hardened network as they are stored."""
    tensors = stored_names(net)
    for name, layer in quant_layers(net).items():
        if layer.weight_int is not None:
            del tensors[f"{name}.weight_int"]
            q, zero_point = layer.weight_quantizer, f"{name}.weight_quantizer.zero_point"
            tensors[f"{name}.weight_codes"] = pack(layer.unsigned_codes(), q.spec.bits)
            tensors[zero_point] = tensors[zero_point].to(torch.uint8)  # 0..2^bits-1
    return tensors


def bytes_of(layer: QuantLayer) -> int:
    """Of the packed codes of a layer's weight."""
    return (int(torch.Size(layer.codes_shape).numel()) * layer.weight_quantizer.spec.bits + 7) // 8


def packed_bytes(net: QuantizedNet) -> int:
    """Bytes of a converted network's tensors in such a file but its recipe, hardened or not."""
    tensors, total = stored_names(net), 0
    for name, layer in quant_layers(net).items():
        if layer.weight_quantizer is not None:
            tensors.pop(f"{name}.weight", None)
            tensors.pop(f"{name}.weight_int", None)
            total += bytes_of(layer) + tensors.pop(f"{name}.weight_quantizer.zero_point").numel()
    return total + sum(value.nbytes for value in tensors.values())


def save_quantized(path: Path | str, net: QuantizedNet, recipe: dict[str, Any]) -> None:
    """Write a hardened network. `recipe` is a JSON-able dict with at least the rules; for
    `load_quantized` also name, network and weights_hash."""
    meta = {"format": FORMAT, "recipe": recipe, "boundaries": net.timeline.boundaries.tolist()}
    save_tensors(path, quantized_state(net), meta)


def save(net: QuantizedNet, path: Path | str) -> None:
    """Write a quantized network to a safetensors file, which `load` reads; it is hardened first.
    Raises ValueError for scales that have not been fitted.

    >>> quant.save(qnet, folder / "q.safetensors")
    >>> (folder / "q.safetensors").stat().st_size < 8000
    True
    """
    if not all(q.is_fitted for q in net.modules() if isinstance(q, Quantizer)):
        raise ValueError("scales have not been fitted; call quant.fit(net) before quant.save")
    harden(net)
    save_quantized(path, net, net.recipe)


def read_recipe(path: Path | str) -> tuple[dict[str, Any], list[float]]:
    """Metadata of a quantized file -> (recipe, boundaries). Raises ValueError for another file."""
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


def load_quantized(
    path: Path | str, build_network: Callable[..., nn.Module], *, expected: str | None = None
) -> QuantizedNet:
    """The hardened network of a file. `build_network(**options)` makes the float network of the
    recipe; `expected` is the weights hash of the float model it must belong to. Raises ValueError
    in one sentence if it does not fit."""
    recipe, boundaries = read_recipe(path)
    if "network" not in recipe:
        raise ValueError(
            f"{path} does not describe its network, which was none of this project's; load it with "
            "quant.load(path, net)"
        )
    if expected is not None and recipe["weights_hash"] != expected:
        raise ValueError(
            f"{path} was made from other weights of '{recipe['name']}' (hash "
            f"{recipe['weights_hash'][:12]}, this model has {expected[:12]}); use the model it "
            "was made from or quantize again"
        )
    net = build_network(**recipe["network"]).requires_grad_(False)
    quantized = convert(net, recipe["rules"], Timeline(boundaries))
    other_version = "it was written by another version, quantize again"
    damaged = "the file is damaged, quantize again"
    return _restored(path, quantized, recipe, "its own recipe", other_version, damaged)


def load(path: Path | str, net: nn.Module) -> QuantizedNet:
    """The quantized network of a file that `save` wrote. `net` is a float network like the one that
    was quantized, with any weights; it is left as it is. Raises ValueError in one sentence if the
    file does not fit it.

    >>> again = quant.load(folder / "q.safetensors", Net())
    >>> torch.equal(again(x, t), qnet(x, t))
    True
    """
    recipe, boundaries = read_recipe(path)
    device = next(net.parameters()).device
    own = copy.deepcopy(net).cpu().requires_grad_(False)
    quantized = convert(own, recipe["rules"], Timeline(boundaries))
    remedy = "load it into a network like the one that was quantized"
    return _restored(path, quantized, recipe, "this network", remedy, remedy).to(device)


def _restored(path, net, recipe, whole, remedy, byte_remedy):
    """A converted network on the CPU, with the tensors of its file. Raises ValueError with a remedy
    for a file that does not fit `whole`, with `byte_remedy` for a weight of another size."""
    stored, _ = load_tensors(path)
    for name, layer in quant_layers(net).items():
        _unpack_weight(path, name, layer, stored, byte_remedy)
    _add_tables(net, stored)
    own = stored_names(net)
    both = own.keys() & stored.keys()
    wrong = sorted(own.keys() ^ stored.keys())
    wrong += [name for name in own if name in both and own[name].shape != stored[name].shape]
    if wrong:
        first = ", ".join(wrong[:3])
        raise ValueError(
            f"{path} does not fit {whole} ({len(wrong)} tensors, first {first}); {remedy}"
        )
    full_names = {name.removeprefix("net."): name for name in net.state_dict()}
    net.load_state_dict({full_names[name]: value for name, value in stored.items()})
    net.recipe = recipe
    return net.eval()


def _unpack_weight(path, name, layer, stored, remedy):
    """Hardens a layer by its codes in `stored`, which get the names of the layer's own tensors.
    What is missing or of another shape is left for the comparison with the network's state."""
    codes, q = stored.pop(f"{name}.weight_codes", None), layer.weight_quantizer
    zero_point = stored.get(f"{name}.weight_quantizer.zero_point")
    if codes is None or q is None or zero_point is None or zero_point.shape != q.zero_point.shape:
        return
    if len(codes) != bytes_of(layer):
        raise ValueError(
            f"{path}: the weight of {name} has {len(codes)} bytes, which does not fit "
            f"{tuple(layer.codes_shape)} at {q.spec.bits} bits; {remedy}"
        )
    q.zero_point.copy_(zero_point.float())
    layer.set_unsigned_codes(unpack(codes, q.spec.bits, layer.codes_shape))
    stored[f"{name}.weight_int"] = layer.weight_int
    stored[f"{name}.weight_quantizer.zero_point"] = zero_point.float()


def _add_tables(net, stored):
    """Gives the network the correction and the bypass that `stored` has tensors of."""
    shapes = [stored.get(f"correction.{name}") for name in ("times", "rows", "columns")]
    if all(table is not None for table in shapes):
        times, rows, columns = shapes
        channels = rows.shape[1] if rows.dim() > 1 else 1  # a damaged file may have fewer axes
        net.correction = Correction(times, channels, *rows.shape[2:3], *columns.shape[3:4])
    gain = stored.get("bypass.gain")
    if gain is not None:
        net.bypass = Bypass(net.timeline, *gain.shape[1:])
