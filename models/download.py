"""Fetch public checkpoints:

    bash scripts/download_models.sh NAME ... [--mirror URL] [--to FOLDER] | --all | --list

A download that was cut off goes on where it stopped, and a file is put in its place only when it is
whole: its hash is the published one, or, where none is published, its size is the announced one and
a zip's checksums hold. A file that is already there is left alone. --list shows the names; --all
takes every one; --mirror is the address of a folder with the unpacked files at the paths that
--list shows; --to is models unless given. download_first_stages.sh is the same for the autoencoders
alone, which only the training of new latent models needs."""

import hashlib
import http.client
import shutil
import ssl
import sys
import urllib.error
import urllib.request
import zipfile
import zlib
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
# models of the clone; an installed copy leaves its own folder alone and takes the current one
FOLDER = PROJECT / "models" if (PROJECT / "pyproject.toml").exists() else Path("models")
PIECE = 1 << 20  # bytes read at a time
# connections that may break in one call before it gives up
ATTEMPTS = 5
TIMEOUT_SECONDS = 60
BROKEN = (
    urllib.error.URLError,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
    http.client.HTTPException,
)


@dataclass(frozen=True)
class Checkpoint:
    """A published file: its address, its place below the folder (where the models' own code keeps
    it)."""

    address: str
    path: str
    about: str
    # "md5 1fa3..." or "sha256 fe4e..."; empty where none is published
    hash: str = ""
    member: str = ""  # what to take out of a zip


HEIBOX = "https://heibox.uni-heidelberg.de/f"
LATENT = "https://ommer-lab.com/files/latent-diffusion"
OPENAI = "https://openaipublic.blob.core.windows.net/diffusion"
HUB = "https://huggingface.co/CompVis/stable-diffusion-v-1-4-original/resolve/main"


def ddim(about, code, folder, file, md5):
    return Checkpoint(
        f"{HEIBOX}/{code}/?dl=1",
        f"checkpoints/diffusion_models_converted/ema_diffusion_{folder}_model/model-{file}.ckpt",
        f"{about}, averaged weights",
        f"md5 {md5}",
    )


def zipped(about, archive, folder):
    return Checkpoint(f"{LATENT}/{archive}.zip", f"{folder}/model.ckpt", about, member="model.ckpt")


def openai(about, date, file, sha256=""):
    return Checkpoint(f"{OPENAI}/{date}/{file}", file, about, sha256 and f"sha256 {sha256}")


FIRST_STAGES = {
    name: zipped(f"first stage {name} of latent diffusion", name, f"first_stage_models/{name}")
    for name in (
        "kl-f4",
        "kl-f8",
        "kl-f16",
        "kl-f32",
        "vq-f4",
        "vq-f4-noattn",
        "vq-f8",
        "vq-f8-n256",
        "vq-f16",
    )
}
CHECKPOINTS = {  # the names are those of configs/model
    "cifar10": ddim(
        "DDPM CIFAR-10 32x32, 143 MB",
        "2e4f01e2d9ee49bab1d5",
        "cifar10",
        790000,
        "1fa350b952534ae442b1d5235cce5cd3",
    ),
    "ddim-lsun-bedroom": ddim(
        "DDPM LSUN bedroom 256x256, 455 MB",
        "b95206528f384185889b",
        "lsun_bedroom",
        2388000,
        "1921fa46b66a3665e450e42f36c2720f",
    ),
    "ddim-lsun-church": ddim(
        "DDPM LSUN church 256x256, 455 MB",
        "44ccb50ef3c6436db52e",
        "lsun_church",
        4432000,
        "fdc68a23938c2397caba4a260bc2445f",
    ),
    "bedroom": zipped("LDM-4 LSUN bedroom 256x256, 2.4 GB", "lsun_bedrooms", "ldm/lsun_beds256"),
    "church": zipped("LDM-8 LSUN church 256x256, 2.7 GB", "lsun_churches", "ldm/lsun_churches256"),
    "celeba": zipped("LDM-4 CelebA-HQ 256x256, 2.4 GB", "celeba", "ldm/celeba256"),
    "ffhq": zipped("LDM-4 FFHQ 256x256, 2.4 GB", "ffhq", "ldm/ffhq256"),
    "imagenet": Checkpoint(
        f"{LATENT}/nitro/cin/model.ckpt",
        "ldm/cin256-v2/model.ckpt",
        "LDM-4 ImageNet 256x256 by class, 1.8 GB",
    ),
    "sd-v1-4": Checkpoint(
        f"{HUB}/sd-v1-4.ckpt",
        "ldm/stable-diffusion-v1/model.ckpt",
        "Stable Diffusion 1.4 (its publisher may ask for a login), 4.3 GB",
        "sha256 fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556",
    ),
    "imagenet64": openai(
        "improved diffusion, ImageNet 64x64, 0.5 GB",
        "march-2021",
        "imagenet64_uncond_100M_1500K.pt",
    ),
    "imagenet64-cond": openai(
        "improved diffusion, ImageNet 64x64 by class, 1.1 GB",
        "march-2021",
        "imagenet64_cond_270M_250K.pt",
    ),
    "improved-cifar10": openai(
        "improved diffusion, CIFAR-10 32x32, 0.2 GB", "march-2021", "cifar10_uncond_50M_500K.pt"
    ),
    "improved-lsun-bedroom": openai(
        "improved diffusion, LSUN bedroom 256x256, 0.5 GB",
        "march-2021",
        "lsun_uncond_100M_1200K_bs128.pt",
    ),
    "guided-imagenet64": openai(
        "guided diffusion, ImageNet 64x64 by class, 1.2 GB", "jul-2021", "64x64_diffusion.pt"
    ),
    "guided-imagenet128": openai(
        "guided diffusion, ImageNet 128x128 by class, 1.7 GB", "jul-2021", "128x128_diffusion.pt"
    ),
    "guided-imagenet256": openai(
        "guided diffusion, ImageNet 256x256 by class, 2.2 GB", "jul-2021", "256x256_diffusion.pt"
    ),
    "guided-imagenet256-uncond": openai(
        "guided diffusion, ImageNet 256x256, 2.2 GB",
        "jul-2021",
        "256x256_diffusion_uncond.pt",
        "a37c32fffd316cd494cf3f35b339936debdc1576dad13fe57c42399a5dbc78b1",
    ),
    "guided-imagenet512": openai(
        "guided diffusion, ImageNet 512x512 by class, 2.2 GB", "jul-2021", "512x512_diffusion.pt"
    ),
}


def fault(path, wanted):
    """What is wrong with a downloaded file, "" if nothing is; `wanted` is the hash of its row."""
    algorithm, _, digest = wanted.partition(" ")
    with open(path, "rb") as file:
        if not wanted:
            return "is empty or a web page" if file.read(1) in (b"", b"<") else ""
        found = hashlib.new(algorithm, usedforsecurity=False)
        while piece := file.read(PIECE):
            found.update(piece)
    return (
        ""
        if found.hexdigest() == digest
        else f"has {algorithm.upper()} {found.hexdigest()}, expected {digest}"
    )


def fetch(address, path, *, wanted="", member=""):
    """Download `address` to `path` by way of `path`.part; `wanted` and `member` are those of a
    Checkpoint. Raises ValueError if it cannot."""
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(ATTEMPTS):
        try:
            if _append(address, part):
                break
            reason = "it ended early"
        except urllib.error.HTTPError as error:
            raise ValueError(
                f"{address} answered {error.code} {error.reason}; give another address with "
                "--mirror URL, "
                f"or put the file at {path} yourself"
            ) from None
        except BROKEN as error:
            reason = getattr(error, "reason", error)
    else:
        raise ValueError(
            f"the connection to {address} failed {ATTEMPTS} times ({reason}) and {_size(part)} "
            "bytes are "
            "there so far; run the same command again to go on from there, give another address "
            "with "
            f"--mirror URL, or put the file at {path} yourself"
        )
    whole = _unpack(part, member, address) if member else part
    if wrong := fault(whole, wanted):
        part.unlink()
        whole.unlink(missing_ok=True)
        raise ValueError(
            f"what {address} sent {wrong}, and was deleted; "
            "run the command again or give another address with --mirror URL"
        )
    whole.replace(path)
    part.unlink(missing_ok=True)


def _unpack(part, member, address):
    """Path of `member` of a zip, checked by the zip's checksum; nothing else in it is touched."""
    target = part.with_name(part.name + ".unpacked")
    try:
        with (
            zipfile.ZipFile(part) as archive,
            archive.open(member) as source,
            open(target, "wb") as file,
        ):
            shutil.copyfileobj(source, file, PIECE)
    except (
        zipfile.BadZipFile,
        KeyError,
        EOFError,
        RuntimeError,
        NotImplementedError,
        zlib.error,
    ) as error:
        target.unlink(missing_ok=True)
        part.unlink()
        raise ValueError(
            f"what {address} sent is no intact zip with {member} ({error}), and was deleted; "
            "run the command again or give another address with --mirror URL"
        ) from None
    return target


def _size(path):
    return path.stat().st_size if path.exists() else 0


def _append(address, part):
    """Add to `part` what it lacks; True when the server has sent all it announced."""
    start = _size(part)
    request = urllib.request.Request(address, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not start:
            raise
        size = error.headers.get("Content-Range", "").rpartition("/")[2]
        # nothing is left to send: `part` is whole, or its hash will tell
        if size in ("", "*", str(start)):
            return True
        part.unlink()  # longer than the file: of another version
        return False
    with response:
        # 200 means that the server sends everything from the start
        resumed = response.status == 206
        size = (start if resumed else 0) + int(response.headers.get("Content-Length") or 0)
        with open(part, "ab" if resumed else "wb") as file:
            while piece := response.read(PIECE):
                file.write(piece)
                _show(file.tell(), size)
    return _size(part) >= size


def _show(done, size):
    if sys.stderr.isatty():
        end = "" if done < size else "\n"
        print(f"\r{done / 1e6:.0f} of {size / 1e6:.0f} MB", end=end, file=sys.stderr, flush=True)


def download(name, folder, mirror=None, rows=None):
    """Bring one checkpoint below `folder`, checked; returns a sentence about what was done."""
    rows = rows or CHECKPOINTS | FIRST_STAGES
    if name not in rows:
        raise ValueError(f"checkpoint '{name}' is unknown; choose from {', '.join(rows)}")
    checkpoint = rows[name]
    path = Path(folder).expanduser() / checkpoint.path
    check = (
        f"{checkpoint.hash.split()[0].upper()} verified"
        if checkpoint.hash
        else "no hash of it is published"
    )
    if path.exists():
        if wrong := fault(path, checkpoint.hash):
            raise ValueError(f"{path} is there but {wrong}; delete it and run the command again")
        return f"{name}: already at {path}, {check}"
    address = f"{mirror.rstrip('/')}/{checkpoint.path}" if mirror else checkpoint.address
    print(f"{name}: {checkpoint.about}, from {address}", flush=True)
    fetch(address, path, wanted=checkpoint.hash, member="" if mirror else checkpoint.member)
    return f"{name}: now at {path}, {check}"


def run(arguments):
    parser = ArgumentParser(prog="download_models.sh", add_help=False)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--first-stages", action="store_true")
    parser.add_argument("--mirror", metavar="URL")
    parser.add_argument("--to", metavar="FOLDER", default=FOLDER)
    parser.add_argument("--list", action="store_true")
    options = parser.parse_intermixed_args(arguments)
    rows = FIRST_STAGES if options.first_stages else CHECKPOINTS | FIRST_STAGES
    if options.list:
        for name, checkpoint in rows.items():
            print(
                f"{name}  {checkpoint.about}\n    {checkpoint.path}\n    {checkpoint.address}  "
                f"{checkpoint.hash}"
            )
        return
    names = list(rows) if options.all else options.names
    if not names:
        raise ValueError(f"say which checkpoint to fetch, or --all: {', '.join(rows)}")
    for name in names:
        print(download(name, options.to, options.mirror, rows), flush=True)
