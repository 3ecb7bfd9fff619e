"""What a stage has to do, job by job, for whatever does it: one process (csad.training.jobs) or a cluster (csad.cluster)."""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from csad.data import layouts
from csad.errors import user_message


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
