"""The jobs of a stage as Ray tasks: each on whatever node has room, and again on another where a node dies.

A task derives its job from the driver's arguments, narrowed to its category and seed. So it does what the stage would do by
itself, and continues from the progress file on the shared workspace.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from csad.cluster.connection import Driver, connected, environment, most, node_resources
from csad.data.locks import STALE_SECONDS, FileLock, LockHeld
from csad.data.workspace import Workspace
from csad.errors import UserError, defer_interrupts
from csad.tasks import (
    Bars,
    Jobs,
    Outcome,
    Task,
    narrowed,
    outcome_of,
    path_of,
    tell_progress_in,
    wait_for_all,
)

RETRIES = 20  # of a job whose node or worker died
# For which a job waits until its predecessor, whose driver or node was lost, has ended.
TAKE_OVER_SECONDS = STALE_SECONDS + 60
SAVE_SECONDS = 30  # given to jobs that are interrupted, to save their progress
MEMORY_BYTES = 3 * 2**29  # of a job without images
COPIES = 8  # of its images, that a job may hold at once in one form or another


def run(args: argparse.Namespace, jobs: Jobs) -> tuple[dict[str, Any], dict[str, str]]:
    """Do all jobs on the Ray cluster ``args.ray``; the caller holds the workspace's lock.

    Returns:
        What finished jobs returned, and why the others failed, by name; jobs that others wait for are not named.

    Raises:
        UserError: no cluster, or the disk is full, which ends the whole run.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the jobs have saved their progress.
    """
    import torch

    tasks = jobs(argparse.Namespace(**vars(args) | {"device": "cpu"}))  # here they are only named
    waited_for = {name for task in tasks.values() for name in task.after}
    threads = torch.get_num_threads()
    with connected(args.ray, Workspace(args.workspace).driver_files) as (ray, driver):
        remote, always = ray.remote(perform), {"max_retries": RETRIES, "runtime_env": environment(threads)}
        started: dict[str, Any] = {}
        for name, task in tasks.items():
            before = [started[predecessor] for predecessor in task.after]
            options = always | resources(ray, task, args, threads)
            started[name] = remote.options(**options).remote(
                jobs, narrowed(args, task), name, driver, *before
            )
        running = {reference: name for name, reference in started.items()}
        try:
            with defer_interrupts() as interrupted, Bars(driver.folder, len(tasks)) as bars:

                def wait(references: list[Any]) -> Iterator[tuple[Any, Outcome]]:
                    if interrupted():
                        raise KeyboardInterrupt
                    done, _ = ray.wait(references, timeout=1)
                    return ((reference, _outcome(ray, reference)) for reference in done)

                return wait_for_all(running, wait, bars, waited_for)
        except BaseException:
            for reference in running:
                ray.cancel(reference)
            if running:
                ray.wait(list(running), num_returns=len(running), timeout=SAVE_SECONDS)
            raise


def _outcome(ray: ModuleType, reference: Any) -> Outcome:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as problem:
        return Outcome(
            failure=f"its worker died more than {RETRIES} times, or was stopped ({str(problem).splitlines()[0]})"
        )


def resources(ray: ModuleType, task: Task, args: argparse.Namespace, threads: int) -> dict[str, float]:
    """What a job needs: as many CPUs as it has threads, a GPU where there are any, memory for its images."""
    nodes = node_resources(ray)
    on_gpu = not args.device.startswith("cpu") and any(node.get("GPU", 0) >= 1 for node in nodes)
    category = task.category
    images = task.images or len(category.train) + len(category.validation) + len(category.test_images)
    side = int(getattr(args, "images.size", None) or 512)
    return {
        "num_cpus": most(nodes, "CPU", 1 if on_gpu else threads),
        "num_gpus": int(on_gpu),
        "memory": int(most(nodes, "memory", MEMORY_BYTES + COPIES * images * 3 * side**2)),
    }


def perform(jobs: Jobs, args: argparse.Namespace, name: str, driver: Driver, *before: Outcome) -> Outcome:
    """Do one job on a node.

    Its lock makes sure that its files have one writer, also where the node of an earlier attempt is cut off, but alive.
    """
    for outcome in before:
        if outcome.failure or outcome.result is False:
            return outcome._replace(printed="")

    def do() -> Any:
        driver.enter()
        path = path_of(driver.folder, name)
        try:
            lock = FileLock(path.with_suffix(".lock")).acquire(TAKE_OVER_SECONDS)
        except LockHeld as problem:
            raise UserError(
                f"an earlier attempt is still at work ({problem.owner}) on a node that was lost; end it, and run "
                "the same command again"
            ) from problem
        with lock:
            tell_progress_in(path.with_suffix(".bar"))
            return jobs(args)[name].do()

    return outcome_of(do)
