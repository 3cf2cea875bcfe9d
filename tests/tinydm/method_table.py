"""What every method's file has to say, written from the papers and their released code."""

from base.network import ROLES

# Weights of 3 bits, inputs of 5, softmax outputs of 6 and counts that no method names: all other
# numbers are its own.
WEIGHTS = {"weight_iters": 71, "weight_lr": 0.73, "batch_size": 75, "dtype": "bf16"}
STAGED = WEIGHTS | {"input_iters": 72, "input_lr": 0.74}
WORDS = [
    "out=none",
    "bits.weight=3",
    "bits.input=5",
    "bits.softmax=6",
    "calibration.images=76",
    *(f"effort.{key}={value}" for key, value in STAGED.items()),
]

# By role: bits of the weight and of the input; of attention products those of their operands. temb
# is two layers.
WIDTHS = {role: (3, 5) for role in ROLES if role not in ("temb", "probs")} | {
    "temb 1": (3, 5),
    "temb 2": (3, 5),
    "scale_shift": (32, 32),
    "product": 5,
    "probs": 6,
}
FLOAT, STEM_AND_OUT = (32, 32), {"stem": (8, 8), "out": (8, 8)}

DEFAULT = {
    "weight": "channel mse",
    "input": "tensor mse",
    "probs": "tensor minmax",
    "widths": {},
    "segments": 1,
    "balance": False,
    "builder": "uniform",
    "options": {},
    "start": "normal",
}
RELEASED = {
    "weight": "channel minmax",
    "input": "tensor minmax signed",
    "probs": "tensor minmax signed",
    "widths": {"probs": 5},
}
QDIFFUSION = {"fit_ranges": {}, "reconstruct": STAGED}
SEGMENTS = {"segment_models": {"passes": [{name: options} for name, options in QDIFFUSION.items()]}}
BY_256 = {"fit_ranges": {"num_samples": 1024, "batch_size": 256}}
PTQ4DM = {
    "weight": "channel mse signed",
    "input": "tensor mse signed ema 0.9",
    "probs": "tensor mse ema 0.9",
    "passes": BY_256,
}
UNIFORM = PTQ4DM | {"builder": "linspace", "widths": {"scale_shift": (32, 5)}}
EDADM = {
    "input": "tensor mse ema 0.9",
    "probs": "tensor minmax ema 0.9",
    "widths": STEM_AND_OUT,
    "builder": "tdac",
    "passes": BY_256
    | {
        "reconstruct": WEIGHTS
        | {
            "joint": True,
            "drop": 0.5,
            "layer_weight": 0.8,
            "round_weight": 0.0,
            "weight_lr": 0.5,
            "weight_cosine": True,
            "input_lr": 0.0005,
        }
    },
}
EVERY_STEP = {"segments": "per_step", "builder": "linspace"}
TFMQ = EVERY_STEP | {
    "input": "tensor minmax ema 0.95",
    "widths": {"stem": FLOAT, "out": FLOAT, "skip": FLOAT},
    "passes": {
        "fit_ranges": {"num_samples": None, "batch_size": 16},
        "reconstruct_temporal": {"iters": 71, "lr": 0.73, "batch_size": 75},
        "reconstruct": WEIGHTS | {"input_iters": 0},
    },
}
TINYDM = EVERY_STEP | {
    "input": "tensor mse2d",
    "balance": True,
    "widths": STEM_AND_OUT | dict.fromkeys(("skip", "temb 1", "temb 2", "emb_proj"), (3, 8)),
    "passes": {
        "softmax_grid": {},
        "balance": {},
        "fit_ranges": {"num_samples": 1024, "neighbours": 2},
        "reconstruct": WEIGHTS
        | {
            "joint": True,
            "drop": 0.5,
            "saliency": 0.5,
            "frequency": 0.5,
            "gptq": True,
            "input_lr": 0.00004,
        },
        "bypass_input": {},
        "finetune": {"iters": 71, "batch_size": 75, "dtype": "bf16"},
        "correct_noise": {"num_images": 76, "slope": "signed", "per": "line", "variance": False},
    },
}

TABLE = {
    "minmax": {"weight": "channel minmax", "input": "tensor minmax", "passes": {"fit_ranges": {}}},
    "qdiffusion": {"passes": QDIFFUSION},
    "qdiffusion_as_released": RELEASED | {"passes": QDIFFUSION},
    "mixed": {"passes": {"allocate_bits": {"budget": "bops"}} | QDIFFUSION},
    "multimodel": {"weight": "channel mse each", "segments": 3, "passes": SEGMENTS},
    "multimodel_as_released": RELEASED
    | {
        "weight": "channel minmax each",
        "segments": 3,
        "builder": "segments",
        "options": {"stride": 2},
        "passes": SEGMENTS,
    },
    "qdrop": {
        "input": "tensor mse2d",
        "widths": STEM_AND_OUT,
        "passes": {
            "fit_ranges": {},
            "reconstruct": WEIGHTS | {"joint": True, "drop": 0.5, "input_lr": 0.00004},
        },
    },
    "ptq4dm": PTQ4DM | {"builder": "normal", "options": {"mean": 0.4, "std": 0.4}},
    "ptq4dm_as_released": PTQ4DM
    | {
        "builder": "normal",
        "options": {"mean": 0.4, "std": 0.4, "pairing": "legacy"},
        "probs": None,
        "widths": dict.fromkeys(("q", "k", "v", "qkv", "proj"), FLOAT)
        | {"product": 32, "probs": 32, "temb 1": (8, 5), "out": (8, 5)},
    },
    "uniform": UNIFORM,
    "i2n": UNIFORM | {"start": "i2n"},
    "di2n": UNIFORM | {"start": "di2n"},
    "edadm": EDADM,
    "edadm_as_released": EDADM | {"widths": {"temb 1": (8, 5), "out": (8, 32)}},
    "ptqd": {"passes": QDIFFUSION | {"correct_noise": {"num_images": 76}}},
    "ptqd_as_released": {
        "weight": "tensor mse",
        "probs": None,
        "widths": STEM_AND_OUT
        | {"temb 1": (8, 8), "skip": FLOAT, "down": FLOAT, "product": 32, "probs": 32},
        "passes": QDIFFUSION | {"correct_noise": {"num_images": 76, "bias": "total"}},
    },
    "ptqd_mixed": {
        "builder": "linspace",
        "passes": {
            "step_bits": {"choices": [5, 8]},
            **QDIFFUSION,
            "correct_noise": {"num_images": 76},
        },
    },
    "tfmq": TFMQ,
    "tfmq_as_released": TFMQ
    | {
        "widths": TFMQ["widths"] | {"down": FLOAT, "qkv": FLOAT, "temb 1": FLOAT, "temb 2": (3, 32)}
    },
    "apqdm": EVERY_STEP
    | {
        "passes": {
            "fit_ranges": {"num_samples": 1024},
            "group_scales": {"groups": 8, "entropy_weight": 0.8},
            "reconstruct": WEIGHTS | {"input_iters": 72, "soft_lr": 0.01, "active": 1.5},
        }
    },
    "apqdm_as_released": EVERY_STEP
    | {
        "weight": "channel minmax signed",
        "input": "channel minmax",
        "probs": None,
        "widths": {role: FLOAT for role in WIDTHS if role not in ("conv1", "conv2")}
        | {"product": 32, "probs": 32},
        "passes": {
            "fit_ranges": {"num_samples": 1024},
            "group_scales": {"groups": 8, "axis": "channel", "entropy_weight": 1.0},
            "reconstruct": {
                "weight_iters": 0,
                "input_iters": 71,
                "soft_lr": 0.01,
                "visit_cost": 2.0,
                "batch_size": 75,
                "dtype": "bf16",
            },
        },
    },
    "tdq": EVERY_STEP
    | {
        "widths": dict.fromkeys(("stem", "out", "temb 1", "temb 2", "emb_proj"), FLOAT),
        "passes": {
            "fit_ranges": {"num_samples": 1024},
            "dynamic_scales": {},
            "reconstruct": WEIGHTS | {"input_iters": 72},
        },
    },
    "tinydm": TINYDM,
    "tinydm_auto": TINYDM | {"passes": {"decide_by_ranges": {}} | TINYDM["passes"]},
    "tinydm_mixed": TINYDM | {"passes": {"allocate_bits": {"budget": "bops"}} | TINYDM["passes"]},
}
