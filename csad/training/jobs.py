"""Doing what a stage has to do, one job after another; `csad.cluster` does the same jobs on several machines."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from csad.cli import select
from csad.errors import UserError, disk_is_full
from csad.progress import ProgressBar
from csad.tasks import Jobs, Task, one_line, traceback_if_bug


def run_jobs(
    args: argparse.Namespace, jobs: Jobs, summarise: Callable[[dict[str, Any]], None] = lambda results: None
) -> None:
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
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        total = len(results) + len(failures)
        if total > 1:
            reasons = f"{len(failures)} of {total} failed, the others are finished; {reasons}"
        raise UserError(reasons)


def on_a_cluster(args: argparse.Namespace, jobs: Jobs) -> tuple[dict[str, Any], dict[str, str]]:
    """Do every job on the Ray cluster ``args.ray``; the only place at which a stage imports Ray's room."""
    from csad.cluster.remote_jobs import run

    return run(args, jobs)


def one_after_another(tasks: dict[str, Task]) -> tuple[dict[str, Any], dict[str, str]]:
    """Do every job in this process; see `csad.cluster.remote_jobs.run`."""
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
