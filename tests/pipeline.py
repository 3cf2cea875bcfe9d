"""What the tests of whole runs share: tiny models and finished runs of them as fixtures, the words
that keep runs short, stages in turn, a process to kill."""

import multiprocessing
import time

import pytest
import torch
import yaml
from conftest import randomize
from safetensors.torch import save_file

from base.files import PROJECT
from models.checkpoint_files import PREFIXES
from models.zoo import build_network
from tinydm import cli
from tinydm.stages import calibrate, quantize, sample

NETWORK = {
    "family": "ddim-unet",
    "image_size": 16,
    "ch": 8,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [8],
    "norm_groups": 4,
}
WORDS = [
    "sampling.steps=4",
    "sampling.num=6",
    "sampling.batch_size=4",
    "calibration.steps=4",
    "calibration.images=6",
    "effort.weight_iters=4",
    "effort.input_iters=2",
    "effort.num_values=512",
    "effort.dtype=fp32",
    "evaluation.sqnr_images=2",
    "device=cpu",
]


def files(model, bits="w4a8", method="qdiffusion"):
    return [
        str(model),
        *(
            str(PROJECT / "configs" / p)
            for p in (f"bits/{bits}.yaml", f"method/{method}.yaml", "preset/demo.yaml")
        ),
    ]


def everything(model, out, *words, **choice):
    # they take seconds to import, which the process that hands out tests need not wait for
    from tinydm.report import command as report
    from tinydm.stages import evaluate

    calibrate.run([*files(model, **choice), *WORDS, f"out={out}", *words])
    quantize.run([str(out)])
    sample.run([str(out)])
    sample.run([str(out), "precision=float"])
    evaluate.run([str(out)])
    report.run([str(out)])


def artefacts(out):
    """Bytes of everything that must not depend on how often a run was interrupted."""
    names = [
        "calibration.safetensors",
        "quantized.safetensors",
        *(f"samples/{i:06d}.png" for i in range(6)),
    ]
    return {name: (out / name).read_bytes() for name in names}


def start(command, *arguments):
    """A command of tinydm in a process of its own, forked from one that has imported what most of
    them need and has done nothing else."""
    fresh = multiprocessing.get_context("forkserver")
    fresh.set_forkserver_preload(["tinydm.stages.calibrate", "tinydm.stages.evaluate"])
    process = fresh.Process(target=cli.main, args=([command, *map(str, arguments)],))
    process.start()
    return process


def kill_when(process, condition):
    """SIGKILL as soon as condition() holds; fails if the process ends before."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.is_alive() and time.monotonic() < deadline, (
            "the stage ended before it could be killed"
        )
        time.sleep(0.002)
    process.kill()
    process.join()


DDCONFIG = {
    "z_channels": 3,
    "resolution": 16,
    "ch": 8,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "norm_groups": 4,
}
UNET = {
    "family": "ldm-unet",
    "image_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 1],
}
TRANSFORMER = {"num_heads": 2, "use_spatial_transformer": True, "context_dim": 5}
LATENT = {"kind": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195, "space": "latent"}
MODELS = {
    "class": {
        "network": UNET | TRANSFORMER,
        "schedule": LATENT,
        "first_stage": {
            "family": "autoencoder-vq",
            "embed_dim": 3,
            "n_embed": 20,
            "ddconfig": DDCONFIG | {"double_z": False},
        },
        "cond_stage": {"family": "class-embedder", "n_classes": 4, "embed_dim": 5},
        "guidance": {"scale": 2.5, "null_class": 3},
        "sampling": {"skip": "uniform"},
    },
    "unconditional": {
        "network": UNET
        | {"num_head_channels": 16, "resblock_updown": True, "use_scale_shift_norm": True},
        "first_stage": {
            "family": "autoencoder-kl",
            "embed_dim": 3,
            "ddconfig": DDCONFIG | {"double_z": True},
        },
        "schedule": LATENT,
        "sampling": {"sampler": "plms", "skip": "uniform"},
    },
    "learned": {
        "network": UNET
        | {
            "family": "guided-unet",
            "image_size": 16,
            "num_head_channels": 16,
            "out_channels": 6,
            "num_classes": 3,
            "use_new_attention_order": True,
        },
        "schedule": {
            "kind": "cosine",
            "timesteps": 400,
            "space": "pixel64",
            "rescale_timesteps": True,
        },
        "sampling": {"sampler": "ddpm", "skip": "respaced", "eta": 1.0},
    },
}


def write_model(folder, name, content, state):
    """Writes a model YAML and its weights beside it; returns the path of the YAML."""
    save_file(state, folder / f"{name}.safetensors")
    content = content | {"name": name, "checkpoint": str(folder / f"{name}.safetensors")}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder / f"{name}.yaml"


def write_latent_model(folder, kind):
    """One of MODELS with random weights in the layout of public checkpoints."""
    content = MODELS[kind]
    torch.manual_seed(0)
    parts = {"unet": randomize(build_network(**content["network"]))}
    for part in ("first_stage", "cond_stage"):
        if part in content:
            parts[part] = build_network(**content[part])
    is_prefixed = len(parts) > 1
    state = {
        (PREFIXES[part] if is_prefixed else "") + name: value
        for part, net in parts.items()
        for name, value in net.state_dict().items()
    }
    if is_prefixed:
        state["scale_factor"] = torch.tensor(0.7)
    return write_model(folder, kind, content | {"weights": "raw"}, state)


@pytest.fixture(scope="session")
def pixel_model(tmp_path_factory):
    """The YAML of a model of pixels with random weights beside it."""
    torch.manual_seed(0)
    content = {
        "network": NETWORK,
        "schedule": {"kind": "linear", "timesteps": 1000},
        "sampling": {"skip": "uniform"},
    }
    state = build_network(**NETWORK).state_dict()
    return write_model(tmp_path_factory.mktemp("model"), "tiny", content, state)


@pytest.fixture(scope="session")
def pixel_run(pixel_model, tmp_path_factory):
    """A run folder in which every stage is done; nobody may change it."""
    out = tmp_path_factory.mktemp("runs") / "reference"
    everything(pixel_model, out)
    return out


@pytest.fixture(scope="session", params=MODELS)
def latent_model(request, tmp_path_factory):
    """The YAML of each of MODELS with random weights beside it."""
    return write_latent_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def latent_run(latent_model, tmp_path_factory):
    """A run folder in which every stage is done; nobody may change it."""
    out = tmp_path_factory.mktemp("runs") / "run"
    everything(latent_model, out)
    return out
