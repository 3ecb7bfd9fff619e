"""Work on pictures by several processes: the same results, errors in a sentence, and nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from csad import processes
from csad.data import files
from csad.errors import UserError
from csad.processes import map_pictures
from csad.progress import ProgressBar

import cv2
import pytest

ROOT = Path(__file__).resolve().parents[1]
PICTURES = 2 * processes.MIN_PICTURES


def process_of(_):
    time.sleep(0.02)
    return os.getpid()


def square(number):
    return number**2


def circumstances(_):
    return (
        os.environ["OMP_NUM_THREADS"],
        cv2.getNumThreads(),
        sys.modules["__main__"].__dict__.get("__file__"),
    )


def refuse(number, first):
    if number >= first:
        raise UserError(f"{number} cannot be read")


def killed(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)


def note_and_wait(number, folder):
    (folder / f"{number}_{os.getpid()}").touch()
    time.sleep(0.2)


def run(work, pictures, workers):
    with ProgressBar(total=len(pictures)) as bar:
        found = map_pictures(work, pictures, workers, bar)
        assert bar.n == len(pictures)
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_pictures(workers):
    assert run(square, range(PICTURES), workers) == [number**2 for number in range(PICTURES)]


def test_a_handful_of_pictures_starts_no_process():
    assert set(run(process_of, range(PICTURES - 1), 8)) == {os.getpid()}
    assert os.getpid() not in run(process_of, range(PICTURES), 8)


def test_workers_have_one_thread_each_and_import_no_script():
    before = dict(os.environ), sys.modules["__main__"]
    assert set(run(circumstances, range(PICTURES), 2)) == {("1", 1, None)}
    assert (dict(os.environ), sys.modules["__main__"]) == before
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="signals cannot be blocked")
def test_ctrl_c_does_not_reach_the_first_process_either():
    """Starting the first one starts Python's resource tracker, which lets Ctrl-C through again."""
    script = (
        "import signal\nfrom multiprocessing import resource_tracker\n"
        "from csad.processes import inherited_by_children\n"
        "with inherited_by_children(2):\n"
        "    resource_tracker.ensure_running()\n"
        "    print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))\n"
        "print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False"], done.stderr


def test_there_are_no_more_processes_than_the_system_can_wait_for(monkeypatch):
    """Windows waits for 61 at most; of more Python makes no pool."""

    def pool(count, *_):
        raise UserError(f"{count} processes")

    monkeypatch.setattr(processes, "ProcessPoolExecutor", pool)
    monkeypatch.setattr(processes, "MAX_PROCESSES", 61)
    with pytest.raises(UserError, match="^61 processes$"):
        run(square, range(100 * processes.MIN_PICTURES), 100)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_error_is_told_whatever_the_number_of_workers(workers):
    with pytest.raises(UserError, match="^7 cannot be read$"):
        run(partial(refuse, first=7), range(PICTURES), workers)


def test_a_killed_worker_is_told_in_a_sentence():
    with pytest.raises(UserError, match="was killed.*memory runs out.*run the same command again"):
        run(killed, range(PICTURES), 2)


SCRIPT = """
import sys
from functools import partial
from pathlib import Path
from csad.errors import run_script
from csad.processes import map_pictures
from csad.progress import ProgressBar
from test_processes import note_and_wait

def main():
    with ProgressBar(total=200) as bar:
        map_pictures(partial(note_and_wait, folder=Path(sys.argv[1])), range(200), 2, bar)

run_script(main)
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to see who lives")
@pytest.mark.parametrize(
    ("number", "whole_group", "status"),
    [
        (signal.SIGINT, True, 130),
        (signal.SIGTERM, False, 143),
        (signal.SIGTERM, True, 143),
        (signal.SIGKILL, False, -9),
    ],
)
def test_nobody_is_left_behind(tmp_path, number, whole_group, status):
    """Ctrl-C in a terminal reaches all processes, kill the script alone; killed outright, it can tell nobody."""
    (tmp_path / "seen").mkdir()
    files.write_text(tmp_path / "script.py", SCRIPT)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    script = subprocess.Popen(
        [sys.executable, tmp_path / "script.py", tmp_path / "seen"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
        start_new_session=True,
    )
    wait_for(lambda: len({path.name.split("_")[1] for path in (tmp_path / "seen").iterdir()}) == 2)
    workers = {int(path.name.split("_")[1]) for path in (tmp_path / "seen").iterdir()}
    (os.killpg if whole_group else os.kill)(script.pid, number)
    _, said = script.communicate(timeout=60)
    assert script.returncode == status and "Traceback" not in said
    assert number == signal.SIGKILL or said.startswith("interrupted; everything finished so far is kept")
    wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
    assert len(list((tmp_path / "seen").iterdir())) < 100


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
