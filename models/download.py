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
import json
import logging
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

PROJECT = Path(__file__).resolve().parents[1]  # not from base.files: torch may not be there yet
# models of the clone; an installed copy leaves its own folder alone and takes the current one
FOLDER = PROJECT / "models" if (PROJECT / "pyproject.toml").exists() else Path("models")
PIECE = 1 << 20  # bytes read at a time
ATTEMPTS = 5  # connections that may break in one call before it gives up
TIMEOUT_SECONDS = 60
LOST = (urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError)
BROKEN = (*LOST, http.client.HTTPException)
# what reading a zip ends in that is damaged, or none
NOT_INTACT = (zipfile.BadZipFile, KeyError, EOFError, RuntimeError, NotImplementedError, zlib.error)


@dataclass(frozen=True)
class Checkpoint:
    """A published file: its address, its place below the folder (that of the models' code)."""

    address: str
    path: str
    about: str
    hash: str = ""  # "md5 1fa3..." or "sha256 fe4e..."; empty where none is published
    member: str = ""  # what to take out of a zip


Rows = dict[str, Checkpoint]


def read_table(kind: str) -> Rows:
    """Reads "checkpoints" (named as in configs/model) or "first_stages" of checkpoints.json."""
    rows = json.loads(Path(__file__).with_name("checkpoints.json").read_text())[kind]
    return {name: Checkpoint(**row) for name, row in rows.items()}


CHECKPOINTS, FIRST_STAGES = read_table("checkpoints"), read_table("first_stages")


def fault(path: Path, wanted: str) -> str:
    """Says what is wrong with a downloaded file, "" if nothing; `wanted` is the hash of its row."""
    algorithm, _, digest = wanted.partition(" ")
    with open(path, "rb") as file:
        if not wanted:
            return "is empty or a web page" if file.read(1) in (b"", b"<") else ""
        state = hashlib.new(algorithm, usedforsecurity=False)
        while piece := file.read(PIECE):
            state.update(piece)
    found = state.hexdigest()
    return "" if found == digest else f"has {algorithm.upper()} {found}, expected {digest}"


def fetch(address: str, path: Path, *, wanted: str = "", member: str = "") -> None:
    """Downloads `address` to `path` by way of `path`.part; `wanted` and `member` are the hash and
    member of a Checkpoint. Raises ValueError if it cannot."""
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
                f"--mirror URL, or put the file at {path} yourself"
            ) from None
        except BROKEN as error:
            reason = getattr(error, "reason", error)
    else:
        raise ValueError(
            f"the connection to {address} failed {ATTEMPTS} times ({reason}) and {_size(part)} "
            "bytes are there so far; run the same command again to go on from there, give another "
            f"address with --mirror URL, or put the file at {path} yourself"
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
    """Takes `member` out of a zip, checked by its checksum; returns where it is."""
    target = part.with_name(part.name + ".unpacked")
    try:
        with zipfile.ZipFile(part) as archive, archive.open(member) as source:
            with open(target, "wb") as file:
                shutil.copyfileobj(source, file, PIECE)
    except NOT_INTACT as error:
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
    """Adds to `part` what it lacks; returns whether the server has sent all that it announced."""
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


def download(
    name: str, folder: Path | str, mirror: str | None = None, rows: Rows | None = None
) -> str:
    """Brings one checkpoint of `rows` (all unless given) below `folder`, checked; returns a
    sentence about what was done. Raises ValueError if it cannot."""
    rows = rows or CHECKPOINTS | FIRST_STAGES
    if name not in rows:
        raise ValueError(f"checkpoint '{name}' is unknown; choose from {', '.join(rows)}")
    checkpoint = rows[name]
    path = Path(folder).expanduser() / checkpoint.path
    algorithm = checkpoint.hash.partition(" ")[0].upper()
    check = f"{algorithm} verified" if algorithm else "no hash of it is published"
    if path.exists():
        if wrong := fault(path, checkpoint.hash):
            raise ValueError(f"{path} is there but {wrong}; delete it and run the command again")
        return f"{name}: already at {path}, {check}"
    address = f"{mirror.rstrip('/')}/{checkpoint.path}" if mirror else checkpoint.address
    logging.getLogger("tinydm").info(f"{name}: {checkpoint.about}, from {address}")
    fetch(address, path, wanted=checkpoint.hash, member="" if mirror else checkpoint.member)
    return f"{name}: now at {path}, {check}"


def run(arguments: list[str]) -> None:
    """Fetches, or lists, by a command line."""
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
        for name, row in rows.items():
            print(f"{name}  {row.about}\n    {row.path}\n    {row.address}  {row.hash}")
        return
    names = list(rows) if options.all else options.names
    if not names:
        raise ValueError(f"say which checkpoint to fetch, or --all: {', '.join(rows)}")
    for name in names:
        print(download(name, options.to, options.mirror, rows), flush=True)
