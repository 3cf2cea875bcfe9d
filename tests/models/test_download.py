"""Downloads from a local server: whole, cut off and resumed, wrong, absent, already there; zips."""

import hashlib
import io
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from base.config import read_yaml
from base.files import PROJECT
from models import download

CONTENT = bytes(range(256)) * 4000  # about one megabyte
PATH = "folder/model.ckpt"


class Server(ThreadingHTTPServer):
    """Serves CONTENT at /PATH. `cut_after`: bytes it sends before the connection breaks; `ranges`:
    honours Range."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.cut_after, self.ranges, self.requests = CONTENT, [], True, []
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        wanted, server = self.headers.get("Range"), self.server
        server.requests.append(wanted)
        if self.path != f"/{PATH}":
            return self.send_error(404)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and server.ranges else 0
        if start >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            return self.end_headers()
        body = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.cut_after.pop(0)] if server.cut_after else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    with Server() as server:
        row, digest = download.Checkpoint, hashlib.sha256(CONTENT).hexdigest()
        monkeypatch.setattr(
            download,
            "CHECKPOINTS",
            {
                "tiny": row("unused", PATH, "1 MB", f"md5 {hashlib.md5(CONTENT).hexdigest()}"),
                "sha": row(f"{server.address}/{PATH}", PATH, "1 MB", f"sha256 {digest}"),
                "unhashed": row(f"{server.address}/{PATH}", PATH, "1 MB"),
            },
        )
        monkeypatch.setattr(
            download,
            "FIRST_STAGES",
            {
                "zip": row(
                    f"{server.address}/{PATH}", "stage/model.ckpt", "1 MB", member="model.ckpt"
                )
            },
        )
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_whole_file_then_already_there(server, tmp_path, capsys):
    arguments = ["tiny", "--mirror", server.address + "/", "--to", str(tmp_path)]
    download.run(arguments)
    assert (tmp_path / PATH).read_bytes() == CONTENT
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["model.ckpt"]
    download.run(arguments)
    assert "already at" in capsys.readouterr().out and len(server.requests) == 1


def test_broken_connection_is_resumed_within_a_call(server, tmp_path):
    server.cut_after = [300_000, 100_000]
    download.download("tiny", tmp_path, server.address)
    assert (tmp_path / PATH).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=300000-", "bytes=400000-"]


def test_after_too_many_breaks_the_next_call_goes_on(server, tmp_path):
    server.cut_after = [100_000] * download.ATTEMPTS
    with pytest.raises(
        ValueError, match="500000 bytes are there so far; run the same command again"
    ) as error:
        download.download("tiny", tmp_path, server.address)
    assert "\n" not in str(error.value) and not (tmp_path / PATH).exists()
    download.download("tiny", tmp_path, server.address)
    assert (tmp_path / PATH).read_bytes() == CONTENT and server.requests[-1] == "bytes=500000-"


def test_server_that_cannot_resume_sends_everything_again(server, tmp_path):
    server.cut_after, server.ranges = [300_000], False
    download.download("tiny", tmp_path, server.address)
    assert (tmp_path / PATH).read_bytes() == CONTENT


def test_file_that_was_whole_but_not_yet_in_place(server, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / f"{PATH}.part").write_bytes(CONTENT)
    download.download("tiny", tmp_path, server.address)
    assert (tmp_path / PATH).read_bytes() == CONTENT


def test_wrong_content_is_refused_and_deleted(server, tmp_path):
    server.content = CONTENT[:-1] + b"x"
    with pytest.raises(ValueError, match="has MD5 .*, expected .*, and was deleted"):
        download.download("tiny", tmp_path, server.address)
    assert list((tmp_path / "folder").iterdir()) == []


def test_another_file_in_its_place_is_not_overwritten(server, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / PATH).write_bytes(b"mine")
    with pytest.raises(ValueError, match="is there but has MD5"):
        download.download("tiny", tmp_path, server.address)
    assert (tmp_path / PATH).read_bytes() == b"mine"


def test_absent_file(server, tmp_path):
    with pytest.raises(
        ValueError, match="answered 404 Not Found; give another address with --mirror"
    ):
        download.download("tiny", tmp_path, server.address + "/elsewhere")


def test_nobody_answers(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(
        ValueError, match="failed 5 times .*Connection refused.* and 0 bytes are there"
    ):
        download.download("tiny", tmp_path, server.address)


def test_other_hashes_and_none(server, tmp_path):
    assert download.download("sha", tmp_path / "a").endswith("SHA256 verified")
    assert download.download("unhashed", tmp_path / "b").endswith("no hash of it is published")
    assert download.download("unhashed", tmp_path / "b").startswith("unhashed: already at")
    server.content = CONTENT[1:]
    with pytest.raises(ValueError, match="has SHA256 .*, expected .*, and was deleted"):
        download.download("sha", tmp_path / "c")


def test_a_web_page_in_place_of_a_checkpoint(server, tmp_path):
    server.content = b"<!doctype html>"
    with pytest.raises(ValueError, match="is empty or a web page, and was deleted"):
        download.download("unhashed", tmp_path)
    assert list((tmp_path / "folder").iterdir()) == []


def test_a_part_that_is_longer_than_the_file_begins_anew(server, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / f"{PATH}.part").write_bytes(CONTENT + b"rest of another version")
    download.download("unhashed", tmp_path)
    assert (tmp_path / PATH).read_bytes() == CONTENT


def zipped(**members):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return archive.getvalue()


def test_a_zip_gives_its_checkpoint_and_nothing_else(server, tmp_path):
    server.content = zipped(
        **{"config.yaml": "x", "../../evil": "x", "/evil": "x", "model.ckpt": CONTENT}
    )
    server.cut_after = [300_000]
    download.download("zip", tmp_path / "models")
    assert (tmp_path / "models/stage/model.ckpt").read_bytes() == CONTENT
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["model.ckpt"]


@pytest.mark.parametrize("fault", ["no member", "checksum", "no zip"])
def test_a_zip_that_is_wrong(server, tmp_path, fault):
    whole = zipped(**{"model.ckpt": CONTENT})
    server.content = {
        "no member": zipped(other="x"),
        "checksum": whole.replace(CONTENT[:999], CONTENT[1:1000], 1),
        "no zip": CONTENT,
    }[fault]
    with pytest.raises(
        ValueError, match="no intact zip with model.ckpt .*, and was deleted"
    ) as error:
        download.download("zip", tmp_path)
    assert list((tmp_path / "stage").iterdir()) == [] and "\n" not in str(error.value)


def test_a_mirror_has_the_unpacked_file(server, tmp_path, monkeypatch):
    monkeypatch.setattr(
        download, "FIRST_STAGES", {"zip": download.Checkpoint("unused", PATH, "1 MB", member="x")}
    )
    download.download("zip", tmp_path, server.address)
    assert (tmp_path / PATH).read_bytes() == CONTENT


def test_all(server, tmp_path, capsys):
    server.content = zipped(**{"model.ckpt": CONTENT})
    download.run(["--all", "--first-stages", "--to", str(tmp_path)])
    assert (tmp_path / "stage/model.ckpt").read_bytes() == CONTENT
    with pytest.raises(ValueError, match="'tiny' is unknown; choose from zip"):
        download.run(["tiny", "--first-stages"])
    server.content = CONTENT
    download.run(["sha", "unhashed", "--to", str(tmp_path)])
    assert capsys.readouterr().out.count("at ") >= 3


def test_every_model_is_put_where_its_yaml_looks():
    for path in (PROJECT / "configs/model").glob("*.yaml"):
        config = read_yaml(path)
        if config.get("download"):
            assert config.download == f"bash scripts/download_models.sh {path.stem}"
            assert config.checkpoint == f"models/{download.CHECKPOINTS[path.stem].path}"
    for name, row in download.FIRST_STAGES.items():
        assert row.path == f"first_stage_models/{name}/model.ckpt"


def test_the_script_of_the_first_stages():
    command = ["bash", PROJECT / "scripts/download_first_stages.sh", "--list"]
    listed = subprocess.run(command, capture_output=True, text=True)
    assert (
        listed.stdout.count("\n") == 3 * len(download.FIRST_STAGES)
        and "first_stage_models/vq-f4/" in listed.stdout
    )


def test_the_command_needs_no_package():
    """-S leaves out what is installed: the standard library does."""
    command = [sys.executable, "-S", PROJECT / "scripts/download.py", "--list"]
    listed = subprocess.run(command, capture_output=True, text=True)
    assert listed.returncode == 0, listed.stderr
    assert listed.stdout.startswith("cifar10  DDPM CIFAR-10 32x32, 143 MB")


def test_names(capsys):
    with pytest.raises(ValueError, match="'cifar' is unknown; choose from cifar10"):
        download.download("cifar", "unused")
    with pytest.raises(ValueError, match="say which checkpoint to fetch, or --all: cifar10"):
        download.run(["--to", "unused"])
    download.run(["--list"])
    assert "1fa350b952534ae442b1d5235cce5cd3" in capsys.readouterr().out
