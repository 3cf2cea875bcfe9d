"""Does this tree make the same bytes as another revision?  python tests/same_bytes.py REVISION

Runs minmax, qdiffusion and tinydm (W4A8) in this tree and in a checkout of REVISION, by their own
commands, on two tiny models with random weights, and compares calibration sets, quantized networks,
full-precision and quantized images byte by byte. Metadata of safetensors files may have grown: what
both have, in today's words, must be equal, and so must every tensor. Ends with status
1 if anything differs."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))
from tinydm.earlier import renewed  # noqa: E402

METHODS = ("minmax", "qdiffusion", "tinydm")
NETWORKS = {
    "pixel": {
        "family": "ddim-unet",
        "image_size": 16,
        "ch": 8,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [8],
        "norm_groups": 4,
    },
    "classes": {
        "family": "ldm-unet",
        "image_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 32,
        "num_res_blocks": 1,
        "attention_resolutions": [1],
        "channel_mult": [1, 2],
        "num_head_channels": 16,
        "num_classes": 4,
        "use_scale_shift_norm": True,
    },
}
WORDS = [
    "sampling.steps=4",
    "sampling.num=6",
    "sampling.batch_size=4",
    "sampling.skip=uniform",
    "calibration.steps=4",
    "calibration.images=6",
    "effort.weight_iters=4",
    "effort.input_iters=2",
    "effort.weight_lr=0.1",
    "effort.batch_size=16",
    "device=cpu",
    "threads=1",
]
WEIGHTS = """import sys, torch, yaml
from safetensors.torch import save_file
from models.zoo import build_network
torch.manual_seed(0)
net = build_network(**yaml.safe_load(open(sys.argv[1]))["network"])
state = {}
for name, p in net.state_dict().items():
    noise = torch.randn_like(p)
    state[name] = noise / max(p[0].numel(), 1) ** 0.5 if p.dim() > 1 else p + noise / 10
save_file(state, sys.argv[2])
"""


def run(tree, *words):
    ended = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=tree,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
    )
    if ended.returncode:
        sys.exit(
            f"{' '.join(map(str, words))} in {tree}:\n{ended.stdout[-1000:]}{ended.stderr[-3000:]}"
        )


def make(tree, models, out):
    """All artefacts of every model and method: {name: bytes, or header and bytes of the
    tensors}."""
    found = {}
    for model in models:
        for method in METHODS:
            folder = out / model.stem / method
            files = [
                "configs/bits/w4a8.yaml",
                f"configs/method/{method}.yaml",
                "configs/preset/paper.yaml",
            ]
            run(tree, "scripts/calibrate.py", model, *files, *WORDS, f"out={folder}")
            run(tree, "scripts/quantize.py", folder)
            run(tree, "scripts/sample.py", folder)
            run(tree, "scripts/sample.py", folder, "precision=float")
        for path in sorted((out / model.stem).rglob("*")):
            if path.suffix in (".safetensors", ".png"):
                found[
                    f"{model.stem}/{path.relative_to(out / model.stem)}".replace(str(out), "")
                ] = content(path)
    return found


def content(path):
    data = path.read_bytes()
    if path.suffix == ".png":
        return None, None, data
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:size])
    meta = json.loads(header.pop("__metadata__", {}).get("tinydm", "{}"))
    if "recipe" in meta:
        meta["recipe"] = renewed(meta["recipe"])
    return meta, header, data[size:]


def grown(before, after):
    """Whether `after` says all that `before` does."""
    if not isinstance(before, dict):
        return before == after
    return isinstance(after, dict) and all(
        key in after and grown(value, after[key]) for key, value in before.items()
    )


def main(revision):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        models = []
        for name, network in NETWORKS.items():
            facts = {
                "name": name,
                "network": network,
                "checkpoint": str(folder / f"{name}.safetensors"),
                "schedule": {},
            }
            models.append(folder / f"{name}.yaml")
            models[-1].write_text(json.dumps(facts))
            run(PROJECT, "-c", WEIGHTS, models[-1], facts["checkpoint"])
        tree = folder / "before"
        subprocess.run(
            ["git", "worktree", "add", "--quiet", "--detach", tree, revision],
            cwd=PROJECT,
            check=True,
        )
        try:
            before, after = make(tree, models, folder / "a"), make(PROJECT, models, folder / "b")
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=PROJECT, check=True)
        wrong = sorted(before.keys() ^ after.keys())
        for name in sorted(before.keys() & after.keys()):
            (meta, header, data), (new_meta, new_header, new_data) = before[name], after[name]
            same = (
                header == new_header
                and data == new_data
                and (meta == new_meta or grown(meta, new_meta))
            )
            wrong += [] if same else [name]
            grew = "" if meta == new_meta else ", metadata grown"
            print(f"{f'equal{grew}' if same else 'DIFFERS':22} {name}")
        print(f"{len(before)} files of {revision}: {len(wrong)} differ {wrong or ''}")
        return 1 if wrong or not before else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
