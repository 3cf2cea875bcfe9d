"""Downloads from a local server: whole, cut off and resumed, wrong, absent, already there."""
import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from scripts import download

CONTENT = bytes(range(256)) * 4000                        # about one megabyte
PATH = "folder/model.ckpt"


class Server(ThreadingHTTPServer):
    """Serves CONTENT at /PATH. `cut_after`: bytes it sends before the connection breaks; `ranges`: honours Range."""

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
            return self.send_error(416)
        body = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:server.cut_after.pop(0)] if server.cut_after else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    checkpoint = download.Checkpoint("unused", PATH, hashlib.md5(CONTENT).hexdigest(), "1 MB")
    monkeypatch.setattr(download, "CHECKPOINTS", {"tiny": checkpoint})
    with Server() as server:
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
    with pytest.raises(ValueError, match="500000 bytes are there so far; run the same command again") as error:
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
    with pytest.raises(ValueError, match="is there but its MD5 is not"):
        download.download("tiny", tmp_path, server.address)
    assert (tmp_path / PATH).read_bytes() == b"mine"


def test_absent_file(server, tmp_path):
    with pytest.raises(ValueError, match="answered 404 Not Found; give another address with --mirror"):
        download.download("tiny", tmp_path, server.address + "/elsewhere")


def test_nobody_answers(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(ValueError, match="failed 5 times .*Connection refused.* and 0 bytes are there"):
        download.download("tiny", tmp_path, server.address)


def test_names(capsys):
    with pytest.raises(ValueError, match="'cifar' is unknown; choose from cifar10"):
        download.download("cifar", "unused")
    with pytest.raises(ValueError, match="say which checkpoint to fetch: cifar10"):
        download.run(["--to", "unused"])
    download.run(["--list"])
    assert "1fa350b952534ae442b1d5235cce5cd3" in capsys.readouterr().out
