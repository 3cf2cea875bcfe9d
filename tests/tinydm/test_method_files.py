"""What the files of the methods say, against a table that was written from their papers and their
released code (method_table.py)."""

from pathlib import Path

import pytest
from conftest import TINY
from method_table import DEFAULT, TABLE, WIDTHS, WORDS

from base.config import load
from base.network import Matmul
from models.zoo import build_network
from quant.layers import SWAP
from quant.passes.run import check_passes
from quant.rules import resolve
from tinydm.recipe import RunConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
METHODS = sorted(path.stem for path in (CONFIGS / "method").glob("*.yaml"))
LDM = {
    "family": "ldm-unet",
    "image_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [1],
    "channel_mult": [1],
    "num_head_channels": 16,
}
NETWORKS = [
    TINY,
    LDM | {"use_scale_shift_norm": True},
    LDM | {"use_spatial_transformer": True, "context_dim": 6},
]


def test_every_method_is_in_the_table():
    assert sorted(TABLE) == METHODS


@pytest.fixture(scope="module")
def points():
    """(role, or which of the roles of WIDTHS; name, role and kind for `resolve`) of all that rules
    speak of."""
    found = []
    for network in NETWORKS:
        num_temb = 0
        for name, m in build_network(**network).named_modules():
            if isinstance(m, Matmul):
                found += [
                    (role if role == "probs" else "product", name, role, "matmul")
                    for role in m.roles
                ]
            elif type(m) in SWAP:
                num_temb += m.role == "temb"
                found.append(
                    (f"temb {num_temb}" if m.role == "temb" else m.role, name, m.role, "layer")
                )
    assert {which for which, *_ in found} == WIDTHS.keys()
    return found


def words(spec):
    """A specification without its width."""
    more = {"signed": spec.symmetric, "each": spec.per_segment, f"ema {spec.ema}": spec.ema}
    return " ".join([spec.per, spec.range, *(word for word, on in more.items() if on)])


@pytest.mark.parametrize("method", METHODS)
def test_method_is_what_its_paper_or_its_code_says(method, points):
    files = [
        CONFIGS / f"{name}.yaml"
        for name in ("model/cifar10-compact", "bits/w4a4", f"method/{method}", "preset/demo")
    ]
    config, wanted = load(RunConfig, files, WORDS), DEFAULT | TABLE[method]
    c = config.calibration
    found = {
        "segments": config.segments,
        "builder": c.builder,
        "options": c.options,
        "start": c.start,
    }
    assert config.method == method and found == {key: wanted[key] for key in found}
    assert check_passes(config.all_passes) == list(wanted["passes"].items())
    widths = WIDTHS | wanted["widths"]
    for which, *point in points:
        facts = resolve(config.all_rules, *point)
        weight, inputs = facts["weight"], facts["input"]
        product = which in ("product", "probs")
        assert (inputs.bits if product else (weight.bits, inputs.bits)) == widths[which], point
        assert product or weight.bits == 32 or words(weight) == wanted["weight"], point
        assert (
            inputs.bits == 32 or words(inputs) == wanted["probs" if which == "probs" else "input"]
        ), point
        assert product or which == "scale_shift" or facts["balance"] is wanted["balance"], point
        assert facts["split"]


def test_scales_of_tfmq_by_step_for_temporal_features_alone(points):
    """The exceptions that tfmq.yaml names as the paper's."""
    text = (CONFIGS / "method/tfmq.yaml").read_text()
    words = text[text.index("'exceptions=") :].split("'")[1]
    config = load(RunConfig, [CONFIGS / "method/tfmq.yaml"], [words])
    for which, *point in points:
        inputs = resolve(config.all_rules, *point)["input"]
        assert inputs.bits == 32 or inputs.static == (point[1] not in ("temb", "emb_proj")), point


def test_the_fast_preset_begins_at_second_order_codes_and_the_published_ones_say_nothing():
    """What is ours has a name; the lists of passes of demo and paper are as they were."""
    method, options = CONFIGS / "method/qdiffusion.yaml", ("gptq", "num_samples", "num_values")
    for preset, expected in (
        ("demo", {}),
        ("paper", {}),
        ("fast", {"gptq": True, "num_samples": 512, "num_values": 8192}),
    ):
        config = load(RunConfig, [method, CONFIGS / f"preset/{preset}.yaml"])
        said = {k: v for entry in config.passes for own in entry.values() for k, v in own.items()}
        assert {key: said[key] for key in options if key in said} == expected
