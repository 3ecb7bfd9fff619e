"""One process at a time: who holds a lock, when it is taken over, and what a second run is told."""

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from csad.data import locks
from csad.data.locks import FileLock, LockHeld
from csad.data.workspace import Workspace
from csad.errors import UserError

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def path(tmp_path):
    return tmp_path / ".csad.lock"


def write(path, age=0.0, **changes):
    """A lock file as another owner would have left it."""
    content = {
        "token": "other",
        "host": socket.gethostname(),
        "namespace": locks._process_namespace(),
        "process": os.getpid(),
        "since": "2026-11-30 05:41",
    } | changes
    path.write_text(json.dumps(content))
    os.utime(path, (time.time() - age,) * 2)


def test_a_second_one_is_refused_until_the_first_lets_go(path):
    with FileLock(path).acquire():
        with pytest.raises(LockHeld, match=f"process {os.getpid()} on {socket.gethostname()}, since 20"):
            FileLock(path).acquire()
        assert [one.name for one in path.parent.iterdir()] == [path.name]
    assert not list(path.parent.iterdir())
    FileLock(path).acquire().release()


def test_a_lock_of_another_stays_where_none_can_be_made(path, monkeypatch):
    write(path)

    def too_many(*_, **__):
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr("builtins.open", too_many)
    with pytest.raises(OSError, match="too many"):
        FileLock(path).acquire()
    assert path.exists()


def test_a_full_disk_leaves_no_empty_lock(path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(locks.json, "dumps", full)
    with pytest.raises(OSError, match="full"):
        FileLock(path).acquire()
    assert not path.exists()


def test_the_sentence_names_process_host_and_time(path):
    write(path, host="line-a", process=4711)
    with pytest.raises(
        UserError, match="another run is working in .* [(]process 4711 on line-a, since 2026-11-30 05:41[)]"
    ):
        with Workspace(path.parent).lock():
            pass
    assert path.exists()


@pytest.mark.parametrize(
    "age, changes, held",
    [
        (
            0,
            {"host": "line-a", "process": 2**22 + 1},
            True,
        ),  # of another machine's processes nothing is known
        (0, {"namespace": "pid:[1]", "process": 2**22 + 1}, True),  # nor of another container's
        (locks.STALE_SECONDS + 60, {"host": "line-a"}, False),
        (
            locks.STALE_SECONDS + 60,
            {},
            False,
        ),  # alive, but perhaps another process of the same number, after a restart
        (0, {"process": 2**22 + 1}, False),
    ],
)  # dead
def test_only_what_is_dead_or_silent_is_taken_over(path, age, changes, held):
    write(path, age, **changes)
    if held:
        with pytest.raises(LockHeld):
            FileLock(path).acquire()
    else:
        with FileLock(path).acquire():
            assert json.loads(path.read_text())["process"] == os.getpid()
    assert {one.name for one in path.parent.iterdir()} == ({path.name} if held else set())


@pytest.mark.parametrize("content", ["", "[]", "{", "{}"])
def test_a_lock_that_says_nothing_holds_until_it_is_silent(path, content):
    path.write_text(content)
    with pytest.raises(LockHeld, match="does not say"):
        FileLock(path).acquire()
    os.utime(path, (time.time() - locks.STALE_SECONDS - 60,) * 2)
    FileLock(path).acquire().release()


def test_a_killed_process_leaves_a_lock_that_is_taken_over_at_once(path):
    code = f"from pathlib import Path; from csad.data.locks import FileLock\nFileLock(Path({str(path)!r})).acquire()"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code}; print(1, flush=True); input()"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    process.stdout.readline()
    with pytest.raises(LockHeld, match=f"process {process.pid} "):
        FileLock(path).acquire()
    process.kill()  # not waited for: a dead process that nobody has reaped is dead, too
    with FileLock(path).acquire(timeout=30):
        pass
    process.communicate()


def test_the_owner_shows_signs_of_life(path, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.02)
    with FileLock(path).acquire():
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 30
        while path.stat().st_mtime < 1:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_of_many_only_one_takes_over(path):
    write(path, process=2**22 + 1)
    held, refused = [], []

    def enter():
        try:
            held.append(FileLock(path).acquire())
        except LockHeld:
            refused.append(1)

    threads = [threading.Thread(target=enter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1 and len(refused) == 7
    held[0].release()


def test_a_lock_taken_over_is_left_to_its_new_owner(path):
    lock = FileLock(path).acquire()
    write(path)
    lock.release()
    assert json.loads(path.read_text())["token"] == "other"
