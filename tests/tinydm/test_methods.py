"""Every method's YAML on a tiny network: it runs, survives a kill with the same bytes, its file
reloads exactly and draws the same images on integers."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import tinydm
from base.config import load
from models.zoo import build_network
from quant.calibration.files import load_calibration
from quant.checkpoint import load_quantized
from quant.convert import convert
from quant.integer.lower import IntegerNet
from quant.network import in_channels_last, input_quantizers, quant_layers
from tinydm.recipe import RunConfig
from tinydm.stages import calibrate, quantize, retabulate, sample

PROJECT = Path(__file__).resolve().parents[2]
METHODS = sorted(p.stem for p in (PROJECT / "configs/method").glob("*.yaml"))
NETWORKS = {
    "pixel": {
        "family": "ddim-unet",
        "image_size": 8,
        "ch": 8,
        "ch_mult": [1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "norm_groups": 4,
    },
    "fused": {
        "family": "ldm-unet",
        "image_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 32,
        "num_res_blocks": 1,
        "attention_resolutions": [1],
        "channel_mult": [1],
        "num_head_channels": 16,
    },
}
FLOATS = ["apqdm_as_released"]  # what it quantizes has a scale for every channel
WORDS = [
    "sampling.steps=5",
    "sampling.num=4",
    "sampling.batch_size=4",
    "calibration.steps=5",
    "calibration.images=4",
    "effort.weight_iters=2",
    "effort.input_iters=2",
    "effort.batch_size=4",
    "effort.num_values=512",
    "effort.dtype=fp32",
    "device=cpu",
]
# counts that no key of effort changes
BALANCES, WIDTHS = "pass_options.balance.num_alphas=2", "pass_options.allocate_bits.choices=[2,8]"
# in place of the searches for ranges, which take most of the time
MINMAX = "exceptions=[{match: '*', weight: {range: minmax}, input: {range: minmax}}]"
FEW = {
    "apqdm": ["pass_options.group_scales.groups=3"],
    "mixed": [WIDTHS],
    "tdq": ["pass_options.dynamic_scales.warm_steps=3"],
    "tinydm": [BALANCES],
    "tinydm_auto": [BALANCES],
    "tinydm_mixed": [BALANCES, WIDTHS, MINMAX],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {
        kind: write_model(network, tmp_path_factory.mktemp(kind))
        for kind, network in NETWORKS.items()
    }


def write_model(network, folder):
    """A model YAML with random weights and a few images beside it."""
    torch.manual_seed(0)
    save_file(build_network(**network).state_dict(), folder / "tiny.safetensors")
    (folder / "data/one").mkdir(parents=True)
    # for the method that starts from real images
    for i in range(6):
        Image.new("RGB", (8, 8), (40 * i, 255 - 40 * i, 90)).save(folder / f"data/one/{i}.png")
    facts = {
        "name": "tiny",
        "network": network,
        "checkpoint": str(folder / "tiny.safetensors"),
        "schedule": {"kind": "linear", "timesteps": 1000},
        "sampling": {"skip": "uniform", "eta": 1.0},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(facts))
    return folder / "tiny.yaml"


class Killed(Exception):
    pass


def prepared(model, method, out, *more):
    """A run folder with its calibration set."""
    words = [
        str(model),
        *(
            str(PROJECT / "configs" / p)
            for p in ("bits/w4a4.yaml", f"method/{method}.yaml", "preset/demo.yaml")
        ),
        *WORDS,
        *FEW.get(method, []),
        *more,
    ]
    if method == "i2n":
        words.append(f"calibration.data={model.parent / 'data'}")
    calibrate.run([*words, f"out={out}"])
    return out


def quantized(out, monkeypatch, dies_at=None):
    """Run the stage; returns how many lines it printed. With `dies_at` it dies as it prints that
    one."""
    lines = []

    def counting(line, **_):
        lines.append(line)
        if len(lines) == dies_at:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("builtins.print", counting)
        if dies_at:
            with pytest.raises(Killed):
                quantize.run([str(out)])
        else:
            quantize.run([str(out)])
    assert (out / "quantized.safetensors").exists() is not bool(dies_at)
    return len(lines)


@pytest.mark.parametrize(
    "kind, method",
    [("pixel", method) for method in METHODS]
    + [("fused", method) for method in ("edadm", "multimodel", "tfmq", "tinydm")],
)
def test_method_runs_continues_and_reloads(models, kind, method, tmp_path, monkeypatch):
    """The second run is killed early, then once more at its last line of progress, that of its last
    pass."""
    more = [MINMAX] if kind == "fused" else []
    whole = prepared(models[kind], method, tmp_path / "whole", *more)
    again = shutil.copytree(whole, tmp_path / "killed")
    total = quantized(whole, monkeypatch)
    for line in {min(4, total - 1), total - 1}:
        quantized(again, monkeypatch, dies_at=line)
    quantized(again, monkeypatch)
    content = (whole / "quantized.safetensors").read_bytes()
    assert content == (again / "quantized.safetensors").read_bytes()
    net = load_quantized(whole / "quantized.safetensors", build_network)
    for name, value in net.state_dict().items():
        assert value.isfinite().all(), name
    sample.run([str(whole), "precision=simulated"])
    images = [(whole / f"samples/{i:06d}.png").read_bytes() for i in range(4)]
    if method in FLOATS:
        with pytest.raises(ValueError, match="no layer of this network can run on integers"):
            sample.run([str(whole), "precision=integer", "force=true"])
    else:
        assert images == images_on_integers(whole / "quantized.safetensors", tmp_path / "images")


def images_on_integers(path, folder):
    """Bytes of the images of a run's file, whose network gives the bits of its simulation."""
    model = tinydm.load(path, device="cpu")
    images = model.sample(range(4), precision="integer")
    integer, simulated = model.computing["integer"], in_channels_last(model.net)
    assert isinstance(integer, IntegerNet)
    for seed, t in enumerate((1.0, 400.0, 900.0)):
        x, times = model.noise(seed, range(3)).draw(), torch.full((3,), t)
        assert torch.equal(integer(x, times), simulated(x, times))
    folder.mkdir()
    for i, image in enumerate(images):
        sample.save_png(folder / f"{i}.png", image)
    return [(folder / f"{i}.png").read_bytes() for i in range(4)]


@pytest.mark.parametrize("method", METHODS)
def test_32_bit_activations_are_left_alone_everywhere(models, method):
    """Also those that a method holds at 8 bits whatever the others have."""
    config = load(
        RunConfig,
        [
            str(models["pixel"]),
            *(
                str(PROJECT / "configs" / p)
                for p in ("bits/w4a32.yaml", f"method/{method}.yaml", "preset/demo.yaml")
            ),
        ],
        ["exceptions=[{role: out, input: {bits: 8}}]"],
    )
    net = convert(build_network(**config.network), config.all_rules)
    assert list(input_quantizers(net)) == ["conv_out.input_quantizer"]  # unless asked for


@pytest.mark.parametrize(
    "model, bits, width",
    [
        ("sd-v1-4", "w4a8", 16),
        ("sd-v1-4", "w4a32", 32),
        ("bedroom", "w4a8", 8),
        ("bedroom", "w8a32", 32),
    ],
)
def test_a_model_may_want_more_bits_for_its_attention_maps(model, bits, width):
    config = load(
        RunConfig,
        [
            PROJECT / "configs" / p
            for p in (
                f"model/{model}.yaml",
                f"bits/{bits}.yaml",
                "method/qdiffusion.yaml",
                "preset/demo.yaml",
            )
        ],
    )
    (rule,) = (rule for rule in config.all_rules if rule.get("role") == "probs")
    assert rule["input"]["bits"] == width


def test_scales_that_are_a_function_of_time_get_other_steps(models, tmp_path, monkeypatch):
    run = prepared(models["pixel"], "tdq", tmp_path / "run")
    quantized(run, monkeypatch)
    with pytest.raises(ValueError, match="only sampling"):
        retabulate.run([str(run), f"out={tmp_path / 'other'}", "bits.weight=8"])
    retabulate.run([str(run), f"out={tmp_path / 'other'}", "sampling.steps=4"])
    sample.run([str(tmp_path / "other")])
    assert len(list((tmp_path / "other/samples").glob("*.png"))) == 4
    with pytest.raises(ValueError, match="holds a quantized model already"):
        retabulate.run([str(run), f"out={tmp_path / 'other'}", "sampling.steps=4"])
    (run / "dynamic.safetensors").unlink()  # as if of another method
    with pytest.raises(ValueError, match="no functions of time; only a run of tdq or of training"):
        retabulate.run([str(run), f"out={tmp_path / 'third'}", "sampling.steps=4"])


COMPOSED = """
method: composed
segments: per_step
calibration: {builder: tdac, options: {least: 1}}
rules:
  - {match: '*', weight: {bits: '${bits.weight}', per: channel},
     input: {bits: '${bits.input}'}, balance: true}
  - {kind: matmul, role: probs, input: {bits: '${bits.softmax}', range: minmax}}
passes:
  - balance: {num_alphas: 2}
  - fit_ranges: {neighbours: 2}
  - dynamic_scales: {warm_steps: 3}
  - reconstruct: {weight_iters: 2, input_iters: 2, batch_size: 4}
  - correct_noise: {num_images: 4}
"""


def test_parts_of_four_methods_compose_by_lists(models, tmp_path, monkeypatch):
    """TinyDM's balance, EDA-DM's calibration set, TDQ's table of scales, PTQD's correction: each
    leaves its mark."""
    (tmp_path / "composed.yaml").write_text(COMPOSED)
    run = tmp_path / "run"
    calibrate.run(
        [
            str(models["fused"]),
            str(PROJECT / "configs/bits/w4a4.yaml"),
            str(tmp_path / "composed.yaml"),
            *WORDS,
            "calibration.images=16",
            f"out={run}",
        ]
    )
    quantized(run, monkeypatch)
    made = load_calibration(run / "calibration.safetensors").made
    assert made["builder"] == "tdac" and sum(made["samples_per_step"]) == 80
    net = load_quantized(run / "quantized.safetensors", build_network)
    assert any(layer.inverse_balance is not None for layer in quant_layers(net).values())
    table = net.net.input_blocks[0][0].input_quantizer.scale
    assert (
        table.shape[0] == 5 and len(table.unique()) > 1 and (run / "dynamic.safetensors").exists()
    )
    assert net.correction.rows.abs().sum() > 0
    sample.run([str(run)])
    assert len(list((run / "samples").glob("*.png"))) == 4
