"""Quantization-aware training: what is learned and how, what is exported, and a run folder like any
other."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import TINY, deviation, killed_training, randomize
from PIL import Image
from pipeline import MODELS
from safetensors.torch import save_file
from tiny import SHAPE, normal, rules, samples

from base.config import load
from base.files import PROJECT, load_tensors
from models.weights import PREFIXES
from models.zoo import build_network
from quant.checkpoint import load_quantized, save_quantized
from quant.convert import convert
from quant.network import input_quantizers, quant_layers
from quant.qat import finish, prepare, scales_of
from tinydm.report import command as report
from tinydm.report.table import row_of
from tinydm.stages import evaluate, retabulate, sample
from tinydm.training import train
from tinydm.training.tasks import Conditional, DiffusionTraining, QuantizedTraining

TIMES = [0.0, 250.0, 500.0, 990.0]
FLOAT = {"weight": {"bits": 32}, "input": {"bits": 32}}
RULES = [*rules(4, 4), *({"role": role} | FLOAT for role in ("stem", "out", "temb", "emb_proj"))]


def prepared(net, dynamic):
    """A converted network that is learned, with its functions moved away from where they start."""
    quantized = convert(net, RULES)
    torch.manual_seed(0)  # what the functions begin with
    functions = prepare(quantized, samples(16), dynamic)
    for i, soft in enumerate(functions.values()):
        torch.nn.init.normal_(
            soft.layers[-1].weight, std=0.01, generator=torch.Generator().manual_seed(i)
        )
    return quantized, functions


def batch(num=4):
    return normal(num, *SHAPE, seed=5), torch.tensor(TIMES[:num])


def test_it_starts_at_the_fitted_ranges_static_or_dynamic(tiny_net):
    x, t = batch()
    static, _ = prepared(tiny_net, dynamic=False)
    dynamic = convert(tiny_net, RULES)
    prepare(dynamic, samples(16), dynamic=True)
    with torch.no_grad():
        # softplus(softplus^-1) moves a few codes
        assert deviation(dynamic(x, t), static(x, t)) < 0.05


def test_each_sample_has_the_scale_of_its_own_time(tiny_net):
    net, functions = prepared(tiny_net, dynamic=True)
    x, t = batch()
    whole = net(x, t)
    for i in range(len(x)):  # row by row
        assert torch.allclose(net(x[i : i + 1], t[i : i + 1])[0], whole[i], atol=1e-5)
    # and these differ
    assert all((soft.at(t)[0] != soft.at(t)[-1]).all() for soft in functions.values())


def test_everything_gets_a_gradient(tiny_net):
    for dynamic in (False, True):
        net, functions = prepared(tiny_net, dynamic)
        net(*batch()).square().mean().backward()
        learned = [p for soft in functions.values() for p in soft.parameters()] + scales_of(net)
        learned += [layer.weight for layer in quant_layers(net).values()]
        assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in learned)
        inputs = input_quantizers(net)
        assert len(functions) == (len(inputs) if dynamic else 0)
        assert all(q.scale.requires_grad is not dynamic for q in inputs.values())


@pytest.mark.parametrize("dynamic", [False, True])
def test_scales_have_a_tenth_of_the_rate_and_no_weight_decay(tiny_net, dynamic):
    net = Conditional(convert(tiny_net, RULES))
    net.functions = prepare(net.unet, samples(16), dynamic)
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


def test_gradients_of_weight_and_scale_are_those_of_lsq(tiny_net):
    layer = quant_layers(prepared(tiny_net, dynamic=False)[0])["down.0.block.0.conv1"]
    q, weight = layer.weight_quantizer, layer.weight
    q(weight).sum().backward()
    scale, zero_point = (v.detach().reshape(-1, 1, 1, 1) for v in (q.scale, q.zero_point))
    ratio = weight.detach() / scale
    code = ratio.round().clamp(-zero_point, 15 - zero_point)
    inside = (ratio >= -zero_point) & (ratio <= 15 - zero_point)
    expected = (
        torch.where(inside, code - ratio, code).sum((1, 2, 3)) / (weight[0].numel() * 15) ** 0.5
    )
    assert torch.allclose(q.scale.grad[0], expected, rtol=1e-3, atol=1e-5)
    assert torch.allclose(weight.grad, inside.float(), atol=1e-6)


def test_gradient_of_an_activation_scale_counts_the_values_of_a_sample(tiny_net):
    net, _ = prepared(tiny_net, dynamic=False)
    q = input_quantizers(net)["down.0.block.0.conv2.input_quantizer"]
    assert q.num_values == 8 * 8 * 8
    x = normal(3, 8, 8, 8)
    (q.codes(x) * q.table(q.scales(), x)).sum().backward()
    ratio, low = x / q.scale.detach(), -float(q.zero_point)
    code, inside = ratio.round().clamp(low, low + 15), (ratio >= low) & (ratio <= low + 15)
    expected = torch.where(inside, code - ratio, code).sum() / (512 * 15) ** 0.5
    assert float(q.scale.grad) == pytest.approx(float(expected), rel=1e-3)


def test_the_table_is_the_function_at_the_samplers_steps(tiny_net):
    net, functions = prepared(tiny_net, dynamic=True)
    done, stored = finish(net, reversed(TIMES))
    assert done.timeline.num_segments == len(TIMES)
    for name, q in input_quantizers(done).items():
        assert torch.equal(q.scale, functions[name.replace(".", "|")].at(torch.tensor(TIMES)))
        assert q.soft_scale is None and not q.scale.requires_grad
    assert stored.keys() == {
        f"{n.replace('|', '.')}|{key}"
        for n, soft in functions.items()
        for key, _ in soft.named_parameters()
    }


def test_the_static_baseline_has_one_scale(tiny_net):
    net, functions = prepared(tiny_net, dynamic=False)
    done, stored = finish(net, TIMES)
    assert not functions and not stored and done.timeline.num_segments == 1
    assert all(len(q.scale) == 1 for q in input_quantizers(done).values())


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_file_answers_as_the_network_did_in_training(tiny_net, tmp_path, dynamic):
    net, _ = prepared(tiny_net, dynamic)
    x, t = batch()
    with torch.no_grad():
        expected = net(x, t)
    recipe = {"name": "tiny", "network": TINY, "rules": RULES, "weights_hash": ""}
    save_quantized(tmp_path / "q.safetensors", finish(net, TIMES)[0], recipe)
    loaded = load_quantized(tmp_path / "q.safetensors", build_network)
    assert deviation(loaded(x, t), expected) < 1e-4


def test_functions_of_time_need_quantized_activations(tiny_net):
    with pytest.raises(ValueError, match="set bits.input below 16"):
        prepare(convert(tiny_net, rules(4, 32)), samples(4), dynamic=True)


# ---- the script

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
    monkeypatch.setattr(DiffusionTraining, "draw_samples", lambda self, path: None)


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
    (numbers,) = row_of(tmp_path / "other").numbers
    assert len(json.loads((tmp_path / "other/metrics.json").read_text())["sqnr_db_per_step"]) == 10
    # steps change no width
    assert numbers["GBOPs"] == row_of(out).numbers[0]["GBOPs"]
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
    assert train.plain(flags) == keys


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
