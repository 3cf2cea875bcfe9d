"""Losses of block reconstruction.

lp(a, b; p) = mean over samples and positions of sum over channels |a - b|^p                       (BRECQ's measure)
"""

from contextlib import ExitStack, contextmanager

from quant.network import quant_layers

BLOCK_ENDS = "conv2", "ff"  # roles


def lp(a, b, norm, weights=None):
    """Sum over axis 1, mean over the rest, of |a - b|^norm: the loss measure of BRECQ and its
    descendants."""
    error = (a - b).abs().pow(norm)
    return (error if weights is None else error * weights).sum(1).mean()


def comparable(module):
    """Names of a block's inner layers whose outputs are those of the full-precision layers: all but
    the one that ends the block, and but queries, keys and values of a balanced attention, whose
    scales moved between them (quant/balance.py). A block ends with its second convolution, not with
    the shortcut, or with its feed-forward part; else with the layer that was registered last."""
    layers = quant_layers(module)
    ends = [
        name for role in BLOCK_ENDS for name, layer in layers.items() if layer.role == role
    ] or list(layers)
    return [
        name
        for name, layer in layers.items()
        if name != ends[-1]
        and (layer.inverse_balance is None or layer.role not in ("q", "k", "v", "qkv"))
    ]


def output_loss(unit, out, target, rows, norm):
    weights = unit.saliency(rows, out) if unit.saliency else None
    error = out.float() - target[rows].to(unit.device)
    return lp(unit.frequency(rows, error) if unit.frequency else error, 0, norm, weights)


@contextmanager
def outputs_of(module, names):
    """While inside: a dict that collects what the submodules `names` put out."""
    outputs = {}

    def note(name):
        return lambda _, inputs, out: outputs.__setitem__(name, out)

    with ExitStack() as stack:
        for name in names:
            stack.callback(module.get_submodule(name).register_forward_hook(note(name)).remove)
        yield outputs
