"""A new method is one YAML, a new pass one Python file, wherever they lie; no file of the project
knows of them."""

import json
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from base.files import PROJECT
from models.zoo import build_network
from quant.checkpoint import load_quantized
from quant.network import quant_layers
from quant.passes.run import check_passes
from tinydm.stages import calibrate, quantize, sample

PASS = '''
"""A toy pass: no weight is larger than `share` of the largest of its layer."""
import torch


def clip_weights(job, *, share=1.0):
    layers = [layer for layer, _ in job.layer_pairs()]
    for layer in layers:
        limit = share * layer.weight.abs().max()
        layer.weight = torch.nn.Parameter(layer.weight.clamp(-limit, limit), requires_grad=False)
    job.log(f"clip_weights: {len(layers)} layers")
    return [{"pass": "clip_weights", "layers": len(layers)}]
'''
METHOD = """
method: clipped
rules:
  - {match: '*', weight: {bits: '${bits.weight}', per: channel}, input: {bits: '${bits.input}'}}
passes:
  - toy_method.clip_weights: {share: 0.5}
  - fit_ranges: {}
"""
WORDS = [
    "sampling.num=4",
    "sampling.batch_size=4",
    "calibration.steps=5",
    "calibration.images=4",
    "device=cpu",
]


@pytest.fixture
def files(tiny_config, tmp_path, monkeypatch):
    """-> [model YAML, method YAML]; toy_method.py beside them can be imported during a test."""
    contents = {
        "toy_method.py": PASS,
        "clipped.yaml": METHOD,
        "model.yaml": yaml.safe_dump(tiny_config),
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    yield [str(tmp_path / "model.yaml"), str(tmp_path / "clipped.yaml")]
    sys.modules.pop("toy_method", None)


def test_a_toy_method_runs_and_its_file_is_needed_only_to_quantize(
    files, tiny_net, tmp_path, capsys
):
    calibrate.run([*files, *WORDS, f"out={tmp_path / 'run'}"])
    assert "toy_method" not in sys.modules
    quantize.run([str(tmp_path / "run")])
    assert "clip_weights: " in capsys.readouterr().out
    facts = [json.loads(line) for line in (tmp_path / "run/passes.jsonl").read_text().splitlines()]
    net = load_quantized(tmp_path / "run/quantized.safetensors", build_network)
    assert [fact["pass"] for fact in facts if "seconds" in fact] == [
        "toy_method.clip_weights",
        "fit_ranges",
    ]
    assert facts[0]["pass"] == "clip_weights" and facts[0]["layers"] == len(quant_layers(net))
    layer, original = net.net.conv_in, tiny_net.conv_in.weight
    largest = (layer.weight_int.flatten(1).abs().amax(1) * layer.weight_scales()).max()
    torch.testing.assert_close(largest, original.abs().max() / 2, rtol=0.01, atol=0)

    del sys.modules["toy_method"]
    (tmp_path / "toy_method.py").write_text("raise AssertionError('nobody may import this')")
    sample.run([str(tmp_path / "run")])
    assert len(list((tmp_path / "run/samples").glob("*.png"))) == 4


def test_a_method_is_one_yaml(tiny_config, tmp_path):
    """Rules and passes; on a base it says what it changes. It is the same network as that of the
    base with the same change by words."""
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(tiny_config))
    (tmp_path / "thrifty.yaml").write_text(
        f"base: {PROJECT}/configs/method/minmax.yaml\n"
        "method: thrifty\n"
        "last: {rules: [{role: stem, weight: {bits: 3}}]}\n"
        "pass_options: {fit_ranges: {num_samples: 8}}\n"
    )
    change = "exceptions=[{role: stem, weight: {bits: 3}}]", "pass_options.fit_ranges.num_samples=8"
    found = {}
    for method, words in {
        tmp_path / "thrifty.yaml": (),
        PROJECT / "configs/method/minmax.yaml": change,
    }.items():
        run = tmp_path / method.stem
        files = [str(tmp_path / "model.yaml"), f"{PROJECT}/configs/bits/w4a8.yaml", str(method)]
        calibrate.run([*files, *WORDS, *words, f"out={run}"])
        quantize.run([str(run)])
        sample.run([str(run)])
        assert len(list((run / "samples").glob("*.png"))) == 4
        found[method.stem] = load_file(run / "quantized.safetensors")
    thrifty, minmax = found.values()
    assert thrifty.keys() == minmax.keys()
    assert all(torch.equal(thrifty[name], minmax[name]) for name in thrifty)
    layers = quant_layers(
        load_quantized(tmp_path / "thrifty/quantized.safetensors", build_network)
    ).values()
    assert {layer.weight_quantizer.spec.bits for layer in layers if layer.role == "stem"} == {3}
    assert {layer.weight_quantizer.spec.bits for layer in layers if layer.role != "stem"} == {4}


@pytest.mark.parametrize(
    "entry, complaint",
    [
        (
            {"toy_method.clip_weights": {"shares": 1}},
            "has no option 'shares'; did you mean 'share'?",
        ),
        (
            {"segment_models": {"passes": [{"toy_method.clip_weights": {"job": 1}}]}},
            "has no option 'job'",
        ),
        ("toy_method.clip", "'toy_method.clip' is no pass"),
        ("toy_method.torch", "'toy_method.torch' is no pass"),
        ("os.makedirs", "'os.makedirs' is no pass"),
        ("toy_methods.clip_weights", "cannot be imported .No module named 'toy_methods'."),
    ],
)
def test_mistakes_are_said_in_a_sentence_where_passes_run(entry, complaint, files):
    check_passes([entry])
    assert "toy_method" not in sys.modules
    with pytest.raises(ValueError, match=complaint.replace("?", r"\?")):
        check_passes([entry], importing=True)
