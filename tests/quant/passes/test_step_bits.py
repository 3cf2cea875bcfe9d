"""Step-aware bits of activations: the ranges of steps, and a quantizer whose width depends on the
segment."""

import math

import pytest
import torch
from conftest import TINY
from tiny import EXAMPLE, SHAPE, facts_of, make_job, normal, quantized, rules, samples

from ddim.schedule import make_schedule
from models.diffusion import load_model
from models.zoo import build_network
from quant.checkpoint import load_quantized, save_quantized
from quant.convert import convert
from quant.graph import trace
from quant.network import input_quantizers
from quant.observer import fit_scales
from quant.passes.job import Job
from quant.passes.run import run_passes
from quant.passes.step_bits import forward_snr, input_rules, ranges_of, step_bits
from quant.quantizer import Quantizer
from quant.spec import QuantSpec
from quant.timeline import Timeline


def test_neighbours_of_one_width_share_a_range():
    assert ranges_of({0.0: 8, 100.0: 8, 200.0: 4, 300.0: 4, 400.0: 8}) == (
        [150.0, 350.0],
        [8, 4, 8],
    )
    assert ranges_of({5.0: 6}) == ([], [6])


def test_signal_to_noise_of_the_forward_process():
    schedule = make_schedule(kind="linear", timesteps=1000)
    abar = math.prod(1 - (1e-4 + (0.02 - 1e-4) * i / 999) for i in range(501))
    assert math.isclose(forward_snr(schedule, 500.0), abar / (1 - abar), rel_tol=1e-4)


def test_quantizer_of_several_widths_is_one_for_each_segment():
    timeline = Timeline([500])
    q = Quantizer(QuantSpec(bits=8, segment_bits=(3, 6)), torch.tensor(0), timeline)
    x = normal(4, 50)
    for s, bits in enumerate((3, 6)):
        fit_scales(q, [x.flatten()[None]], s)
        alone = Quantizer(QuantSpec(bits=bits), torch.tensor(0))
        fit_scales(alone, [x.flatten()[None]])
        timeline.segment = s
        assert torch.equal(q(x), alone(x)) and len(q(x).unique()) <= 2**bits
    timeline.segment = torch.tensor([0, 1, 1, 0])
    mixed = q(x)
    for i, s in enumerate((0, 1, 1, 0)):
        timeline.segment = s
        assert torch.equal(q(x[i : i + 1]), mixed[i : i + 1])


def test_number_of_widths_must_be_that_of_the_segments():
    with pytest.raises(
        ValueError, match="segment_bits names 2 widths, the timeline has 1 segments"
    ):
        Quantizer(QuantSpec(bits=8, segment_bits=(3, 6)), torch.tensor(0), Timeline())


def test_rules_name_every_activation_but_softmax_outputs(tiny_net):
    wanted = input_rules(convert(tiny_net, rules(4, 8)), {"bits": 5})
    again = input_quantizers(convert(tiny_net, rules(4, 8) + wanted))
    assert {q.spec.bits for n, q in again.items() if not n.endswith("av_matmul.b_quantizer")} == {5}
    assert {q.spec.bits for n, q in again.items() if n.endswith("av_matmul.b_quantizer")} == {8}


def test_exceptions_keep_their_width(tiny_net):
    """Stem and out at 8 bits beside 4: only the 4 become steps' widths."""
    own = rules(4, 4) + [{"role": ["stem", "out"], "input": {"bits": 8}}]
    again = input_quantizers(
        convert(tiny_net, own + input_rules(convert(tiny_net, own), {"bits": 5}))
    )
    assert (
        again["conv_in.input_quantizer"].spec.bits
        == again["conv_out.input_quantizer"].spec.bits
        == 8
    )
    assert again["mid.block_1.conv1.input_quantizer"].spec.bits == 5


def test_without_quantized_inputs_there_is_nothing_to_step(tiny_net):
    with pytest.raises(ValueError, match="choose bits.input below 32"):
        input_rules(convert(tiny_net, rules(8, 32)), {"bits": 5})


TIMES = [10.0, 100.0, 700.0, 990.0]


def stepped(config, folder):
    """A job of the tiny model, full-precision trajectories of two images and two more; with facts,
    once run."""
    model, x = load_model(config, device="cpu"), normal(4, *SHAPE)

    def trajectory(num_images, seed):
        for part in x.split(2):
            for step, t in enumerate(reversed(TIMES)):
                yield step, t, part, None, model.eps(part, torch.full((2,), t))

    job = Job(
        model=model,
        net=convert(model.net, rules(8, 8)),
        calibration=samples(),
        graph=trace(model.net, EXAMPLE),
        resume_folder=folder,
        rules=rules(8, 8),
        log=lambda line: None,
        trajectory=trajectory,
    )
    return (
        job,
        run_passes(job, [{"step_bits": {"choices": [8, 3]}}, {"fit_ranges": {"num_samples": 10}}]),
        x,
    )


def test_the_pass_gives_each_step_the_width_that_its_noise_allows(tiny_config, tmp_path):
    """Of networks made here for each width, weights in full precision, softmax outputs at 8 bits in
    both."""
    job, facts, x = stepped(tiny_config, tmp_path)
    nets = {
        bits: quantized(
            job.model.net,
            tmp_path,
            rules(32, bits) + [{"kind": "matmul", "role": "probs", "input": {"bits": 8}}],
        )
        for bits in (3, 8)
    }
    rows, expected = facts_of("step_bits", facts), []
    for t, row in zip(TIMES, rows):
        steps = torch.full((4,), t)
        eps = job.model.net(x, steps)
        error = {bits: (net(x, steps) - eps).norm() for bits, net in nets.items()}
        abar = math.prod(1 - (1e-4 + (0.02 - 1e-4) * i / 999) for i in range(int(t) + 1))
        fits = eps.norm() / error[3] > abar / (1 - abar)
        expected.append((t, 3 if fits else 8))
        assert row["snr_quantized"] == pytest.approx(
            {b: float(eps.norm() / e) for b, e in error.items()}, rel=1e-3
        )
        assert row["snr_forward"] == pytest.approx(abar / (1 - abar), rel=1e-3)
    assert [(f["t"], f["bits"]) for f in rows] == expected
    # mostly image; mostly noise
    assert [bits for _, bits in expected] == [8, 8, 3, 3]
    q = input_quantizers(job.net)
    assert q["conv_out.input_quantizer"].bits == [
        8,
        3,
    ] and job.net.timeline.boundaries.tolist() == [400.0]
    assert q["mid.attn_1.av_matmul.b_quantizer"].bits == [8, 8]


def test_network_of_several_widths_is_the_same_from_its_file(tiny_config, tmp_path):
    job, _, x = stepped(tiny_config, tmp_path)
    save_quantized(
        tmp_path / "q.safetensors",
        job.net,
        {"name": "tiny", "network": TINY, "rules": job.rules, "weights_hash": ""},
    )
    loaded = load_quantized(tmp_path / "q.safetensors", build_network)
    assert input_quantizers(loaded)["conv_out.input_quantizer"].bits == [8, 3]
    steps = torch.tensor(TIMES)
    assert torch.equal(loaded(x, steps), job.net(x, steps))


def test_segments_made_before_are_refused(tiny_net, tmp_path):
    with pytest.raises(
        ValueError, match="step_bits makes its own time segments; leave `segments` at 1"
    ):
        step_bits(make_job(tiny_net, tmp_path, rules(8, 8), boundaries=[500]))
