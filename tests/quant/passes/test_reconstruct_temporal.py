"""The temporal information block: it is what the network computes, and its layers are done first
and once."""

import shutil
from dataclasses import replace

import pytest
import torch
from conftest import TINY, randomize
from tiny import SHAPE, make_job, normal, rules

from models.zoo import build_network
from quant.network import quant_layers, set_input_quantization
from quant.passes import reconstruct_temporal as temporal
from quant.passes.fit_ranges import fit_ranges
from quant.passes.reconstruct_temporal import TemporalBlock, reconstruct_temporal
from quant.passes.run import run_passes
from quant.reconstruction.learn import batch_loss

LDM = {
    "family": "ldm-unet",
    "image_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "num_head_channels": 16,
}


@pytest.mark.parametrize(
    "network, labels", [(TINY, False), (LDM, False), (LDM | {"num_classes": 4}, True)]
)
def test_block_gives_what_the_network_adds(network, labels):
    net = randomize(build_network(**network)).eval()
    seen = []
    for m in net.modules():
        if getattr(m, "role", None) == "emb_proj":
            m.register_forward_hook(lambda m, x, out: seen.append(out))
    arguments = [torch.tensor([3.0, 700.0])] + ([torch.tensor([1, 3])] if labels else [])
    net(normal(2, *SHAPE), *arguments)
    expected, seen[:] = [out.detach() for out in seen], []
    found = TemporalBlock(net)(*arguments).detach()
    assert sorted(map(float, found.sum(0))) == sorted(map(float, torch.cat(expected, 1).sum(0)))


def test_its_loss_is_the_sum_over_the_projections_of_what_each_adds_to_its_block(
    tiny_net, tmp_path, monkeypatch
):
    job, seen = make_job(tiny_net.requires_grad_(False), tmp_path, rules(3, 8)), {}
    fit_ranges(job)

    def learn(lesson, layers):
        lesson = replace(lesson, generator=torch.Generator().manual_seed(3))
        seen.update(t=lesson.inputs[0], loss=float(batch_loss(lesson, 2.0)))

    monkeypatch.setattr(temporal, "learn_rounding", learn)
    reconstruct_temporal(job, batch_size=4)
    t, added = seen["t"][torch.randint(10, (4,), generator=torch.Generator().manual_seed(3))], []
    set_input_quantization(job.net, False)
    for net in (tiny_net, job.net):
        added.append([])
        for m in net.modules():
            if getattr(m, "role", None) == "emb_proj":
                m.register_forward_hook(lambda m, x, out: added[-1].append(out))
        net(normal(4, *SHAPE), t)
    losses = [float((quantized - exact).square().sum()) / 4 for exact, quantized in zip(*added)]
    assert (
        len(losses) == 8
        and min(losses) > 0
        and seen["loss"] == pytest.approx(sum(losses), rel=1e-5)
    )


def test_its_layers_are_hard_afterwards_and_later_passes_leave_them(tiny_net, tmp_path):
    job = make_job(tiny_net, tmp_path, rules(3, 8))
    fit_ranges(job)
    facts = reconstruct_temporal(job, iters=150, lr=0.05)
    assert facts[0]["error_after"] < 0.9 * facts[0]["error_before"]
    layers = quant_layers(job.net)
    temporal = {name: m for name, m in layers.items() if m.role in ("temb", "emb_proj")}
    assert all((m.weight_int is not None) == (name in temporal) for name, m in layers.items())
    done = {name: m.weight_int.clone() for name, m in temporal.items()}
    run_passes(job, [{"reconstruct": {"weight_iters": 2, "input_iters": 2, "batch_size": 4}}])
    assert all(torch.equal(m.weight_int, done[name]) for name, m in temporal.items())


def test_a_run_killed_behind_it_continues_to_the_same_bytes_with_scales_of_an_mlp(
    tiny_net, tmp_path
):
    """Its file holds hard weights; the scales of its layers are still to be learned."""
    passes = [
        "fit_ranges",
        {"dynamic_scales": {"warm_steps": 3}},
        {"reconstruct_temporal": {"iters": 3}},
        {"reconstruct": {"weight_iters": 3, "input_iters": 3, "batch_size": 4, "soft_lr": 0.05}},
    ]
    nets = []
    for folder in ("whole", "killed"):
        job = make_job(tiny_net, tmp_path / folder, rules(3, 8), num=12, boundaries=[300, 700])
        run_passes(job, passes)
        nets.append(job.net.state_dict())
        done = "2_reconstruct_temporal/temporal.safetensors"
        (tmp_path / "killed" / done).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "whole" / done, tmp_path / "killed" / done)
    assert all(torch.equal(value, nets[1][name]) for name, value in nets[0].items())


def test_network_without_quantized_temporal_layers(tiny_net, tmp_path):
    wanted = rules(4, 8) + [
        {"role": r, "weight": {"bits": 32}, "input": {"bits": 32}} for r in ("temb", "emb_proj")
    ]
    with pytest.raises(ValueError, match="no quantized layer has the role temb or emb_proj"):
        reconstruct_temporal(make_job(tiny_net, tmp_path, wanted))
