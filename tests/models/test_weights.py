"""Networks load from checkpoints of one or several; weights that do not fit end in a sentence and
change nothing."""

import pytest
import torch
from conftest import TINY, assert_close, below, randomize, read_fixture
from safetensors.torch import save_file

from models.checkpoint_files import load_state
from models.weights import load_components, load_weights, state_hash, take_averaged
from models.zoo import build_network


def test_half_precision_file_is_cast_to_the_network(tiny_net, tmp_path):
    save_file(
        {name: value.half() for name, value in tiny_net.state_dict().items()},
        tmp_path / "half.safetensors",
    )
    net = load_weights(build_network(**TINY), load_state(tmp_path / "half.safetensors"), "half")
    for name, value in tiny_net.state_dict().items():
        assert net.state_dict()[name].dtype == torch.float32
        assert torch.equal(net.state_dict()[name], value.half().float())


FAULTS = {
    "misses 2 (conv_in.bias, norm_out.bias)": lambda s: [
        s.pop("conv_in.bias"),
        s.pop("norm_out.bias"),
    ],
    "has surplus 4 (a, b, c, ...)": lambda s: s.update({name: torch.zeros(1) for name in "abcd"}),
    "has misshapen 1 (conv_in.bias (9,) instead of (8,))": lambda s: s.update(
        {"conv_in.bias": torch.zeros(9)}
    ),
    "NaN or infinite weights in 1 (conv_in.bias)": lambda s: s.update(
        {"conv_in.bias": torch.full((8,), torch.nan)}
    ),
    "NaN or infinite weights in 1 (norm_out.bias)": lambda s: s.update(
        {"norm_out.bias": torch.full((8,), -torch.inf)}
    ),
}


@pytest.mark.parametrize("sentence", FAULTS)
def test_weights_that_do_not_fit_are_named_and_refused(tiny_net, sentence):
    state = dict(tiny_net.state_dict())
    FAULTS[sentence](state)
    net = build_network(**TINY)
    before = state_hash(net)
    with pytest.raises(ValueError) as error:
        load_weights(net, state, "checkpoint x")
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert state_hash(net) == before


class Part(torch.nn.Module):
    """Stands for a network: its names, and a value that tells which weights it was given."""

    def __init__(self, *names):
        super().__init__()
        for name in names:
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(2)))


def latent_state(**more):
    """A latent-diffusion checkpoint of one weight each: raw 1, averaged 2, first stage 3, condition
    4."""
    named = {
        "model.diffusion_model.w": 1,
        "model_ema.diffusion_modelw": 2,
        "first_stage_model.f": 3,
        "cond_stage_model.c": 4,
    }
    return {
        **{name: torch.full((2,), float(value)) for name, value in named.items()},
        "betas": torch.ones(9),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(5),
        **more,
    }


def parts():
    return {"unet": Part("w"), "first_stage": Part("f"), "cond_stage": Part("c")}


def written(folder, state, name="model.ckpt"):
    torch.save({"state_dict": state}, folder / name)
    return folder / name


@pytest.mark.parametrize("weights, value", [("ema", 2), ("raw", 1)])
def test_components_of_a_latent_checkpoint(tmp_path, caplog, weights, value):
    networks = parts()
    caplog.set_level("INFO", "tinydm")
    assert load_components(written(tmp_path, latent_state()), networks, weights=weights) is None
    assert [net.state_dict()[name][0].item() for net, name in zip(networks.values(), "wfc")] == [
        value,
        3,
        4,
    ]
    assert ("raw weights are used; weights=ema takes" in caplog.text) == (weights == "raw")


def test_the_scale_factor_is_read_from_the_file(tmp_path):
    path = written(tmp_path, latent_state(scale_factor=torch.tensor(0.25)))
    assert load_components(path, parts()) == 0.25


def test_files_of_one_network_alone(tmp_path):
    fs, net = Part("f"), Part("w")
    load_components(
        written(tmp_path, {"f": torch.ones(2), "loss.logvar": torch.ones(3)}), {"first_stage": fs}
    )
    load_components(written(tmp_path, {"w": torch.full((2,), 7.0)}), {"unet": net}, weights="ema")
    assert fs.f[0] == 1 and net.w[0] == 7


def test_averaged_weights_are_all_there_or_none_is_used():
    state = latent_state()
    assert take_averaged(state, ["w"], source="x")["w"][0] == 2
    with pytest.raises(
        ValueError, match=r"x lacks 1 \(model_ema.diffusion_modelab\) of the averaged weights"
    ):
        take_averaged(state, ["w", "a.b"], source="x")


MISSING = {
    "has no averaged weights (model_ema.*), and the model YAML asks for them with weights: ema; "
    "go on with the others "
    "by weights=raw": lambda s: s.pop("model_ema.diffusion_modelw"),
    "has no first_stage (first_stage_model.*); the file seems to be a latent-diffusion": lambda s: (
        s.pop("first_stage_model.f")
    ),
    "the cond_stage of checkpoint": lambda s: s.update({"cond_stage_model.more": torch.ones(1)}),
}


@pytest.mark.parametrize("sentence", MISSING)
def test_a_component_that_is_absent_or_does_not_fit(tmp_path, sentence):
    state = latent_state()
    MISSING[sentence](state)
    with pytest.raises(ValueError) as error:
        load_components(written(tmp_path, state), parts())
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_unknown_set_of_weights():
    with pytest.raises(ValueError, match="weights 'emma' is unknown; did you mean 'ema'"):
        load_components("unused", {}, weights="emma")


def test_positions_may_be_listed_or_not():
    named, net = {"a": torch.ones(2)}, Part("a")
    load_weights(net, {**named, "text_model.embeddings.position_ids": torch.arange(3)}, "x")
    net.register_buffer("position_ids", torch.arange(5))
    load_weights(net, named, "x")
    assert net.position_ids.tolist() == [0, 1, 2, 3, 4]


def test_a_file_of_another_kind_is_named(tiny_net):
    with pytest.raises(
        ValueError, match="seems to be a latent-diffusion .* and the network a pixel-space DDIM"
    ):
        load_weights(build_network(**TINY), latent_state(), "checkpoint x")
    with pytest.raises(ValueError, match="both seem to be a pixel-space DDIM U-Net"):
        load_weights(build_network(**{**TINY, "ch": 16}), tiny_net.state_dict(), "checkpoint x")


def test_a_whole_latent_checkpoint_in_miniature(tmp_path):
    meta, weights, tensors = read_fixture("ldm_checkpoint")
    state = {**below("state_dict/", weights), **below("state_dict/", tensors)}
    config = meta["config"]["model"]["params"]
    first = config["first_stage_config"]["params"]
    networks = {
        "unet": build_network(family="ldm-unet", **config["unet_config"]["params"]),
        "first_stage": build_network(
            family="autoencoder-vq",
            embed_dim=first["embed_dim"],
            n_embed=first["n_embed"],
            ddconfig=first["ddconfig"],
        ),
        "cond_stage": build_network(family="class-embedder", n_classes=6, embed_dim=16),
    }
    path = written(tmp_path, state)
    for name in ("raw", "ema"):
        scale = load_components(path, networks, weights=name)
        with torch.no_grad():
            context = networks["cond_stage"](tensors["in/class"])
            eps = networks["unet"].eval()(tensors["in/x"], tensors["in/t"], context)
        assert_close(eps, tensors[f"out/eps_{name}"], meta["tolerance"])
    assert scale == state["scale_factor"].item()
    with torch.no_grad():
        image = networks["first_stage"].eval().decode(tensors["in/z"] / scale)
    assert_close(image, tensors["out/image"], meta["tolerance"])


def test_hashes(tiny_net):
    assert state_hash(tiny_net) == state_hash(randomize(build_network(**TINY)))
    first = state_hash(tiny_net)
    tiny_net.conv_in.bias.data[3] += 1e-7
    assert state_hash(tiny_net) != first
