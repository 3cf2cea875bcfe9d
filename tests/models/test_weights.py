"""Checkpoints in every container load; a wrong, damaged or malicious one ends in a sentence and
changes nothing."""

import pickle

import pytest
import torch
from conftest import TINY, assert_close, below, randomize, read_fixture
from safetensors.torch import save_file

from models.weights import (
    averaged,
    component,
    load_components,
    load_state,
    load_weights,
    seems,
    state_hash,
)
from models.zoo import build_network


def other(state):
    """What a data-parallel training run leaves beside its averaged weights."""
    return {f"module.{name}": value + 1 for name, value in state.items()}


CONTAINERS = {
    "flat": lambda state: state,
    "state_dict": lambda state: {
        "state_dict": state,
        "epoch": 3,
        "pytorch-lightning_version": "2.0",
    },
    "training list": lambda state: [other(state), {"state": {}}, 12, 3400, state],
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("legacy", [False, True])
def test_containers(tiny_net, tmp_path, container, legacy):
    state = dict(tiny_net.state_dict())
    torch.save(
        CONTAINERS[container](state),
        tmp_path / "model.ckpt",
        _use_new_zipfile_serialization=not legacy,
    )
    loaded = load_state(tmp_path / "model.ckpt")
    assert list(loaded) == list(state) and all(
        torch.equal(loaded[name], state[name]) for name in state
    )


def test_the_weights_of_a_training_run_that_are_not_averaged(tiny_net, tmp_path):
    state = dict(tiny_net.state_dict())
    torch.save(CONTAINERS["training list"](state), tmp_path / "ckpt.pth")
    loaded = load_state(tmp_path / "ckpt.pth", ema=False)
    assert list(loaded) == list(state)  # the prefix "module." is gone
    assert torch.equal(loaded["conv_in.bias"], state["conv_in.bias"] + 1)


def test_half_precision_file_is_cast_to_the_network(tiny_net, tmp_path):
    save_file(
        {name: value.half() for name, value in tiny_net.state_dict().items()},
        tmp_path / "half.safetensors",
    )
    net = load_weights(build_network(**TINY), load_state(tmp_path / "half.safetensors"), "half")
    for name, value in tiny_net.state_dict().items():
        assert net.state_dict()[name].dtype == torch.float32
        assert torch.equal(net.state_dict()[name], value.half().float())


class Payload:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


WRITERS = {
    "zip": torch.save,
    "plain": lambda x, path: path.write_bytes(pickle.dumps(x, protocol=2)),
    "legacy": lambda x, path: torch.save(x, path, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth"])
def test_code_in_a_checkpoint_never_runs(tmp_path, suffix, writer):
    trace, path = tmp_path / "trace", tmp_path / f"evil{suffix}"
    WRITERS[writer]({"state_dict": {"weight": torch.zeros(2)}, "extra": Payload(trace)}, path)
    expected = "damaged or incomplete" if writer == "plain" else "names .*, which runs code"
    with pytest.raises(ValueError, match=expected) as error:
        load_state(path)
    assert not trace.exists() and "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("kept", [0, 7, 0.3, 0.97])
def test_damaged_file(tiny_net, tmp_path, suffix, kept):
    path = tmp_path / f"model{suffix}"
    save_file(tiny_net.state_dict(), path) if suffix == ".safetensors" else torch.save(
        tiny_net.state_dict(), path
    )
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(ValueError, match="damaged or incomplete") as error:
        load_state(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [b"<!doctype html><html>not found</html>", b"\x80\x02K\x01.", bytes(range(256))]
)
def test_something_else_under_the_name_of_a_checkpoint(tmp_path, content):
    (tmp_path / "model.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match="damaged or incomplete|no state dict"):
        load_state(tmp_path / "model.ckpt")


@pytest.mark.parametrize("content", [{}, [], {"epoch": 3}, [1, 2], torch.zeros(2)])
def test_a_pickle_without_weights(tmp_path, content):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="is no state dict"):
        load_state(tmp_path / "model.pt")


def test_absent_file_and_unknown_suffix(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_state(tmp_path / "model.ckpt")
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="ends in '.bin'; expected one of .ckpt"):
        load_state(tmp_path / "model.bin")


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


# ---- components


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
def test_components_of_a_latent_checkpoint(tmp_path, capsys, weights, value):
    networks = parts()
    assert load_components(written(tmp_path, latent_state()), networks, weights=weights) is None
    assert [net.state_dict()[name][0].item() for net, name in zip(networks.values(), "wfc")] == [
        value,
        3,
        4,
    ]
    assert ("raw weights are used; weights=ema takes" in capsys.readouterr().out) == (
        weights == "raw"
    )


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


def test_a_training_list_gives_the_averaged_or_the_raw_set(tiny_net, tmp_path):
    state = dict(tiny_net.state_dict())
    torch.save(CONTAINERS["training list"](state), tmp_path / "ckpt.pth")
    for weights, offset in (("ema", 0), ("raw", 1)):
        net = build_network(**TINY)
        load_components(tmp_path / "ckpt.pth", {"unet": net}, weights=weights)
        assert torch.equal(net.conv_in.bias, state["conv_in.bias"] + offset)


def test_averaged_weights_are_all_there_or_none_is_used():
    state = latent_state()
    assert averaged(state, ["w"], source="x")["w"][0] == 2
    with pytest.raises(
        ValueError, match=r"x lacks 1 \(model_ema.diffusion_modelab\) of the averaged weights"
    ):
        averaged(state, ["w", "a.b"], source="x")


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


def test_component_strips_its_prefix():
    assert component({"a.x": 1, "b.x": 2, "xa.x": 3}, "a.") == {"x": 1}


@pytest.mark.parametrize(
    "name, kind",
    {
        "temb.dense.0.weight": "a pixel-space DDIM U-Net",
        "input_blocks.0.0.weight": "a U-Net of latent, improved or",
        "encoder.conv_in.weight": "a first stage",
        "model.diffusion_model.out.0.bias": "a latent-diffusion checkpoint",
        "cond_stage_model.transformer.text_model.x": "a Stable Diffusion",
        "down_blocks.0.resnets.0.norm1.bias": "a network of the diffusers library",
        "conv_in.weight_codes": "a quantized model of this project",
        "stem.0.weight": "an image classifier",
        "fc.weight": "an image classifier",
        "x.y": "of no known kind",
    }.items(),
)
def test_what_a_file_seems_to_be(name, kind):
    assert kind in seems({"conv_in.bias": 0, name: 0})


def test_a_classifier_beside_a_guided_network():
    assert "a classifier of guided" in seems(
        {"input_blocks.0.0.weight": 0, "out.2.qkv_proj.weight": 0}
    )


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
