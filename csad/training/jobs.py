"""What a stage has to do, job by job, and doing it one after another; `csad.cluster` does the same jobs on several machines."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from csad.cli import select
from csad.data import layouts
from csad.errors import UserError, disk_is_full, in_a_sentence
from csad.progress import ProgressBar


class Task(NamedTuple):
    """One job of a stage.

    Attributes:
        seed: None where the command line names no several.
        do: does it, in this process.
        images: that it holds in memory; None for all of the category.
        after: names of jobs that come first; where one fails, or returns False, this one is not done.
    """

    category: layouts.Category
    seed: int | None
    do: Callable[[], Any]
    images: int | None = None
    after: tuple[str, ...] = ()


Jobs = Callable[[argparse.Namespace], dict[str, Task]]  # a stage's jobs by name, in an order that keeps to ``after``


def run_jobs(args: argparse.Namespace, jobs: Jobs, summarise: Callable[[dict[str, Any]], None] = lambda results: None) -> None:
    """Hold the workspace and do every job, one after another or on a Ray cluster; one that fails does not stop the others.

    Args:
        summarise: is told what finished jobs returned, by their names.

    Raises:
        UserError: another run holds the workspace; or some jobs failed: names them, with their reasons. A single job's own
            error comes through as it is.
        OSError: the disk is full, which ends the whole run.
    """
    workspace = select(args).workspace
    if args.dry_run:
        print("\n".join(jobs(args)))
        return
    with workspace.lock_with(workspace.of_seeds(getattr(args, "seeds", None)).values()):
        results, failures = on_a_cluster(args, jobs) if args.ray else one_after_another(jobs(args))
        summarise(results)
    if failures:
        total, told = len(results) + len(failures), "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        raise UserError(told if total == 1 else f"{len(failures)} of {total} failed, the others are finished; {told}")


def on_a_cluster(args: argparse.Namespace, jobs: Jobs) -> tuple[dict[str, Any], dict[str, str]]:
    """Do every job on the Ray cluster ``args.ray``; the only place at which a stage imports Ray's room."""
    from csad.cluster.jobs import run

    return run(args, jobs)


def one_after_another(tasks: dict[str, Task]) -> tuple[dict[str, Any], dict[str, str]]:
    """Do every job in this process; see `csad.cluster.jobs.run`."""
    results, failures = {}, {}
    for name, task in tasks.items():
        try:
            results[name] = task.do()
        except Exception as problem:
            if disk_is_full(problem) or len(tasks) == 1:
                raise
            failures[name] = reason(problem)
            ProgressBar.write(f"{told_if_ours(problem)}{name} failed: {failures[name]}", file=sys.stderr)
    return results, failures


def reason(problem: Exception) -> str:
    """Why a job failed, on one line."""
    return in_a_sentence(problem) or f"{type(problem).__name__}: {problem}".splitlines()[0]


def told_if_ours(problem: Exception) -> str:
    """The traceback of a programming error; nothing where a sentence tells all."""
    return "" if in_a_sentence(problem) else "".join(traceback.format_exception(problem))
