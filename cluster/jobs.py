"""The jobs of a stage as Ray tasks: each category and seed on whatever node has room, again on another where a node dies.

A task runs the same function of the same script with the driver's arguments, narrowed to its category and seed, so it does what
the stage would do by itself, and goes on from the progress file on the shared workspace.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import io
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from tqdm import tqdm

from cluster.connection import Driver, connected, environment, most, node_resources, say
from data import layouts
from data.workspace import Workspace
from errors import UserError, disk_is_full, in_a_sentence

RETRIES = 20  # of a job whose node or worker died
TAKE_OVER_SECONDS = 120  # for which a job waits until its predecessor, whose driver or node was lost, has ended
SAVE_SECONDS = 30  # given to jobs that are interrupted, to save their progress
MEMORY_BYTES = 3 * 2**29  # of a job without images
COPIES = 8  # of the images, that a job may hold at once in one form or another
SHOWN = 20  # bars at a time


class Task(NamedTuple):
    """One job: ``do`` does it in this process; ``seed`` is None where the command line names no several."""

    category: layouts.Category
    seed: int | None
    do: Callable[[], Any]


Jobs = Callable[[argparse.Namespace], dict[str, Task]]


class Outcome(NamedTuple):
    """What came of a job: what it printed and returned, or why it failed."""

    said: str = ""
    result: Any = None
    failure: str | None = None
    disk_full: bool = False


def run(args: argparse.Namespace, jobs: Jobs, quiet: bool = False) -> tuple[dict[str, Any], dict[str, str]]:
    """Do all jobs on the Ray cluster ``args.ray``; the caller holds the workspace's lock.

    Args:
        jobs: a function of a script's module, which tells the jobs of given arguments by name.
        quiet: do not print what they print.

    Returns:
        What finished jobs returned, and why the others failed, by name.

    Raises:
        UserError: no cluster, or the disk is full, which ends the whole run.
        KeyboardInterrupt: after the jobs have saved their progress.
    """
    import torch

    tasks = jobs(argparse.Namespace(**vars(args) | {"device": "cpu"}))  # here they are only named
    script, threads = Path(inspect.getfile(jobs)).stem, torch.get_num_threads()
    results: dict[str, Any] = {}
    failures: dict[str, str] = {}
    with connected(args.ray, Workspace(args.workspace).driver_files) as (ray, driver):
        remote, running = ray.remote(perform), {}
        for name, task in tasks.items():
            narrowed = argparse.Namespace(**vars(args) | {"ray": None, "categories": [task.category.name]} | (
                {} if task.seed is None else {"seeds": [task.seed]}))
            options = resources(ray, task, args, threads)
            running[remote.options(max_retries=RETRIES, runtime_env=environment(threads), **options).remote(
                script, jobs.__name__, narrowed, name, driver)] = name
        try:
            with Bars(driver.folder, len(tasks)) as bars:
                while running:
                    done, _ = ray.wait(list(running), timeout=1)
                    for one in done:
                        name, outcome = running.pop(one), _outcome(ray, one)
                        if outcome.disk_full:
                            raise UserError(outcome.failure)
                        if outcome.failure is None:
                            results[name] = outcome.result
                        else:
                            failures[name] = outcome.failure
                        bars.finished("" if quiet else outcome.said)
                    bars.show(running.values())
        except (KeyboardInterrupt, UserError):
            for one in running:
                ray.cancel(one)
            if running:
                ray.wait(list(running), num_returns=len(running), timeout=SAVE_SECONDS)
            raise
    return results, failures


def _outcome(ray: ModuleType, reference: Any) -> Outcome:
    try:
        return Outcome(*ray.get(reference))
    except ray.exceptions.RayError as problem:
        return Outcome(failure=f"its worker died more than {RETRIES} times, or was stopped ({str(problem).splitlines()[0]})")


def resources(ray: ModuleType, task: Task, args: argparse.Namespace, threads: int) -> dict[str, float]:
    """What a job needs: as many CPUs as it has threads, a GPU where there are any, memory for its images."""
    nodes = node_resources(ray)
    on_gpu = not args.device.startswith("cpu") and any(node.get("GPU", 0) >= 1 for node in nodes)
    images = len(task.category.train) + len(task.category.validation) + len(task.category.test_images)
    side = getattr(args, "images.size", None) or 512
    return {"num_cpus": most(nodes, "CPU", 1 if on_gpu else threads), "num_gpus": int(on_gpu),
            "memory": int(most(nodes, "memory", MEMORY_BYTES + COPIES * images * 3 * int(side)**2))}


def perform(script: str, function: str, args: argparse.Namespace, name: str, driver: Driver) -> tuple:
    """Do one job on a node; returns an `Outcome` as a plain tuple.

    Its lock makes sure that its files have one writer, also where the node of an earlier attempt is cut off, but alive.
    """
    said = io.StringIO()
    with redirect_stdout(said):
        try:
            driver.enter()
            place = place_of(driver.folder, name)
            lock = FileLock(place.with_suffix(".lock"))
            try:
                lock.acquire(timeout=TAKE_OVER_SECONDS)
            except Timeout as problem:
                raise UserError("an earlier attempt is still at work on a node that was lost; end it, and run the same command "
                                "again") from problem
            with lock:
                tell_progress_in(place.with_suffix(".bar"))
                result = getattr(importlib.import_module(script), function)(args)[name].do()
            return Outcome(said.getvalue(), result)
        except Exception as problem:
            return Outcome(said.getvalue() + told_if_ours(problem), None, reason(problem), disk_is_full(problem))


def reason(problem: Exception) -> str:
    """Why a job failed, on one line."""
    return in_a_sentence(problem) or f"{type(problem).__name__}: {problem}".splitlines()[0]


def told_if_ours(problem: Exception) -> str:
    """The traceback of a programming error; nothing where a sentence tells all."""
    return "" if in_a_sentence(problem) else "".join(traceback.format_exception(problem))


def place_of(folder: Path, name: str) -> Path:
    return folder / hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:16]


def tell_progress_in(path: Path) -> None:
    """From now on this process's progress bars are lines in a file, which the driver reads, written once a second."""
    last = 0.0

    def display(bar: tqdm, msg: str | None = None, pos: int | None = None) -> None:
        nonlocal last
        if time.monotonic() - last > 1:
            last = time.monotonic()
            path.write_text(str(bar), encoding="utf-8", errors="backslashreplace")

    tqdm.display = display


class Bars:
    """One bar for all jobs and, in a terminal, the bar of each that runs."""

    def __init__(self, folder: Path, total: int):
        self.folder = folder
        self.all = tqdm(total=total, desc="jobs", unit="job")
        self.lines = [tqdm(bar_format="{desc}", position=index + 1, leave=False) for index in range(
            min(SHOWN, total) if sys.stderr.isatty() else 0)]

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_) -> None:
        for line in (*self.lines, self.all):
            line.close()

    def finished(self, said: str) -> None:
        if said:
            self.all.clear()
            say(said)
        self.all.update()

    def show(self, names: Iterable[str]) -> None:
        if not self.lines:
            return
        places = [place_of(self.folder, name).with_suffix(".bar") for name in names]
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in places if path.exists()]
        for line, text in zip(self.lines, texts + [""] * len(self.lines)):
            line.set_description_str(text[:line.ncols or 100])
