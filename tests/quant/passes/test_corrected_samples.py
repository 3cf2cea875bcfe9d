"""The correction where images are made: guidance first, every sampler, the file and all stages."""

import json

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, assert_close
from corrections import STEPS, filled
from PIL import Image
from tiny import SHAPE, facts_of, normal, rules

from base.files import PROJECT, load_tensors, save_tensors
from ddim.sampler import SAMPLERS
from models.condition import by_class
from models.diffusion import DiffusionModel
from models.sampling import Sampling, sample
from models.zoo import build_network
from quant.checkpoint import load_quantized, save_quantized
from quant.network import Correction
from tinydm.run_folder import open_run
from tinydm.stages import calibrate, evaluate, quantize
from tinydm.stages.sample import draw, model_of

torch.set_num_threads(1)


def test_guidance_comes_first(tiny_model):
    """e_null + 3 (e_cond - e_null) = 3 cond x, then the correction."""

    class Net(torch.nn.Module):
        def forward(self, x, t, cond):
            return x * cond[:, None, None, None]

    net, x, t, cond = Net(), normal(2, *SHAPE), torch.tensor([10.0, 100.0]), torch.tensor([1, 2])
    net.register_buffer("weight", torch.zeros(1))
    net.correction = filled()
    guided = DiffusionModel(
        "tiny",
        net,
        tiny_model.schedule,
        SHAPE,
        "",
        guidance=3.0,
        condition=by_class(3, torch.tensor, null=0),
    )
    assert_close(
        guided.eps(x, t, cond), net.correction.eps(3 * cond[:, None, None, None] * x, t), 1e-6
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_zero_tables_leave_the_bytes_of_every_sampler(sampler, tiny_model):
    how = Sampling(
        sampler=sampler,
        steps=5,
        skip="time_uniform" if sampler.startswith("dpm_") else "uniform",
        eta=0.7 if sampler in ("ddim", "ddpm") else 0.0,
        batch_size=3,
    )
    images = sample(tiny_model, range(3), how)
    tiny_model.net.correction = Correction(torch.arange(1000), 3)
    assert torch.equal(sample(tiny_model, range(3), how), images)
    tiny_model.net.correction.rows += 0.5
    assert not torch.equal(sample(tiny_model, range(3), how), images)


def test_only_a_sampler_with_noise_of_its_own_adds_less(tiny_model):
    how = {eta: Sampling(steps=5, skip="uniform", eta=eta, batch_size=3) for eta in (0.0, 1.0)}
    images = {eta: sample(tiny_model, range(3), how[eta]) for eta in how}
    tiny_model.net.correction = Correction(torch.arange(0, 1000, 200), 3)
    tiny_model.net.correction.variance += 0.05
    assert torch.equal(sample(tiny_model, range(3), how[0.0]), images[0.0])
    assert not torch.equal(sample(tiny_model, range(3), how[1.0]), images[1.0])


def test_the_file_keeps_the_correction_and_the_bytes(corrected, tmp_path):
    job, _ = corrected
    recipe = {
        "name": "tiny",
        "network": TINY,
        "rules": rules(3, 4),
        "weights_hash": job.model.weights_hash,
    }
    save_quantized(tmp_path / "q.safetensors", job.net, recipe)
    tensors, meta = load_tensors(tmp_path / "q.safetensors")
    assert {name for name in tensors if name.startswith("correction.")} == {
        "correction.times",
        "correction.slope",
        "correction.rows",
        "correction.columns",
        "correction.variance",
    }
    before, after = (
        job.model.with_net(net)
        for net in (job.net, load_quantized(tmp_path / "q.safetensors", build_network))
    )
    sampling = Sampling(**STEPS, seed=1, batch_size=3)
    assert torch.equal(*(sample(m, range(3), sampling) for m in (before, after)))
    del tensors["correction.slope"]
    save_tensors(tmp_path / "cut.safetensors", tensors, meta)
    with pytest.raises(
        ValueError, match="does not fit its own recipe .1 tensors, first correction.slope"
    ):
        load_quantized(tmp_path / "cut.safetensors", build_network)
    flat = tensors | {
        "correction.slope": job.net.correction.slope,
        "correction.rows": job.net.correction.times,
    }
    save_tensors(tmp_path / "flat.safetensors", flat, meta)
    with pytest.raises(
        ValueError, match="does not fit its own recipe .. tensors, first correction.rows"
    ):
        load_quantized(tmp_path / "flat.safetensors", build_network)
    job.net.correction = None
    save_quantized(tmp_path / "without.safetensors", job.net, recipe)
    assert load_quantized(tmp_path / "without.safetensors", build_network).correction is None


def test_from_the_method_yaml_to_images(tiny_config, tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_config))
    configs = [
        PROJECT / "configs" / name
        for name in ("bits/w4a8.yaml", "method/ptqd.yaml", "preset/demo.yaml")
    ]
    calibrate.run(
        [
            str(tmp_path / "tiny.yaml"),
            *map(str, configs),
            "sampling.steps=4",
            "sampling.eta=1.0",
            "sampling.num=6",
            "sampling.batch_size=4",
            "calibration.steps=4",
            "calibration.images=6",
            "effort.weight_iters=4",
            "effort.input_iters=2",
            "evaluation.sqnr_images=2",
            "device=cpu",
            f"out={tmp_path}/run",
        ]
    )
    quantize.run([f"{tmp_path}/run"])
    run = open_run(tmp_path / "run")
    facts = [json.loads(line) for line in (tmp_path / "run/passes.jsonl").read_text().splitlines()]
    facts = facts_of("correct_noise", facts)
    assert [fact["t"] for fact in facts] == [0, 250, 500, 750]
    assert all(fact["mse_after"] < fact["mse_before"] for fact in facts)
    draw(run)
    images = sample(model_of(run, "simulated"), range(4), run.config.sampling)
    assert (
        np.array(Image.open(tmp_path / "run/samples/000003.png"))
        == images[3].permute(1, 2, 0).numpy()
    ).all()
    with_it = evaluate.sqnr(run)
    tensors, meta = load_tensors(tmp_path / "run/quantized.safetensors")
    save_tensors(
        tmp_path / "run/quantized.safetensors",
        {name: t for name, t in tensors.items() if not name.startswith("correction.")},
        meta,
    )
    assert [row["sqnr_db"] for row in with_it] != [row["sqnr_db"] for row in evaluate.sqnr(run)]
