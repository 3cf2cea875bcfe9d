"""What is learned: latents, first stages and their codes, classes with guidance, and weights that
load as shipped."""

import pytest
import torch
from conftest import assert_close
from pipeline import MODELS
from safetensors.torch import save_file
from trainings import Recipe

from models.diffusion import load_model
from models.zoo import build_network
from tinydm.training.diffusion import DiffusionTraining
from tinydm.training.first_stage import FirstStageTraining, encode_images
from tinydm.training.loop import fit


def images(num=12, size=16):
    return torch.randint(
        0, 256, (num, 3, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )


@pytest.fixture(params=["unconditional", "class"])
def facts(request):
    torch.manual_seed(0)
    return MODELS[request.param]


def test_latents_have_unit_variance_and_come_with_their_mirror_images(facts):
    first_stage = build_network(**facts["first_stage"]).eval()
    latents, scale_factor = encode_images(first_stage, images(), batch_size=5)
    assert latents.shape == (12, 2, 3, 8, 8) and float(latents.std()) == pytest.approx(1, abs=1e-4)
    x = images()[7:8].float() / 127.5 - 1
    torch.testing.assert_close(
        latents[7, 0], scale_factor * first_stage.encode(x)[0], atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        latents[7, 1], scale_factor * first_stage.encode(x.flip(3))[0], atol=1e-4, rtol=1e-4
    )


def test_first_stage_learns(facts, tmp_path):
    module = FirstStageTraining(
        facts, Recipe(num_images=40 * 4, steps_per_epoch=20, lr=3e-3), images(10)
    )
    rows = fit(module, images(10), torch.zeros(10, dtype=torch.long), tmp_path)
    assert rows[-1][1] < rows[0][1]
    module.draw_samples(tmp_path / "pairs.png", num=10)
    assert (tmp_path / "pairs.png").stat().st_size > 0


def test_unused_codes_move_onto_latents():
    module = FirstStageTraining(MODELS["class"], Recipe(), images())
    module.trainer = type("Trainer", (), {"global_step": 0, "current_epoch": 0})()
    codes = module.net.quantize.embedding.weight.detach()
    codes[5:] = 100.0  # nearest to nothing
    kept = codes[:5].clone()
    module.on_train_epoch_start()
    z = module.net.encode(images().float() / 127.5 - 1).detach().movedim(1, -1).flatten(0, 2)
    assert all(float((z - code).square().sum(1).min()) < 1e-8 for code in codes[5:])
    used = (codes[:5] == kept).all(1)
    assert used.any()  # what was near to something stays


def test_a_trained_latent_model_loads_as_it_is_shipped(facts, tmp_path):
    first_stage = build_network(**facts["first_stage"]).eval().requires_grad_(False)
    latents, scale_factor = encode_images(first_stage, images())
    module = DiffusionTraining(facts, Recipe(num_images=6 * 4), first_stage, scale_factor)
    fit(module, latents, torch.arange(12) % 3, tmp_path)
    save_file(
        {name: value.contiguous() for name, value in module.weights().items()},
        tmp_path / "model.safetensors",
    )
    config = facts | {"name": "trained", "checkpoint": str(tmp_path / "model.safetensors")}
    model, trained = load_model(config, device="cpu"), module.model()
    assert model.scale_factor == pytest.approx(scale_factor) and model.guidance == trained.guidance
    x, t = torch.randn(3, 3, 8, 8), torch.tensor([1.0, 500.0, 900.0])
    cond = [
        None if m.condition is None else m.condition.encode([2, 0, 1]) for m in (model, trained)
    ]
    with torch.no_grad():
        assert_close(model.eps(x, t, cond[0]), trained.eps(x, t, cond[1]), 1e-5)
    assert (model.decode(x).int() - trained.decode(x).int()).abs().max() <= 1


def test_labels_are_dropped_for_the_null_class(monkeypatch):
    module, seen = DiffusionTraining(MODELS["class"], Recipe(), torch.nn.Identity(), 1.0), []
    module.__dict__["forward_net"] = lambda x, t, labels: seen.append(labels) or x
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    for _ in range(40):
        module.training_step((torch.zeros(50, 2, 3, 8, 8), torch.zeros(50, dtype=torch.long)), 0)
    labels = torch.cat(seen)
    assert set(labels.tolist()) == {0, 3} and 0.07 < float((labels == 3).float().mean()) < 0.13
