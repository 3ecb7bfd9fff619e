"""Many trainings, one after another or side by side, one process per GPU; one that fails does not stop the others."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from multiprocessing import connection
from typing import NamedTuple

import torch
from tqdm import tqdm

from errors import UserError, disk_is_full, in_a_sentence

DISK_FULL = 3  # exit status of a process that found it so


class Running(NamedTuple):
    name: str
    process: torch.multiprocessing.Process
    reasons: connection.Connection
    line: int
    device: torch.device


def run_all(jobs: dict[str, Callable[..., None]], devices: list[torch.device]) -> None:
    """Call every job with ``device=...``; with several devices, as many at a time, each in a process of its own.

    Args:
        jobs: name -> function; to run side by side they must be picklable (a module's function, or a partial of one).

    Raises:
        OSError: the disk is full, which ends the whole run: the next job would find it so, too. From several processes it
            comes as a UserError.
        UserError: some failed; names them, with their reasons. A single job's own error comes through as it is.
        KeyboardInterrupt: Ctrl-C or SIGTERM; every job has saved its progress.
    """
    if len(jobs) == 1:
        next(iter(jobs.values()))(device=devices[0])
        return
    failures = _side_by_side(jobs, devices) if len(devices) > 1 else _one_after_another(jobs, devices[0])
    if failures:
        told = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        raise UserError(f"{len(failures)} of {len(jobs)} failed, the others are finished; {told}")


def _one_after_another(jobs: dict[str, Callable[..., None]], device: torch.device) -> dict[str, str]:
    failures = {}
    for name, job in jobs.items():
        try:
            job(device=device)
        except Exception as problem:
            if disk_is_full(problem):
                raise
            sentence = in_a_sentence(problem)
            if sentence is None:
                traceback.print_exc()
            failures[name] = sentence or _in_short(problem)
            tqdm.write(f"{name} failed: {failures[name]}", file=sys.stderr)
    return failures


def _side_by_side(jobs: dict[str, Callable[..., None]], devices: list[torch.device]) -> dict[str, str]:
    context = torch.multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    bars = context.RLock()
    waiting, free, failures = deque(jobs.items()), list(enumerate(devices)), {}
    running: dict[int, Running] = {}
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _interrupt) if in_main_thread else None
    try:
        while waiting or running:
            while waiting and free:
                (name, job), (line, device) = waiting.popleft(), free.pop(0)
                reasons, told = context.Pipe(duplex=False)
                os.environ["TQDM_POSITION"] = str(line)  # each process draws its bars on a line of its own
                process = context.Process(target=_run_one, args=(job, device, told, bars), name=name)
                process.start()
                told.close()
                running[process.sentinel] = Running(name, process, reasons, line, device)
            for sentinel in connection.wait(list(running)):
                done = running.pop(sentinel)
                done.process.join()
                free.append((done.line, done.device))
                if done.process.exitcode:
                    failures[done.name] = _reason(done)
                    if done.process.exitcode == DISK_FULL:
                        raise UserError(failures[done.name])
                    tqdm.write(f"{done.name} failed: {failures[done.name]}", file=sys.stderr)
    finally:
        for one in running.values():
            one.process.terminate()  # saves its progress
        for one in running.values():
            one.process.join()
        os.environ.pop("TQDM_POSITION", None)
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)
    return failures


def _run_one(job: Callable[..., None], device: torch.device, told: connection.Connection, bars: object) -> None:
    """What a process does: the job, and a word to the parent should it fail."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole family; the parent passes it on, once
    tqdm.set_lock(bars)
    try:
        job(device=device)
    except KeyboardInterrupt:
        sys.exit(2)
    except Exception as problem:
        sentence = in_a_sentence(problem)
        told.send(sentence or _in_short(problem))
        if sentence is None:
            raise
        sys.exit(DISK_FULL if disk_is_full(problem) else 2)


def _reason(done: Running) -> str:
    try:
        return done.reasons.recv()
    except EOFError:  # it was killed before it could say anything
        return f"its process ended with status {done.process.exitcode}"


def _in_short(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}".splitlines()[0]


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
