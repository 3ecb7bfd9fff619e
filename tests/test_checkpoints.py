"""Downloads against a server on loopback: whole, wrong, broken half-way, missing, continued."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from csad.data import downloads
from csad.data.downloads import Checkpoint
from csad.errors import UserError
from csad.pseudo_labels import checkpoints

import pytest

CONTENT = bytes(range(256)) * 8192  # 2 MiB: more than one chunk
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves CONTENT.

    Attributes:
        breaks_after: bytes of an answer's body after which the connection is cut, or None.
        continues: whether it understands Range.
        asked_for: the Range header of every request.
    """

    breaks_after, continues = None, True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked_for = []

    def checkpoint(self, name="weights.pth", sha256=SHA256):
        return Checkpoint(name, f"http://127.0.0.1:{self.server_address[1]}/{name}", 2, sha256)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        wanted = self.headers.get("Range")
        self.server.asked_for.append(wanted)
        if self.path == "/missing.pth":
            return self.send_error(404)
        first = (
            int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.server.continues else 0
        )
        if first >= len(CONTENT):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.send_header("Content-Length", str(len(CONTENT) - first))
        self.end_headers()
        body = CONTENT[first:]
        self.wfile.write(body if self.server.breaks_after is None else body[: self.server.breaks_after])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_whole_file_gets_its_name(server, tmp_path):
    path = downloads.obtain(server.checkpoint(), tmp_path / "ckpt", download=True)
    assert path == tmp_path / "ckpt" / "weights.pth" and path.read_bytes() == CONTENT
    assert [found.name for found in path.parent.iterdir()] == ["weights.pth"]
    downloads.obtain(server.checkpoint(), tmp_path / "ckpt", download=True)
    assert server.asked_for == [None]


def test_without_download_a_missing_file_is_one_sentence(server, tmp_path):
    with pytest.raises(
        UserError,
        match=r"weights\.pth is missing; fetch it with --download .* http://127.0.0.1:\d+/weights.pth",
    ):
        downloads.obtain(server.checkpoint(), tmp_path, download=False)
    assert server.asked_for == []


def test_a_wrong_checksum_leaves_nothing(server, tmp_path):
    with pytest.raises(UserError, match="SHA-256"):
        downloads.fetch(server.checkpoint(sha256="0" * 64), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_error_status_leaves_nothing(server, tmp_path):
    with pytest.raises(UserError, match="missing.pth answered 404"):
        downloads.fetch(server.checkpoint("missing.pth"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nobody_there(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as gone:
        pass
    with pytest.raises(UserError, match="cannot be reached"):
        downloads.fetch(gone.checkpoint(), tmp_path)


def broken_off(server, folder, after=700_000):
    server.breaks_after = after
    with pytest.raises(UserError, match="broke off"):
        downloads.fetch(server.checkpoint(), folder)
    server.breaks_after = None
    assert [path.name for path in folder.iterdir()] == ["weights.pth.part"]
    assert (folder / "weights.pth.part").read_bytes() == CONTENT[:after]


def test_a_broken_download_is_continued(server, tmp_path):
    broken_off(server, tmp_path)
    assert downloads.fetch(server.checkpoint(), tmp_path).read_bytes() == CONTENT
    assert server.asked_for == [None, "bytes=700000-"]
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pth"]


def test_a_server_that_cannot_continue_starts_over(server, tmp_path):
    broken_off(server, tmp_path)
    server.continues = False
    assert downloads.fetch(server.checkpoint(), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("part", [CONTENT, CONTENT + b"more"])
def test_all_is_there_but_the_name(server, tmp_path, part):
    (tmp_path / "weights.pth.part").write_bytes(part)
    assert downloads.fetch(server.checkpoint(), tmp_path).read_bytes() == CONTENT


def test_a_file_without_a_checksum_is_never_continued(server, tmp_path):
    (tmp_path / "weights.pth.part").write_bytes(b"something else")
    assert downloads.fetch(server.checkpoint(sha256=None), tmp_path).read_bytes() == CONTENT
    assert server.asked_for == [None]


def test_the_text_encoder_is_a_folder_of_files(server, tmp_path, monkeypatch):
    parts = tuple(server.checkpoint(f"bert-base-uncased/{name}") for name in ("config.json", "vocab.txt"))
    monkeypatch.setattr(checkpoints, "TEXT_ENCODER_FILES", parts)
    folder = checkpoints.obtain_text_encoder(tmp_path, download=True)
    assert folder == tmp_path / "bert-base-uncased"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "vocab.txt"]
    server.asked_for.clear()
    assert checkpoints.obtain_text_encoder(tmp_path, download=False) == folder and server.asked_for == []


def test_the_text_encoder_is_not_looked_for_online(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="bert-base-uncased is missing; fetch it with --download"):
        checkpoints.obtain_text_encoder(tmp_path, download=False)


def test_a_digest_tells_files_apart(tmp_path):
    for name, content in (
        ("a", CONTENT),
        ("b", CONTENT),
        ("c", CONTENT[:-1]),
        ("d", CONTENT[:-1] + b"\x00"),
        ("e", b""),
    ):
        (tmp_path / name).write_bytes(content)
    found = {name: downloads.digest(tmp_path / name) for name in "abcde"}
    assert found["a"] == found["b"] and len(set(found.values())) == 4
