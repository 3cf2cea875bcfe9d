"""Step-aware bits of activations: the ranges of steps, and a quantizer whose width depends on the segment."""
import math

import pytest
import torch

from ddim.schedule import make_schedule
from models.diffusion import load_model
from quant.convert import convert, input_quantizers
from quant.graph import trace
from quant.passes import Job, run_passes
from quant.quantizer import Quantizer, QuantSpec
from quant.stepbits import forward_snr, input_rules, ranges_of
from quant.timeline import Timeline
from tiny import EXAMPLE, normal, rules, samples


def test_neighbours_of_one_width_share_a_range():
    assert ranges_of({0.0: 8, 100.0: 8, 200.0: 4, 300.0: 4, 400.0: 8}) == ([150.0, 350.0], [8, 4, 8])
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
        q.fit([x.flatten()[None]], s)
        alone = Quantizer(QuantSpec(bits=bits), torch.tensor(0))
        alone.fit([x.flatten()[None]])
        timeline.segment = s
        assert torch.equal(q(x), alone(x)) and len(q(x).unique()) <= 2 ** bits
    timeline.segment = torch.tensor([0, 1, 1, 0])
    mixed = q(x)
    for i, s in enumerate((0, 1, 1, 0)):
        timeline.segment = s
        assert torch.equal(q(x[i:i + 1]), mixed[i:i + 1])


def test_number_of_widths_must_be_that_of_the_segments():
    with pytest.raises(ValueError, match="segment_bits names 2 widths, the timeline has 1 segments"):
        Quantizer(QuantSpec(bits=8, segment_bits=(3, 6)), torch.tensor(0), Timeline())


def test_rules_name_every_activation_but_softmax_outputs(tiny_net):
    wanted = input_rules(convert(tiny_net, rules(4, 8)), {"bits": 5})
    again = input_quantizers(convert(tiny_net, rules(4, 8) + wanted))
    assert {q.spec.bits for n, q in again.items() if not n.endswith("av_matmul.b_quantizer")} == {5}
    assert {q.spec.bits for n, q in again.items() if n.endswith("av_matmul.b_quantizer")} == {8}


def test_the_pass_gives_each_step_the_width_that_its_noise_allows(tiny_config, tmp_path):
    model = load_model(tiny_config, device="cpu")
    x, times = normal(4, 3, 8, 8), [10.0, 400.0, 990.0]

    def trajectory(num_images, seed):
        for step, t in enumerate(reversed(times)):
            yield step, t, x, None, model.eps(x, torch.full((4,), t))
    job = Job(model=model, net=convert(model.net, rules(8, 8)), calibration=samples(), graph=trace(model.net, EXAMPLE),
              resume_folder=tmp_path, rules=rules(8, 8), log=lambda line: None, trajectory=trajectory)
    facts = run_passes(job, [{"step_bits": {"choices": [8, 3]}}, {"fit_ranges": {"num_samples": 10}}])
    rows = [f for f in facts if f["pass"] == "step_bits"]
    assert [f["t"] for f in rows] == times
    for f in rows:
        assert f["bits"] == (3 if f["snr_quantized"][3] > f["snr_forward"] else 8)
    assert rows[-1]["bits"] == 3 and rows[0]["bits"] == 8  # mostly noise; mostly image
    q = input_quantizers(job.net)["conv_out.input_quantizer"]
    assert q.bits == [8, 3] or q.bits == [8, 8, 3][:len(q.bits)]
    assert job.net.timeline.num_segments == len(q.bits)
