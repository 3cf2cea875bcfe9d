"""Several models in one: equal parts are one model, the file holds them all, and what they share
must agree."""

import pytest
import torch
from conftest import TINY
from tiny import SHAPE, make_job, normal, quantized, samples

from models.zoo import build_network
from quant.checkpoint import load_quantized, save_quantized
from quant.convert import convert
from quant.network import input_quantizers, quant_layers
from quant.passes.run import run_passes
from quant.passes.segment_models import merge
from quant.timeline import Timeline

OWN = [{"weight": {"bits": 4, "per": "channel", "per_segment": True}, "input": {"bits": 8}}]
SHARED = [{"weight": {"bits": 4, "per": "channel"}, "input": {"bits": 8}}]
TIMES = torch.tensor([100.0, 500.0, 900.0])


def eps(net, x, t):
    return torch.cat([net(x[i : i + 1], t[i : i + 1]) for i in range(len(x))])


def segmented(net, folder, wanted, passes, **more):
    job = make_job(net, folder, wanted, num=12, boundaries=[300, 700], **more)
    facts = run_passes(job, [{"segment_models": {"passes": passes}}])
    return job.net, facts


def test_equal_parts_are_one_model(tiny_net, tmp_path):
    one = quantized(tiny_net, tmp_path, SHARED)
    several = convert(tiny_net, OWN, Timeline([300, 700]))
    merge(several, [one, one, one])
    x = normal(3, *SHAPE)
    assert torch.equal(eps(several, x, TIMES), eps(one, x, TIMES))


def test_every_segment_is_calibrated_and_run_on_its_own(tiny_net, tmp_path):
    net, facts = segmented(
        tiny_net,
        tmp_path,
        OWN,
        [
            "fit_ranges",
            {
                "reconstruct": {
                    "weight_iters": 5,
                    "input_iters": 2,
                    "batch_size": 4,
                    "weight_lr": 0.3,
                }
            },
        ],
    )
    assert [f["segment"] for f in facts if f["pass"] == "fit_ranges"] == [0, 0, 1, 1, 2, 2]
    assert "segment" not in facts[-1] and facts[-1]["pass"] == "segment_models"
    layer = quant_layers(net)["conv_in"]
    assert layer.weight_int.shape == (3, *layer.shape) and len(layer.weight_int.unique(dim=0)) == 3
    x = normal(3, *SHAPE)
    for s, t in enumerate(TIMES):
        alone = convert(tiny_net, SHARED)
        for name, m in quant_layers(alone).items():
            m.harden() if m.weight_quantizer.is_fitted else None
            source = quant_layers(net)[name]
            m.weight_quantizer.scale.data = source.weight_quantizer.scale[s : s + 1].clone()
            m.weight_int, m.weight = source.weight_int[s], None
        for name, q in input_quantizers(alone).items():
            source = input_quantizers(net)[name]
            q.scale.data, q.zero_point = (
                source.scale[s : s + 1].clone(),
                source.zero_point[s : s + 1],
            )
        assert torch.equal(net(x[s : s + 1], t[None]), alone(x[s : s + 1], t[None]))


def test_file_holds_all_models(tiny_net, tmp_path):
    net, _ = segmented(tiny_net, tmp_path, OWN, ["fit_ranges"])
    path, x = tmp_path / "q.safetensors", normal(3, *SHAPE)
    save_quantized(path, net, {"name": "tiny", "network": TINY, "rules": OWN, "weights_hash": ""})
    assert torch.equal(eps(load_quantized(path, build_network), x, TIMES), eps(net, x, TIMES))


def test_shared_weights_give_a_table_of_scales_for_each_segment(tiny_net, tmp_path):
    net, _ = segmented(tiny_net, tmp_path, SHARED, ["fit_ranges"])
    table = make_job(tiny_net, tmp_path, SHARED, num=12, boundaries=[300, 700])
    run_passes(table, ["fit_ranges"])
    x = normal(3, *SHAPE)
    assert torch.allclose(eps(net, x, TIMES), eps(table.net, x, TIMES), atol=1e-6)
    assert all(
        len(q.scale.unique(dim=0)) > 1 for q in [input_quantizers(net)["conv_out.input_quantizer"]]
    )


def test_a_segment_for_every_step_is_a_scale_for_every_step(tiny_net, tmp_path):
    steps = samples(12).t.sort().values
    nets = []
    # kernels round otherwise in other batches
    fit = [{"fit_ranges": {"batch_size": 1}}]
    for passes in (fit, [{"segment_models": {"passes": fit}}]):
        job = make_job(
            tiny_net, tmp_path, SHARED, num=12, boundaries=((steps[1:] + steps[:-1]) / 2).tolist()
        )
        run_passes(job, passes)
        nets.append(job.net)
    table, several = (input_quantizers(net) for net in nets)
    for name, q in table.items():
        assert len(q.scale) == 12 and torch.equal(q.scale, several[name].scale)
        assert torch.equal(q.zero_point, several[name].zero_point)
    x = normal(12, *SHAPE)
    assert torch.equal(nets[0](x, steps), nets[1](x, steps))


def test_a_batch_across_segments_is_refused(tiny_net, tmp_path):
    net, _ = segmented(tiny_net, tmp_path, OWN, ["fit_ranges"])
    with pytest.raises(ValueError, match="run the samples of each segment apart"):
        net(normal(3, *SHAPE), TIMES)


@pytest.mark.parametrize(
    "wanted, passes, sentence",
    [
        (
            SHARED,
            [
                "fit_ranges",
                {
                    "reconstruct": {
                        "weight_iters": 5,
                        "input_iters": 0,
                        "batch_size": 4,
                        "weight_lr": 0.3,
                    }
                },
            ],
            "the segments have different weights in .*; add weight: {per_segment: true}",
        ),
        (
            [OWN[0] | {"balance": True}],
            [{"balance": {"num_alphas": 3}}, "fit_ranges"],
            "balance cannot be inside segment_models: .* leave it out",
        ),
        (
            OWN,
            ["fit_ranges", "bypass_input"],
            "bypass_input cannot be inside segment_models: .* list it after",
        ),
        (OWN, [{"reconstrct": {}}], "pass 'reconstrct' is unknown; did you mean 'reconstruct'"),
    ],
)
def test_what_cannot_be_shared_or_done_is_said(tiny_net, tmp_path, wanted, passes, sentence):
    with pytest.raises(ValueError, match=sentence):
        segmented(tiny_net, tmp_path, wanted, passes)


def test_what_the_segments_share_must_not_differ(tiny_net, tmp_path):
    whole = make_job(tiny_net, tmp_path, OWN, boundaries=[500]).net
    parts = [quantized(tiny_net, tmp_path / f"{i}", SHARED) for i in range(2)]
    merge(whole, parts)
    norm = parts[1].get_submodule("mid.block_1.norm1")
    norm.bias = torch.nn.Parameter(norm.bias + 1)  # in place it would be that of all
    with pytest.raises(
        ValueError, match=r"changed mid.block_1.norm1.bias, which the segments share"
    ):
        merge(whole, parts)


def test_own_weights_without_the_pass_and_the_pass_without_segments(tiny_net, tmp_path):
    with pytest.raises(ValueError, match="are made by the pass segment_models"):
        quantized(tiny_net, tmp_path, OWN, boundaries=[500])
    with pytest.raises(ValueError, match="needs several time segments; set segments: 3 or more"):
        quantized(tiny_net, tmp_path, OWN, passes=[{"segment_models": {"passes": ["fit_ranges"]}}])
