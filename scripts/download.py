"""Fetch public checkpoints:  bash scripts/download_models.sh NAME ... [--mirror URL] [--to FOLDER] | --list

A download that was cut off goes on where it stopped; a file is put in its place only when its MD5 is the published
one, and a file that is already there is checked, not fetched. --list shows the names; --mirror takes the address of a
folder that holds the same paths as --list shows; --to is models/checkpoints unless given.
"""
import hashlib
import http.client
import ssl
import sys
import urllib.error
import urllib.request
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.cli import main  # noqa: E402

FOLDER = Path(__file__).resolve().parents[1] / "models/checkpoints"
PIECE = 1 << 20                              # bytes read at a time
ATTEMPTS = 5                                 # connections that may break in one call before it gives up
TIMEOUT_SECONDS = 60
BROKEN = (urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException)


@dataclass(frozen=True)
class Checkpoint:
    """A published file: its address, its place below the folder (as the authors' own code keeps it), its MD5."""
    address: str
    path: str
    md5: str
    about: str


CHECKPOINTS = {
    "cifar10": Checkpoint("https://heibox.uni-heidelberg.de/f/869980b53bf5416c8a28/?dl=1",
                          "diffusion_models_converted/ema_diffusion_cifar10_model/model-790000.ckpt",
                          "1fa350b952534ae442b1d5235cce5cd3", "CIFAR-10 32x32, averaged weights, 143 MB"),
}


def md5_of(path):
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def fetch(address, path, md5):
    """Download `address` to `path` with the given MD5, by way of `path`.part. Raises ValueError if it cannot."""
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(ATTEMPTS):
        try:
            if _append(address, part):
                break
            reason = "it ended early"
        except urllib.error.HTTPError as error:
            raise ValueError(f"{address} answered {error.code} {error.reason}; give another address with --mirror URL, "
                             f"or put the file at {path} yourself") from None
        except BROKEN as error:
            reason = getattr(error, "reason", error)
    else:
        raise ValueError(f"the connection to {address} failed {ATTEMPTS} times ({reason}) and {_size(part)} bytes are "
                         "there so far; run the same command again to go on from there, give another address with "
                         f"--mirror URL, or put the file at {path} yourself")
    found = md5_of(part)
    if found != md5:
        part.unlink()
        raise ValueError(f"what {address} sent has MD5 {found}, expected {md5}, and was deleted; "
                         "run the command again or give another address with --mirror URL")
    part.replace(path)


def _size(path):
    return path.stat().st_size if path.exists() else 0


def _append(address, part):
    """Add to `part` what it lacks; True when the server has sent all it announced."""
    start = _size(part)
    request = urllib.request.Request(address, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416:                # nothing is left to send: `part` is whole, or its MD5 will tell
            return True
        raise
    with response:
        resumed = response.status == 206     # 200 means that the server sends everything from the start
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


def download(name, folder, mirror=None):
    """Bring one checkpoint below `folder`, verified; returns a sentence about what was done."""
    if name not in CHECKPOINTS:
        raise ValueError(f"checkpoint '{name}' is unknown; choose from {', '.join(CHECKPOINTS)}")
    checkpoint = CHECKPOINTS[name]
    path = Path(folder).expanduser() / checkpoint.path
    if path.exists():
        if md5_of(path) != checkpoint.md5:
            raise ValueError(f"{path} is there but its MD5 is not {checkpoint.md5}; "
                             "delete it and run the command again")
        return f"{name}: already at {path}, MD5 verified"
    address = f"{mirror.rstrip('/')}/{checkpoint.path}" if mirror else checkpoint.address
    print(f"{name}: {checkpoint.about}, from {address}", flush=True)
    fetch(address, path, checkpoint.md5)
    return f"{name}: now at {path}, MD5 verified"


def run(arguments):
    parser = ArgumentParser(prog="download_models.sh", add_help=False)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--mirror", metavar="URL")
    parser.add_argument("--to", metavar="FOLDER", default=FOLDER)
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args(arguments)
    if options.list:
        for name, checkpoint in CHECKPOINTS.items():
            print(f"{name}  {checkpoint.about}\n    {checkpoint.path}\n    {checkpoint.address}  md5 {checkpoint.md5}")
        return
    if not options.names:
        raise ValueError(f"say which checkpoint to fetch: {', '.join(CHECKPOINTS)}")
    for name in options.names:
        print(download(name, options.to, options.mirror))


if __name__ == "__main__":
    main(run)
