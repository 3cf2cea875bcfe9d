"""Mixed precision: the choice is the best one within the budget."""
import itertools

import pytest
import torch

from quant.allocate import allocate_bits, solve
from quant.convert import quant_layers
from quant.passes import run_passes
from tiny import make_job, normal, rules


@pytest.mark.parametrize("seed", range(4))
def test_choice_is_that_of_brute_force(seed):
    rng = torch.Generator().manual_seed(seed)
    names, choices = "abcd", (2, 4, 8)
    sizes = {n: int(torch.randint(10, 100, (1,), generator=rng)) for n in names}
    errors = {n: {b: float(torch.rand(1, generator=rng)) * 4.0 ** -b * 1e3 for b in choices} for n in names}
    budget = 4.3 * sum(sizes.values())
    best = min((c for c in itertools.product(choices, repeat=4)
                if sum(sizes[n] * b for n, b in zip(names, c)) <= budget),
               key=lambda c: sum(errors[n][b] for n, b in zip(names, c)))
    assert solve(errors, sizes, budget) == dict(zip(names, best))


def test_the_sensitive_layer_gets_the_bits(tiny_net, tmp_path):
    tiny_net.requires_grad_(False)
    tiny_net.conv_out.weight.data[0, 0, 0, 0] *= 100       # an outlier: few bits round the rest of its channel away
    before = tiny_net.state_dict()["conv_out.weight"].clone()
    job = make_job(tiny_net, tmp_path, rules(4, 8))
    facts = allocate_bits(job, average=4.0, choices=(2, 4, 8), num_samples=4)
    layers = quant_layers(job.net)
    bits = {name: m.weight_quantizer.spec.bits for name, m in layers.items()}
    assert bits == {f["unit"]: f["bits"] for f in facts} and bits["conv_out"] == 8
    sizes = {name: int(torch.Size(m.shape).numel()) for name, m in layers.items()}
    assert sum(sizes[n] * bits[n] for n in sizes) <= 4.0 * sum(sizes.values())
    assert all(f["errors"][2] >= f["errors"][8] for f in facts)
    assert torch.equal(tiny_net.conv_out.weight, before) and type(tiny_net.conv_out) is torch.nn.Conv2d
    run_passes(job, ["fit_ranges"])
    assert job.net(normal(1, 3, 8, 8), torch.zeros(1)).isfinite().all()


def test_impossible_budget_and_wrong_order(tiny_net, tmp_path):
    with pytest.raises(ValueError, match="an average of 1.5 bits cannot be reached with widths of 2 bits and more"):
        allocate_bits(make_job(tiny_net, tmp_path, rules(4, 8)), average=1.5)
    with pytest.raises(ValueError, match="list it before the passes that balance, fit or reconstruct"):
        run_passes(make_job(tiny_net, tmp_path, rules(4, 8)),
                   ["fit_ranges", {"allocate_bits": {"num_samples": 2, "choices": [4, 8]}}])
