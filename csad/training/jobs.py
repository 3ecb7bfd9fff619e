"""Doing what a stage has to do, one job after another or side by side; `csad.cluster` does the same jobs on several machines.

Many steps are too small to keep several cores busy: two categories side by side on two cores take from half (stage 2) to nine
tenths (stage 4) of the time that they take one after the other.
"""

from __future__ import annotations

import argparse
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from csad.cli import select
from csad.errors import UserError, disk_is_full, sigterm_as_interrupt
from csad.processes import MAX_PROCESSES, end_with_parent, inherited_by_children, share_cores
from csad.progress import ProgressBar
from csad.tasks import (
    Bars,
    Jobs,
    Outcome,
    Task,
    narrowed,
    one_line,
    outcome_of,
    path_of,
    tell_progress_in,
    traceback_if_bug,
    wait_for_all,
)

if TYPE_CHECKING:  # some systems have none, and need none without --jobs
    from multiprocessing.synchronize import Event

_stopping: Event  # of a process of the pool: whether jobs that wait in its queue are not to begin any more


def run_jobs(
    args: argparse.Namespace, jobs: Jobs, summarise: Callable[[dict[str, Any]], None] = lambda results: None
) -> None:
    """Hold the workspace and do every job, here or on a Ray cluster; one that fails does not stop the others.

    Args:
        summarise: is told what finished jobs returned, by their names.

    Raises:
        UserError: another run holds the workspace; or some jobs failed: names them, with their reasons. A single job's own
            error comes through as it is.
        OSError: the disk is full, which ends the whole run.
    """
    workspace = select(args).workspace
    if args.ray and args.jobs > 1:
        raise UserError("--jobs is for this machine, --ray for a cluster; take one of them")
    if args.dry_run:
        print("\n".join(jobs(args)))
        return
    with workspace.lock_with(workspace.of_seeds(getattr(args, "seeds", None)).values()):
        results, failures = on_a_cluster(args, jobs) if args.ray else on_this_machine(args, jobs)
        summarise(results)
    if failures:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        total = len(results) + len(failures)
        if total > 1:
            count = f"{len(failures)} of {total} failed, the others are finished" if results else "all failed"
            reasons = f"{count}; {reasons}"
        raise UserError(reasons)


def on_a_cluster(args: argparse.Namespace, jobs: Jobs) -> tuple[dict[str, Any], dict[str, str]]:
    """Do every job on the Ray cluster ``args.ray``; the only place at which a stage imports Ray's room."""
    from csad.cluster.remote_jobs import run

    return run(args, jobs)


def on_this_machine(args: argparse.Namespace, jobs: Jobs) -> tuple[dict[str, Any], dict[str, str]]:
    """Do every job, ``args.jobs`` at a time; see `csad.cluster.remote_jobs.run`."""
    count = args.jobs
    if count > 1:
        names = jobs(argparse.Namespace(**vars(args) | {"dry_run": True}))
        count = min(count, len(names), MAX_PROCESSES)
    if count < 2:
        return one_after_another(jobs(args))
    context = beginnings_of(count)  # first, so that it imports while this process prepares the jobs
    return side_by_side(args, jobs, jobs(args), count, context)


def one_after_another(tasks: dict[str, Task]) -> tuple[dict[str, Any], dict[str, str]]:
    """Do every job in this process."""
    results, failures = {}, {}
    for name, task in tasks.items():
        try:
            results[name] = task.do()
        except Exception as problem:
            if disk_is_full(problem) or len(tasks) == 1:
                raise
            failures[name] = one_line(problem)
            ProgressBar.write(f"{traceback_if_bug(problem)}{name} failed: {failures[name]}", file=sys.stderr)
    return results, failures


def beginnings_of(count: int) -> BaseContext:
    """How ``count`` processes begin. On Linux as forks of one that imports what takes longest, once, while this one still
    prepares the jobs: that one runs no threads, so unlike a fork of this process its forks do not hang."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "timm"])
    with inherited_by_children(count):
        forkserver.ensure_running()
    return context


def side_by_side(
    args: argparse.Namespace, jobs: Jobs, tasks: dict[str, Task], count: int, context: BaseContext
) -> tuple[dict[str, Any], dict[str, str]]:
    """Do ``count`` jobs at a time, each in a process of its own with its share of the cores.

    As on a cluster, a process derives its job from the arguments, narrowed to its category and seed.
    """

    def wait_for(running: list[Future[Outcome]]) -> Iterator[tuple[Future[Outcome], Outcome]]:
        return ((future, future.result()) for future in wait(running, 1, FIRST_COMPLETED).done)

    with (
        TemporaryDirectory() as folder,
        processes(count, context) as pool,
        Bars(Path(folder), len(tasks)) as bars,
    ):
        with inherited_by_children(count):
            running = {
                pool.submit(perform, jobs, narrowed(args, task), name, Path(folder)): name
                for name, task in tasks.items()
            }
        return wait_for_all(running, wait_for, bars)


@contextmanager
def processes(count: int, context: BaseContext) -> Iterator[ProcessPoolExecutor]:
    """A pool whose jobs save their progress where this process is interrupted, and of which none begins after that; a second
    Ctrl-C ends them at once."""
    stopping = context.Event()
    pool = ProcessPoolExecutor(count, context, begin, (stopping, count))
    try:
        yield pool
    except BrokenProcessPool as problem:
        raise UserError(
            "one of the processes was killed, as systems do where memory runs out; what is finished is kept, so run the same "
            "command again, with fewer --jobs"
        ) from problem
    except BaseException:
        # The pool hands out more jobs than it has processes, and takes none of these back.
        stopping.set()
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        try:
            pool.shutdown(cancel_futures=True)
        except KeyboardInterrupt:
            for child in multiprocessing.active_children():
                child.kill()
            raise


def begin(stopping: Event, count: int) -> None:
    """Prepare one of ``count`` processes: Ctrl-C reaches all of a terminal, for their parent to hand on."""
    global _stopping
    _stopping = stopping
    share_cores(count)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def perform(jobs: Jobs, args: argparse.Namespace, name: str, folder: Path) -> Outcome:
    """Do one job in a process of the pool; KeyboardInterrupt where it was interrupted, or any other one before it began."""
    if _stopping.is_set():
        raise KeyboardInterrupt
    tell_progress_in(path_of(folder, name).with_suffix(".bar"))
    try:
        with sigterm_as_interrupt():
            return outcome_of(lambda: jobs(args)[name].do())
    except KeyboardInterrupt:
        _stopping.set()  # where a process was killed the pool itself ends the others, before their parent hears of it
        raise
