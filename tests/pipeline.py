"""What the tests of whole runs share: tiny models, the words that keep them short, stages in turn,
a process to kill."""

import signal
import subprocess
import sys
import time

from base.files import PROJECT
from tinydm.report import command as report
from tinydm.stages import calibrate, evaluate, quantize, sample

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


def start(script, *arguments):
    return subprocess.Popen(
        [sys.executable, str(PROJECT / "scripts" / f"{script}.py"), *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill_when(process, condition):
    """SIGKILL as soon as condition() holds; fails if the process ends before."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, (
            "the stage ended before it could be killed"
        )
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


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
