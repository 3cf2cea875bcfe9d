"""Mixed precision: the choice is the best one within the budget, and the rules that say so."""

import itertools
import json

import pytest
import torch
import yaml
from tiny import make_job, normal, quantized, rules

from evaluation.scores.cost import bit_operations
from quant.convert import convert
from quant.inventory import quantization_map
from quant.network import quant_layers
from quant.passes.allocate_bits import allocate_bits, solve
from quant.passes.run import run_passes

ENDS = [{"role": ["stem", "out"], "weight": {"bits": 8}, "input": {"bits": 8}}]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "layers, choices",
    [("abcd", [(2,), (4,), (8,)]), ("abc", [*itertools.product((2, 4, 8), repeat=2)])],
    ids=["size", "bops"],
)
def test_choice_is_that_of_brute_force(layers, choices, seed):
    rng = torch.Generator().manual_seed(seed)
    amounts = {n: int(torch.randint(10, 100, (1,), generator=rng)) for n in layers}
    costs = {n: {c: amounts[n] * torch.Size(c).numel() for c in choices} for n in layers}
    errors = {
        n: {c: sum(float(torch.rand(1, generator=rng)) * 4.0**-b * 1e3 for b in c) for c in choices}
        for n in layers
    }
    budget = 4.3 ** len(choices[0]) * sum(amounts.values())
    best = min(
        (
            chosen
            for chosen in itertools.product(choices, repeat=len(layers))
            if sum(costs[n][c] for n, c in zip(layers, chosen)) <= budget
        ),
        key=lambda chosen: sum(errors[n][c] for n, c in zip(layers, chosen)),
    )
    assert solve(errors, costs, budget) == dict(zip(layers, best))


def test_a_billionth_above_the_budget_is_above_it():
    """The solver's own tolerance is a millionth."""
    assert solve({"a": {8: 0.0, 4: 1.0}}, {"a": {8: 10**9 + 1, 4: 9 * 10**8}}, 10**9) == {"a": 4}


def test_differences_far_below_the_largest_error_count():
    errors = {"a": {2: 1e9, 4: 2e-3, 8: 1e-3}, "b": {2: 1e9, 4: 9e-3, 8: 1e-3}}
    assert solve(errors, {n: {b: b for b in (2, 4, 8)} for n in "ab"}, 12) == {"a": 4, "b": 8}


def test_the_sensitive_layer_gets_the_bits(tiny_net, tmp_path):
    tiny_net.requires_grad_(False)
    # an outlier: few bits round the rest of its channel away
    tiny_net.conv_out.weight.data[0, 0, 0, 0] *= 100
    before = tiny_net.state_dict()["conv_out.weight"].clone()
    job = make_job(tiny_net, tmp_path, rules(4, 8))
    total, *facts = allocate_bits(job, average=4.0, choices=(2, 4, 8), num_samples=4)
    layers = quant_layers(job.net)
    bits = {name: m.weight_quantizer.spec.bits for name, m in layers.items()}
    assert bits == {f["unit"]: f["bits"]["weight"] for f in facts} and bits["conv_out"] == 8
    assert all(m.input_quantizer.spec.bits == 8 for m in layers.values())
    sizes = {name: int(torch.Size(m.shape).numel()) for name, m in layers.items()}
    assert (
        total["used"]
        == sum(sizes[n] * bits[n] for n in sizes)
        <= total["allowed"]
        == 4 * sum(sizes.values())
    )
    assert all(f["errors"]["weight"][2] >= f["errors"]["weight"][8] for f in facts)
    assert (
        torch.equal(tiny_net.conv_out.weight, before) and type(tiny_net.conv_out) is torch.nn.Conv2d
    )
    run_passes(job, ["fit_ranges"])
    assert job.net(normal(1, 3, 8, 8), torch.zeros(1)).isfinite().all()


def test_bit_operations_stay_within_those_of_the_rules(tiny_net, tmp_path):
    wanted = [*rules(4, 6), *ENDS]
    job = make_job(tiny_net.requires_grad_(False), tmp_path, wanted)
    before = quantization_map(tiny_net, job.net, job.graph.macs)
    total, *facts = allocate_bits(job, budget="bops", choices=(3, 4, 8), num_samples=2)
    after = quantization_map(tiny_net, job.net, job.graph.macs)
    found, allowed = (bit_operations(rows["layers"])["quantized"] for rows in (after, before))
    assert total["used"] <= total["allowed"]
    assert allowed - found == total["allowed"] - total["used"]  # all else is as it was
    chosen = {f["unit"]: (f["bits"]["weight"], f["bits"]["input"]) for f in facts}
    assert len(set(chosen.values())) > 1
    for old, new in zip(before["layers"], after["layers"]):
        if old["kind"] == "matmul" or old["role"] in ("stem", "out"):
            assert new == old and new["name"] not in chosen
        else:
            assert (new["weight_bits"], new["input_bits"]) == chosen[new["name"]]
    # from passes.jsonl into a YAML
    pasted = yaml.safe_load(json.dumps(total["rules"]))
    assert (
        quantization_map(tiny_net, convert(tiny_net, [*wanted, *pasted]), job.graph.macs) == after
    )


def test_errors_are_those_of_one_tensor_quantized_alone(tiny_net, tmp_path):
    job = make_job(tiny_net.requires_grad_(False), tmp_path, rules(4, 4), num=6)
    arguments = job.calibration.arguments(slice(None))
    target = tiny_net(*arguments)
    for fact in allocate_bits(job, budget="bops", choices=(4,), num_samples=6)[1::10]:
        for part, spec in (("weight", {"bits": 4, "per": "channel"}), ("input", {"bits": 4})):
            alone = quantized(
                tiny_net, tmp_path, [{"match": fact["unit"], "kind": "layer", part: spec}], num=6
            )
            error = float((alone(*arguments) - target).double().square().sum()) / 6
            assert fact["errors"][part][4] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize(
    "options, wanted, sentence",
    [
        (
            {"average": 1.5},
            rules(4, 8),
            "bits of weights cannot be met: with 2 bits everywhere it takes",
        ),
        (
            {"budget": "bops", "choices": (4, 8)},
            rules(3, 4),
            "bit operations cannot be met: with 4 bits everywhere it",
        ),
        ({"choices": (4, 32)}, rules(4, 8), "chooses among widths of 2 to 8 bits"),
        (
            {"budget": "bops"},
            [{"weight": {"bits": 4}}],
            "no layer has a quantized weight and input of one width",
        ),
    ],
)
def test_refusals(tiny_net, tmp_path, options, wanted, sentence):
    with pytest.raises(ValueError) as error:
        allocate_bits(make_job(tiny_net, tmp_path, wanted), **options)
    assert sentence in str(error.value)


def test_it_comes_before_what_fits_the_network(tiny_net, tmp_path):
    with pytest.raises(
        ValueError, match="decides about the network as it was; list it before fit_ranges"
    ):
        run_passes(
            make_job(tiny_net, tmp_path, rules(4, 8)),
            ["fit_ranges", {"allocate_bits": {"num_samples": 2, "choices": [4, 8]}}],
        )
