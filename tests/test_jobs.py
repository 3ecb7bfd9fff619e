"""Categories and seeds side by side in processes of this machine (--jobs): the same bytes, whatever ends them meanwhile."""

import argparse
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from csad import processes, tasks
from csad.cli import training_options
from csad.errors import UserError
from csad.training import jobs, loop

import pytest
import torch
from conftest import make_three_categories

ROOT = Path(__file__).parent.parent
TINY = ("--preset", "quick", "--backbone", "efficientnet_lite0", "--device", "cpu", "--images.size", "256")
NARROW = ("--lgst.width", "16", "--lgst.teacher_channels", "16")
PATIENCE = 120


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_three_categories(tmp_path_factory.mktemp("data"))


def start(workspace: Path, dataset: Path, *extra: str) -> subprocess.Popen:
    """Stage 3; one after another with as many threads as each of two side by side has."""
    threads = str(len(os.sched_getaffinity(0)) // 2) if "--jobs" not in extra else "8"
    return subprocess.Popen(
        [
            sys.executable,
            "CSAD.py",
            "--workspace",
            workspace,
            "--dataset_root",
            dataset,
            *TINY,
            *NARROW,
            *extra,
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": threads},
    )


def contents(workspace: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(workspace)): path.read_bytes()
        for path in workspace.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="one core"
)
def test_side_by_side_gives_the_same_bytes_and_a_failure_does_not_stop_the_others(dataset, tmp_path):
    arguments = ("--lgst.steps", "20", "--seeds", "0")
    said = start(tmp_path / "one", dataset, *arguments).communicate(timeout=PATIENCE)[0]
    driver = start(tmp_path / "two", dataset, *arguments, "--jobs", "2")
    said_by_two = driver.communicate(timeout=PATIENCE)[0]
    assert driver.returncode == 2
    assert "error: 1 of 3 failed, the others are finished; damaged, seed 0: " in said_by_two
    assert said.splitlines()[-1] == said_by_two.splitlines()[-1]
    found, expected = contents(tmp_path / "two"), contents(tmp_path / "one")
    assert found == expected and any(name.endswith("_LGST_val_score.npy") for name in found)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_every_job_save_its_progress(dataset, tmp_path, number, status):
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("the signal is ignored here")
    arguments = ("--categories", "bolts", "discs", "--lgst.steps", "100000", "--jobs", "2")
    driver = start(tmp_path, dataset, *arguments)
    deadline = time.monotonic() + PATIENCE
    while len(children := working(driver.pid)) < 2:
        assert driver.poll() is None and time.monotonic() < deadline, driver.communicate()[0]
        time.sleep(0.2)
    time.sleep(3)
    driver.send_signal(number)
    said = driver.communicate(timeout=PATIENCE)[0]
    assert driver.returncode == status and "everything finished so far is kept" in said
    assert "Traceback" not in said
    assert len(list(tmp_path.glob("ckpt/*_lgst_progress.pth"))) == 2
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def working(driver: int) -> list[int]:
    """Descendants of a process that took more than four seconds of processor time: those that train."""
    parents, seconds = {}, {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        process = int(status.parent.name)
        parents[process], seconds[process] = int(fields[1]), int(fields[11]) / os.sysconf("SC_CLK_TCK")
    # The processes are forks of one that does nothing else, so grandchildren.
    return [
        child for child, parent in parents.items() if parents.get(parent) == driver and seconds[child] > 4
    ]


def note_and_wait(name: str, folder: Path) -> None:
    (folder / name).touch()
    time.sleep(2)


def waiting_jobs(args: argparse.Namespace) -> dict[str, tasks.Task]:
    return {
        name: tasks.Task(SimpleNamespace(name=name), None, partial(note_and_wait, name, args.folder))
        for name in "abcdef"
    }


def test_no_job_begins_after_an_interruption(tmp_path, monkeypatch):
    """A pool's queue holds further jobs, which would otherwise run to their ends, hours perhaps."""

    def interrupt(bars: tasks.Bars, names: object) -> None:
        if len(list(tmp_path.iterdir())) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(tasks.Bars, "show", interrupt)
    args = argparse.Namespace(folder=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        jobs.side_by_side(args, waiting_jobs, waiting_jobs(args), 2, jobs.beginnings_of(2))
    assert len(list(tmp_path.iterdir())) == 2


def processes_beside(job: str) -> tuple[int, int]:
    """How many processes a job on a GPU draws by, and how many of 1000 it would look at pictures with."""
    return loop.drawing_workers(torch.device("cuda")), processes.share_of(1000)


def counting_jobs(args: argparse.Namespace) -> dict[str, tasks.Task]:
    return {
        name: tasks.Task(SimpleNamespace(name=name), None, partial(processes_beside, name)) for name in "abc"
    }


def test_the_processes_of_all_jobs_together_are_no_more_than_the_cores():
    available, args = processes.cores(), argparse.Namespace()
    alone = processes_beside("a")
    assert alone == (min(loop.MAX_WORKERS, available - 1), 1000)
    count = max(2, available)
    results, failures = jobs.side_by_side(
        args, counting_jobs, counting_jobs(args), count, jobs.beginnings_of(count)
    )
    assert not failures and set(results.values()) == {(0, 1000 // count)}
    assert processes_beside("a") == alone  # of this process


def test_where_all_failed_no_others_are_called_finished(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "on_this_machine", lambda *_: ({}, {"a": "no pictures", "b": "no weights"}))
    args = training_options("").parse_args(["--dataset_root", str(dataset), "--workspace", str(tmp_path)])
    with pytest.raises(UserError, match="^all failed; a: no pictures; b: no weights$"):
        jobs.run_jobs(args, lambda args: {})


def test_a_cluster_and_processes_of_this_machine_are_not_for_one_run(dataset, tmp_path):
    driver = start(tmp_path, dataset, "--jobs", "2", "--ray", "local")
    said = driver.communicate(timeout=PATIENCE)[0]
    assert driver.returncode == 2 and "--jobs is for this machine, --ray for a cluster; take one" in said
