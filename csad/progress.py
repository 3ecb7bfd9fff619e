"""Progress of long loops: a bar in a terminal, and in a log file a plain line now and then."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 60.0  # from one line to the next


class ProgressBar(tqdm):
    """tqdm, whose arguments it takes; where stderr is no terminal, what takes shorter than `LINE_SECONDS` says nothing."""

    def __init__(self, *arguments: Any, **options: Any):
        self.in_terminal = sys.stderr.isatty()
        self._last_line = time.monotonic()
        if not self.in_terminal:
            # tqdm's own bars and line feeds go nowhere.
            options |= {"file": io.StringIO(), "mininterval": 1.0, "ncols": 0}
        super().__init__(*arguments, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool | None:
        if self.in_terminal:
            return super().display(msg, pos)
        if msg is None and time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            print(self, file=sys.stderr, flush=True)
        return True


def batches(count: int, size: int, description: str) -> Iterator[slice]:
    """``count`` things in batches of ``size``, with a bar that goes when they are done."""
    for first in ProgressBar(range(0, count, size), desc=description, unit="batch", leave=False):
        yield slice(first, first + size)
