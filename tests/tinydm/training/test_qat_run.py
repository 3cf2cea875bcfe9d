"""Quantization-aware training in a run folder like any other."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import TINY, randomize
from PIL import Image
from pipeline import MODELS
from safetensors.torch import save_file
from tiny import rules, samples
from trainings import killed_training

from base.config import load
from base.files import PROJECT, load_tensors
from models.checkpoint_files import PREFIXES
from models.zoo import build_network
from quant.convert import convert
from quant.qat import prepare, scales_of
from tinydm.report import command as report
from tinydm.report.results import read_run
from tinydm.report.table import row_of
from tinydm.stages import evaluate, retabulate, sample
from tinydm.training import train
from tinydm.training.diffusion import Conditional
from tinydm.training.quantized import QuantizedTraining

WORDS = [
    "num_images=20",
    "batch_size=4",
    "steps_per_epoch=2",
    "warmup_steps=2",
    "device=cpu",
    "sample_every=100",
]


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setattr(QuantizedTraining, "draw_samples", lambda self, path: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for i in range(8):
        (folder / f"class{i % 2}").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (30 * i, 255 - 30 * i, 90)).save(
            folder / f"class{i % 2}/{i}.png"
        )
    return folder


def recipe_files(folder, facts, state):
    """A model YAML with its weights, and a recipe of its training."""
    save_file(state, folder / "model.safetensors")
    facts = facts | {
        "name": "tiny",
        "checkpoint": str(folder / "model.safetensors"),
        "weights": "raw",
    }
    (folder / "model.yaml").write_text(yaml.safe_dump(facts))
    recipe = yaml.safe_load((PROJECT / "configs/train/qat-latent-compact.yaml").read_text())
    own = {"model": str(folder / "model.yaml"), "rules": str(PROJECT / recipe["rules"])}
    (folder / "qat.yaml").write_text(yaml.safe_dump(recipe | own))
    return str(folder / "qat.yaml")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    network = TINY | {"image_size": 16, "attn_resolutions": [8]}
    facts = {
        "network": network,
        "schedule": {},
        "sampling": {"steps": 5, "skip": "uniform", "num": 4, "batch_size": 4},
    }
    return recipe_files(
        tmp_path_factory.mktemp("pixel"), facts, randomize(build_network(**network)).state_dict()
    )


def test_a_run_folder_like_any_other(recipe, data, tmp_path):
    out = tmp_path / "run"
    train.run([recipe, f"out={out}", f"data={data}", "dynamic=true", *WORDS])
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (
        config["method"] == "tdq-qat"
        and config["segments"] == "per_step"
        and config["bits"]["weight"] == 4
    )
    sample.run([str(out)])
    sample.run([str(out), "precision=float"])
    evaluate.run([str(out)])
    report.run([str(out)])
    assert len(json.loads((out / "metrics.json").read_text())["sqnr_db_per_step"]) == 5
    retabulate.run([str(out), f"out={tmp_path / 'other'}", "sampling.steps=10"])
    old, new = (
        load_tensors(folder / "quantized.safetensors")[0] for folder in (out, tmp_path / "other")
    )
    name = "mid.block_1.conv1.input_quantizer.scale"
    # uniform: every second step
    assert len(old[name]) == 5 and torch.equal(old[name], new[name][::2])
    sample.run([str(tmp_path / "other")])
    sample.run([str(tmp_path / "other"), "precision=float"])
    evaluate.run([str(tmp_path / "other")])
    (numbers,) = row_of(read_run(tmp_path / "other")).numbers
    assert len(json.loads((tmp_path / "other/metrics.json").read_text())["sqnr_db_per_step"]) == 10
    # steps change no width
    assert numbers["GBOPs"] == row_of(read_run(out)).numbers[0]["GBOPs"]
    with pytest.raises(
        ValueError, match=r"belongs to another recipe: bits.weight \(4 there, 3 here\)"
    ):
        train.run([recipe, f"out={out}", f"data={data}", "dynamic=true", *WORDS, "bits.weight=3"])
    with pytest.raises(ValueError, match="belongs to another recipe: preset"):
        train.run([recipe, f"out={out}", f"data={data}", "dynamic=true", *WORDS, "lr=0.5"])


@pytest.mark.parametrize("killed_at, dynamic", [(3, True), (2, False)])
def test_killed_and_resumed_training_ends_in_the_same_bytes(
    recipe, data, tmp_path, quiet, killed_at, dynamic
):
    words = [recipe, f"data={data}", f"dynamic={dynamic}", *WORDS]
    train.run([*words, f"out={tmp_path / 'whole'}"])
    with killed_training(killed_at):
        train.run([*words, f"out={tmp_path / 'resumed'}"])
    with pytest.raises(
        ValueError,
        match=r"does not exist yet; make it with: python scripts/train.py \(as before\) out=",
    ):
        sample.run([str(tmp_path / "resumed")])
    train.run([*words, f"out={tmp_path / 'resumed'}"])
    names = ["quantized.safetensors"] + ["dynamic.safetensors"] * dynamic
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (
            tmp_path / "resumed" / name
        ).read_bytes()
    assert (tmp_path / "whole/dynamic.safetensors").exists() is dynamic


@pytest.mark.parametrize("kind", ["class", "unconditional"])
def test_latent_models_keep_their_first_stage_scale_and_classes(kind, data, tmp_path, quiet):
    facts, state = (
        MODELS[kind] | {"sampling": {"steps": 4, "skip": "uniform", "num": 2, "batch_size": 2}},
        {},
    )
    torch.manual_seed(0)
    for part, key in (
        ("unet", "network"),
        ("first_stage", "first_stage"),
        ("cond_stage", "cond_stage"),
    ):
        if key in facts:
            net = build_network(**facts[key])
            state |= {
                PREFIXES[part] + name: value.clone() for name, value in net.state_dict().items()
            }
    recipe = recipe_files(tmp_path, facts, state | {"scale_factor": torch.tensor(0.7)})
    train.run(
        [recipe, f"out={tmp_path / 'run'}", f"data={data}", "dynamic=true", *WORDS, "num_images=8"]
    )
    sample.run([str(tmp_path / "run")])
    assert len(list((tmp_path / "run/samples").glob("*.png"))) == 2
    if kind == "class":
        many = tmp_path / "many"
        for i in range(5):
            (many / str(i)).mkdir(parents=True)
            Image.new("RGB", (16, 16)).save(many / f"{i}/0.png")
        with pytest.raises(ValueError, match="has 5 class folders, .* knows 4 classes"):
            train.run(
                [
                    recipe,
                    f"out={tmp_path / 'other'}",
                    f"data={many}",
                    "dynamic=true",
                    *WORDS,
                    "num_images=8",
                ]
            )
        with pytest.raises(ValueError, match="belongs to another recipe"):
            train.run(
                [
                    recipe,
                    f"out={tmp_path / 'run'}",
                    f"data={data}",
                    "dynamic=true",
                    *WORDS,
                    "num_images=8",
                    "weight_decay=0.5",
                ]
            )


def test_flags_are_other_words_for_keys():
    flags = [
        "--base",
        "a.yaml",
        "--n_bit_w",
        "4",
        "--n_bit_a=3",
        "--use_dynamic",
        "--ckpt",
        "x.pt",
        "data=c=d",
    ]
    keys = [
        "a.yaml",
        "bits.weight=4",
        "bits.input=3",
        "dynamic=true",
        "checkpoint=x.pt",
        "data=c=d",
    ]
    assert train.replace_flags(flags) == keys


@pytest.mark.parametrize(
    "path", sorted((PROJECT / "configs/train").glob("qat-*.yaml")), ids=lambda path: path.stem
)
def test_shipped_recipes_are_read(path):
    config = load(train.TrainConfig, [path])
    assert (
        config.task == "qat"
        and (PROJECT / config.model).is_file()
        and (PROJECT / config.rules).is_file()
    )


@pytest.mark.parametrize(
    "words, message",
    [
        (["--n_bit_v", "4"], "flag '--n_bit_v' is unknown; did you mean '--n_bit_"),
        (["--base"], "flag '--base' needs a value"),
        (["bits.weight=1"], "weight bits 1 are impossible"),
        (["bits.input=x"], "bits.input"),
        (["bits.input=32", "bits.softmax=32", "dynamic=true"], "set bits.input below 16"),
        ([f"rules={PROJECT}/configs/bits/w4a4.yaml"], "nothing says what is quantized"),
        (["data=/nowhere"], "image folder /nowhere does not exist"),
        (["checkpoint=/nowhere.ckpt"], "the checkpoint of tiny"),
        (["task=diffusion", "bits.weight=4"], "are of quantization-aware training"),
        (["init=a.safetensors"], "name another one .* with checkpoint=FILE"),
        (["num_images=2"], "not even one batch"),
    ],
)
def test_bad_input_gets_one_sentence(recipe, data, tmp_path, words, message):
    with pytest.raises(ValueError, match=message) as caught:
        train.run([recipe, f"out={tmp_path / 'run'}", f"data={data}", *WORDS, *words])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dynamic", [False, True])
def test_scales_have_a_tenth_of_the_rate_and_no_weight_decay(tiny_net, dynamic):
    net = Conditional(convert(tiny_net, rules(4, 4)))
    prepare(net.unet, samples(16), dynamic)
    task = SimpleNamespace(
        net=net,
        scales=scales_of(net.unet),
        config=SimpleNamespace(lr=0.02, beta2=0.99, weight_decay=0.3),
    )
    found = {
        id(p): (group["lr"], group["weight_decay"])
        for group in QuantizedTraining.build_optimizer(task).param_groups
        for p in group["params"]
    }
    learned = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert found.keys() == {id(p) for p in learned.values()}
    for name, p in learned.items():
        wanted = (0.002, 0.0) if name.endswith("quantizer.scale") else (0.02, 0.3)
        assert found[id(p)] == pytest.approx(wanted), name
