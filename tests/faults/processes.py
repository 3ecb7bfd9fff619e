"""What happens to a script's process: called in it before the script."""

from __future__ import annotations

import ctypes
import errno
import http.client
import json
import os
import re
import resource
import shutil
import signal
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from csad import settings
from csad.commands import score_images
from csad.data.locks import FileLock
from csad.export import exporters
from csad.training.loop import TrainingLoop

import onnx

TIMEOUT = 60.0  # seconds, of what is waited for
_held = []


def hold(name: str) -> None:
    """Another run holds a lock."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    _held.append(FileLock(Path(name)).acquire())


def full_disk() -> None:
    """No file can be finished."""

    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.fsync = refuse


def no_large_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))


def nothing_writable() -> None:
    """Somebody who may read everything and write nothing."""
    for path in [path for path in (Path("."), *Path(".").rglob("*")) if not path.is_symlink()]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    if os.geteuid() == 0:
        # Root without its capabilities is refused like anyone else. Another user might not even read Python's
        # own folders (packages load some modules late), and then another fault would be tested.
        header = struct.pack("Ii", 0x20080522, 0)
        assert ctypes.CDLL(None, use_errno=True).capset(header, bytes(24)) == 0, os.strerror(
            ctypes.get_errno()
        )


def no_reader() -> None:
    """Whoever read the output is gone."""
    reading, writing = os.pipe()
    os.dup2(writing, 1)
    os.close(reading)


def interrupt(step: int, number: int) -> None:
    """A signal comes at a step of a training."""
    report, steps = TrainingLoop.report, []

    def watched(*arguments: Any) -> None:
        report(*arguments)
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), number)

    TrainingLoop.report = watched


def must_go_on() -> None:
    """No training may begin with its first step."""
    samples = TrainingLoop.samples

    def watched(loop: TrainingLoop, draw: Callable) -> Any:
        assert loop.done > 0
        return samples(loop, draw)

    TrainingLoop.samples = watched


def own_configs() -> None:
    """The categories' settings lie in configs/ of the run's folder."""
    shutil.copytree(settings.CONFIGS / "presets", "configs/presets")
    settings.CONFIGS = Path("configs").resolve()


def damaged_export() -> None:
    """A runtime gives other numbers than PyTorch: here, as the first layer is 1 % off."""
    to_onnx, to_openvino = exporters.onnx_model, exporters.openvino_model

    def damaged(content: bytes) -> bytes:
        model = onnx.load_from_string(content)
        first = next(each for each in model.graph.initializer if len(each.dims) == 4 and each.dims[1] == 3)
        first.CopyFrom(onnx.numpy_helper.from_array(1.01 * onnx.numpy_helper.to_array(first), first.name))
        return model.SerializeToString()

    exporters.onnx_model = lambda *arguments: damaged(to_onnx(*arguments))
    exporters.openvino_model = lambda content, *rest: to_openvino(damaged(content), *rest)


def outage() -> None:
    """The watched folder goes away after its two pictures were scored, and comes back; that ends the run."""
    score_images.POLL_SECONDS = 0.05
    photos, gone, lines = Path("photos"), Path("gone"), Path("new/predictions.jsonl")

    def happen() -> None:
        _wait_for(lines, rb"\n.*\n")
        photos.rename(gone)
        _wait_for(Path("stderr"), b"what was scored is remembered")
        gone.rename(photos)
        _wait_for(Path("stderr"), b"is there again")
        time.sleep(20 * score_images.POLL_SECONDS)
        os.write(2, f"{len(lines.read_text().splitlines())} lines written\n".encode())
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=happen, daemon=True).start()


def ask(headers: dict[str, str], body: bytes = b"") -> None:
    """Send the station a request, write the answer's sentence to stderr, and end the station."""

    def happen() -> None:
        said = _wait_for(Path("stdout"), rb"http://\S+/\n").decode()
        connection = http.client.HTTPConnection(re.search("http://(.+)/\n", said)[1], timeout=TIMEOUT)
        connection.request("POST", "/score", body, headers)
        os.write(2, json.loads(connection.getresponse().read())["error"].encode() + b"\n")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=happen, daemon=True).start()


def _wait_for(path: Path, pattern: bytes) -> bytes:
    """The content of a file that holds a pattern by now."""
    until = time.monotonic() + TIMEOUT
    while not (path.exists() and re.search(pattern, content := path.read_bytes(), re.DOTALL)):
        assert time.monotonic() < until, f"{path} does not hold {pattern}"
        time.sleep(0.01)
    return content
