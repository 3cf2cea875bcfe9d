"""Draw images with the model of a run folder:

    python scripts/sample.py RUN [precision=float] [sampling.num=1024] [shard=0/2] [force=true]

Quantized images go to RUN/samples/000000.png ... and RUN/samples.npz (uint8 NHWC, arr_0);
full-precision images of the same seeds to a folder float-* beside RUN, shared by all runs of the
same model, weights and sampler. Images that are there already are kept. `shard=i/n` does every n-th
batch, for n processes side by side; the image bytes do not depend on it."""

import hashlib
import json
import os
import shutil

import numpy as np
from PIL import Image
from tqdm import tqdm

from base.config import one_folder
from base.files import write_atomically
from models.sampling import sample
from models.zoo import build_network
from quant.checkpoint import load_quantized
from tinydm.run_folder import facts_of_images, open_run


def run(arguments):
    folder, words = one_folder(arguments)
    own = {"precision": "simulated", "shard": "0/1"}
    for word in list(words):
        key, _, value = word.partition("=")
        if key in own:
            own[key] = value
            words.remove(word)
    draw(open_run(folder, words), **own)


def draw(run, precision="simulated", shard="0/1"):
    if precision not in ("simulated", "float"):
        raise ValueError(f"precision '{precision}' is unknown; choose simulated or float")
    part, parts = read_shard(shard)
    s, folder = run.config.sampling, sample_folder(run, precision)
    paths = [folder / f"{i:06d}.png" for i in range(s.num)]
    archive = folder.with_name(folder.name + ".npz")
    if run.config.force and parts > 1:
        raise ValueError(
            "force=true would take images from the other shards; remove the folder "
            f"{folder} and draw without it"
        )
    if run.config.force:
        shutil.rmtree(folder, ignore_errors=True)
    starts = [
        k
        for k in range(0, s.num, s.batch_size)
        if k // s.batch_size % parts == part
        and not all(p.exists() for p in paths[k : k + s.batch_size])
    ]
    if starts:
        model = model_of(run, precision)
        folder.mkdir(parents=True, exist_ok=True)
        bar = tqdm(
            total=len(starts) * run.num_evaluations,
            unit="step",
            desc=f"sample: {precision}, batches of {s.batch_size}",
        )
        with bar, run.stage(f"sample {precision}" + (f" shard {shard}" if parts > 1 else "")):
            for start in starts:
                indices = range(start, min(start + s.batch_size, s.num))
                images = sample(
                    model,
                    model.eps,
                    indices,
                    sampler=s.sampler,
                    steps=s.steps,
                    skip=s.skip,
                    eta=s.eta,
                    seed=s.seed,
                    batch_size=s.batch_size,
                    callback=lambda *_: bar.update(),
                )
                for i, image in zip(indices, images.cpu()):
                    save_png(paths[i], image)
    else:
        print(f"sample: done already, {s.num} images in {folder}")
    if all(p.exists() for p in paths) and (starts or images_in(archive) != s.num):
        save_archive(archive, paths)
        print(f"sample: {s.num} images in {folder} and {archive}")


def model_of(run, precision):
    """The model to sample with: as it is, or around the quantized network."""
    if precision == "float":
        return run.model
    net = load_quantized(
        run.need("quantized.safetensors", "quantize"),
        build_network,
        expected=run.model.weights_hash,
    ).to(run.model.device)
    return run.model.with_net(net)


def sample_folder(run, precision):
    """RUN/samples, or the shared folder of the full-precision images, named by what decides their
    bytes."""
    if precision == "simulated":
        return run.path("samples")
    facts = facts_of_images(run) | {"seed": run.config.sampling.seed}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    return run.folder.parent / f"float-{key}"


def read_shard(text):
    try:
        part, parts = map(int, text.split("/"))
        if 0 <= part < parts:
            return part, parts
    except ValueError:
        pass
    raise ValueError(f"shard '{text}' is not i/n with 0 <= i < n, for example shard=0/2")


def save_png(path, image):
    """image (3, H, W) uint8; written whole or not at all."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    write_atomically(path, lambda part: picture.save(part, format="PNG"))


def images_in(path):
    """How many an archive holds; 0 where there is none."""
    if not path.exists():
        return 0
    with np.load(path) as archive:
        return len(archive["arr_0"])


def save_archive(path, paths):
    """samples.npz as guided-diffusion's evaluator reads it: arr_0 (N, H, W, 3) uint8."""
    images = np.stack([np.array(Image.open(p)) for p in paths])

    def write(part):
        with open(part, "wb") as file:
            np.savez(file, arr_0=images)
            file.flush()
            os.fsync(file.fileno())

    write_atomically(path, write)
