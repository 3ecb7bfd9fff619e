"""One process at a time, on local disks and on network file systems alike.

Advisory locks (flock, fcntl) are not enough: some NFS mounts grant them to every caller. So the lock is a file that is created
exclusively (O_EXCL, atomic on NFS since version 3) and says whose it is. Its owner touches it now and then. A lock whose owner is
dead, or has not touched it for `STALE_SECONDS`, is taken over.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

HEARTBEAT_SECONDS = 15.0
STALE_SECONDS = 180.0  # without a heartbeat; an NFS client may show a file's time up to a minute late
POLL_SECONDS = 0.2


class LockHeld(Exception):
    """Another process holds the lock.

    Attributes:
        owner: who and since when, for a sentence; for example: process 4711 on line-a, since 2026-11-30 05:41.
    """

    def __init__(self, owner: str):
        super().__init__(owner)
        self.owner = owner


class FileLock:
    """``with FileLock(path).acquire():`` ...

    Args:
        path: the lock file, in an existing folder; gone after the release.
    """

    def __init__(self, path: Path):
        self.path = path
        self._token = uuid.uuid4().hex
        self._released = threading.Event()

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self, timeout: float = 0.0) -> FileLock:
        """Wait at most ``timeout`` seconds for another owner; returns this lock. LockHeld if another process,
        or this one, holds it."""
        deadline = time.monotonic() + timeout
        while not self._create():
            owner = self._read()
            if owner is not None and self._is_stale(owner):
                self._remove(owner)
            elif time.monotonic() >= deadline:
                raise LockHeld(_describe(owner))
            else:
                time.sleep(POLL_SECONDS)
        self._released.clear()
        threading.Thread(target=self._beat, name=f"heartbeat of {self.path.name}", daemon=True).start()
        return self

    def release(self) -> None:
        """Let go; a lock that was taken over meanwhile is left to its new owner."""
        self._released.set()
        with suppress(OSError):  # gone, or the file server does not answer: it will be taken over
            if _content(self.path).get("token") == self._token:
                self.path.unlink()

    def _create(self) -> bool:
        content = {
            "token": self._token,
            "host": socket.gethostname(),
            "namespace": _process_namespace(),
            "process": os.getpid(),
            "since": datetime.now().strftime("%Y-%m-%d %H:%M"),
        }
        try:
            handle = open(self.path, "x", encoding="utf-8")
        except FileExistsError:
            return False
        try:
            with handle:
                handle.write(json.dumps(content))
        except OSError:  # a full disk; an empty lock would hold for `STALE_SECONDS`
            self.path.unlink(missing_ok=True)
            raise
        return True

    def _read(self) -> dict[str, Any] | None:
        """What the lock file says, with "age", the seconds since its last heartbeat by the file system's clock; None: no file."""
        probe = self.path.with_name(f"{self.path.name}.{self._token}")
        try:
            touched, content = self.path.stat().st_mtime, _content(self.path)
            probe.touch()
            age = probe.stat().st_mtime - touched
        except FileNotFoundError:
            return None
        finally:
            probe.unlink(missing_ok=True)
        return content | {"age": age}

    def _is_stale(self, owner: dict[str, Any]) -> bool:
        here = socket.gethostname(), _process_namespace()
        same_host = (owner.get("host"), owner.get("namespace")) == here
        return owner["age"] > STALE_SECONDS or (same_host and not _is_alive(owner.get("process")))

    def _remove(self, stale: dict[str, Any]) -> None:
        """Move a stale lock away; if another process was faster and the lock is its new one by now, put it back."""
        aside = self.path.with_name(f"{self.path.name}.{self._token}")
        with suppress(FileNotFoundError):
            self.path.rename(aside)
            if _content(aside).get("token") != stale.get("token"):
                with suppress(OSError):
                    os.link(aside, self.path)
        aside.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):  # the file server does not answer: the next one may
                owner = self._read()
                if owner is not None and owner.get("token") != self._token and not self._released.is_set():
                    print(
                        f"{self.path} was taken over by {_describe(owner)} while this process was stopped; it ends here",
                        file=sys.stderr,
                        flush=True,
                    )
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                os.utime(self.path)


def _content(path: Path) -> dict[str, Any]:
    """What a lock file says; nothing if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _describe(owner: dict[str, Any] | None) -> str:
    if not owner or "process" not in owner:
        return "it does not say which process"
    return f"process {owner['process']} on {owner.get('host')}, since {owner.get('since')}"


def _is_alive(process: Any) -> bool:
    """Whether a process of this machine is there and not only waits to be reaped; True if that cannot be told."""
    if os.name != "posix" or not isinstance(process, int) or process <= 0:
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):  # no Linux
        return True


def _process_namespace() -> str:
    """Containers may share a host's name, but not its process numbers."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
