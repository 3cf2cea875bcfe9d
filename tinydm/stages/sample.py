"""Draw images with the model of a run folder:

    python scripts/sample.py RUN [precision=float] [sampling.num=1024] [shard=0/2] [force=true]

Quantized images go to RUN/samples/000000.png ... and RUN/samples.npz (uint8 NHWC, arr_0). They are
computed on integers where that is exact and faster (precision=auto, which says what it chose), on
integers in any case (integer), or with integers held in floats (simulated): the bytes are the same.
With precision=float, full-precision images of the same seeds go to a folder float-* beside RUN,
shared by all runs of the same model, weights and sampler. Images that are there already are kept.
`shard=i/n` does every n-th batch, for n processes side by side, and workers that torchrun starts
share the batches; the image bytes depend on neither."""

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from base.config import one_folder, take_words
from base.files import write_atomically
from base.workers import agreed, is_first, part_of, wait
from models.diffusion import DiffusionModel
from models.sampling import sample
from tinydm.identity import folder_name, images_of
from tinydm.precision import check_precision, with_precision
from tinydm.run_folder import Run, open_run
from tinydm.stages.quantize import with_quantized

LOG = logging.getLogger("tinydm")


def run(arguments: list[str]) -> None:
    """Runs the stage by a command line."""
    folder, words = one_folder(arguments)
    choice, words = take_words(words, {"precision": "auto", "shard": "0/1"})
    print(draw(open_run(folder, words), **choice))


def draw(run: Run, precision: str = "auto", shard: str = "0/1") -> str:
    """Draws the images that are missing; returns what was done as a sentence. `precision` is float
    or a word of tinydm.precision, `shard` i/n does every n-th batch."""
    check_precision(precision)
    part, parts = read_shard(shard)
    s, folder = run.config.sampling, sample_folder(run, precision)
    paths = [folder / f"{i:06d}.png" for i in range(s.num)]
    archive = folder.with_name(folder.name + ".npz")
    if run.config.force and parts > 1:
        remedy = f"remove the folder {folder} and draw without it"
        raise ValueError(f"force=true would take images from the other shards; {remedy}")
    if run.config.force and is_first():
        shutil.rmtree(folder, ignore_errors=True)
    blocks = [range(k, min(k + s.batch_size, s.num)) for k in range(0, s.num, s.batch_size)]
    todo = [block for block in blocks[part::parts] if not all(paths[i].exists() for i in block)]
    todo = agreed(todo)
    if todo:
        folder.mkdir(parents=True, exist_ok=True)
        kind = "float" if precision == "float" else "quantized"
        with run.stage(f"sample {kind}" + (f" shard {shard}" if parts > 1 else "")):
            model = model_of(run, precision)
            text = f"sample: {kind}, batches of {s.batch_size}"
            own = part_of(todo)
            with tqdm(desc=text, total=len(own) * run.num_evaluations, unit="step") as bar:
                for block in own:
                    images = sample(model, block, s, callback=lambda *_: bar.update())
                    for i, image in zip(block, images.cpu()):
                        save_png(paths[i], image)
            wait()
    count = sum(path.exists() for path in paths)
    if count < s.num:
        return f"sample: {count} of {s.num} images in {folder}; the other shards draw the rest"
    if not todo and count_images(archive) == s.num:
        return f"sample: done already, {s.num} images in {folder}"
    if is_first():
        save_archive(archive, paths)
    return f"sample: {s.num} images in {folder} and {archive}"


def model_of(run: Run, precision: str) -> DiffusionModel:
    """Returns the model to sample with: as it is, or around the quantized network, which computes
    as `precision` says; prints how."""
    if precision == "float":
        return run.model
    quantized = with_quantized(run.model, run.need("quantized.safetensors", "quantize"))
    model, about = with_precision(quantized, precision, run.config.sampling.batch_size)
    LOG.info("sample: %s", about)
    return model


def sample_folder(run: Run, precision: str) -> Path:
    """RUN/samples, or the shared folder of full-precision images, named by what decides them."""
    if precision != "float":
        return run.path("samples")
    content = images_of(run.config, run.model, run.config.sampling.seed)
    return run.folder.parent / folder_name("float", content)


def read_shard(text: str) -> tuple[int, int]:
    """Reads "i/n" as (i, n). Raises ValueError unless 0 <= i < n."""
    try:
        part, parts = map(int, text.split("/"))
        if 0 <= part < parts:
            return part, parts
    except ValueError:
        pass
    raise ValueError(f"shard '{text}' is not i/n with 0 <= i < n, for example shard=0/2")


def save_png(path: Path, image: torch.Tensor) -> None:
    """Writes an image (3, H, W) uint8, whole or not at all."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    write_atomically(path, lambda part: picture.save(part, format="PNG"))


def count_images(path: Path) -> int:
    """Counts the images of an archive; 0 where there is none."""
    if not path.exists():
        return 0
    with np.load(path) as archive:
        return len(archive["arr_0"])


def save_archive(path: Path, paths: Iterable[Path]) -> None:
    """Writes samples.npz as guided-diffusion's evaluator reads it: arr_0 (N, H, W, 3) uint8."""
    images = np.stack([np.array(Image.open(p)) for p in paths])

    def write(part):
        with open(part, "wb") as file:  # given a path, numpy would add a suffix to it
            np.savez(file, arr_0=images)

    write_atomically(path, write)
