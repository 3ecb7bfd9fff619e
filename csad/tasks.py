"""What a stage has to do, job by job, for whatever does it: this machine (csad.training.jobs) or a cluster (csad.cluster)."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from csad.data import layouts
from csad.data.records import digest_lines
from csad.errors import UserError, disk_is_full, user_message
from csad.progress import ProgressBar

MAX_BARS = 20  # shown at a time
Reference = TypeVar("Reference")  # to a job in another process, of this machine or of a cluster


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


# A stage's jobs by name, in an order that keeps to ``after``.
Jobs = Callable[[argparse.Namespace], dict[str, Task]]


def one_line(problem: Exception) -> str:
    """Why a job failed, on one line."""
    return user_message(problem) or f"{type(problem).__name__}: {problem}".splitlines()[0]


def traceback_if_bug(problem: Exception) -> str:
    """The traceback of a programming error; nothing where a sentence tells all."""
    return "" if user_message(problem) else "".join(traceback.format_exception(problem))


class Outcome(NamedTuple):
    """What came of a job in another process: what it printed and returned, or why it failed."""

    printed: str = ""
    result: Any = None
    failure: str | None = None
    disk_full: bool = False


def outcome_of(do: Callable[[], Any]) -> Outcome:
    """Do a job; what it prints is kept for the process that asked for it."""
    with redirect_stdout(StringIO()) as printed:
        try:
            return Outcome(result=do(), printed=printed.getvalue())
        except Exception as problem:
            return Outcome(
                printed.getvalue() + traceback_if_bug(problem), None, one_line(problem), disk_is_full(problem)
            )


def wait_for_all(
    running: dict[Reference, str],
    wait: Callable[[list[Reference]], Iterable[tuple[Reference, Outcome]]],
    bars: Bars,
    parts: Collection[str] = (),
) -> tuple[dict[str, Any], dict[str, str]]:
    """Wait for jobs in other processes, and show meanwhile how far they are.

    Args:
        running: their names; what has ended is taken out.
        wait: a second at most, and gives those that have ended.
        parts: names of jobs that others wait for, and of which nothing is told.

    Returns:
        What finished jobs returned, and why the others failed, by name.

    Raises:
        UserError: the disk is full, which ends the whole run.
    """
    names = [name for name in running.values() if name not in parts]
    outcomes: dict[str, Outcome] = {}
    while running:
        for reference, outcome in wait(list(running)):
            name = running.pop(reference)
            if outcome.failure and outcome.disk_full:
                raise UserError(outcome.failure)
            bars.finished(outcome.printed)
            if outcome.failure and name not in parts:
                ProgressBar.write(f"{name} failed: {outcome.failure}", file=sys.stderr)
            outcomes[name] = outcome
        bars.show(running.values())
    failures = {name: reason for name in names if (reason := outcomes[name].failure)}
    return {name: outcomes[name].result for name in names if name not in failures}, failures


def narrowed(args: argparse.Namespace, task: Task) -> argparse.Namespace:
    """The command line's arguments for one category and seed alone."""
    seeds = {} if task.seed is None else {"seeds": [task.seed]}
    return argparse.Namespace(**vars(args) | {"categories": [task.category.name]} | seeds)


def path_of(folder: Path, name: str) -> Path:
    """The path, but for its suffix, of a job's files in a folder."""
    return folder / digest_lines([name])


def tell_progress_in(path: Path) -> None:
    """Write this process's progress bars as lines into a file that `Bars` reads, once a second."""
    last = 0.0

    def display(bar: ProgressBar, msg: str | None = None, pos: int | None = None) -> None:
        nonlocal last
        if time.monotonic() - last > 1:
            last = time.monotonic()
            path.write_text(str(bar), encoding="utf-8", errors="backslashreplace")

    ProgressBar.display = display  # type: ignore[method-assign, assignment]  # of every bar of this process


class Bars:
    """One bar for all jobs and, in a terminal, the bar of each that runs (`tell_progress_in`)."""

    def __init__(self, folder: Path, total: int):
        self.folder = folder
        self.all = ProgressBar(total=total, desc="jobs", unit="job")
        self.lines = [
            ProgressBar(bar_format="{desc}", position=index + 1, leave=False)
            for index in range(min(MAX_BARS, total) if sys.stderr.isatty() else 0)
        ]

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_: object) -> None:
        for line in (*self.lines, self.all):
            line.close()

    def finished(self, printed: str) -> None:
        if printed:
            ProgressBar.write(printed, end="")
        self.all.update()

    def show(self, names: Iterable[str]) -> None:
        if not self.lines:
            return
        bar_files = [path_of(self.folder, name).with_suffix(".bar") for name in names]
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in bar_files if path.exists()]
        for line, text in zip(self.lines, texts + [""] * len(self.lines)):
            line.set_description_str(text[: line.ncols or 100])
