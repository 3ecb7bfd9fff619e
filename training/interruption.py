"""Ctrl-C, and the SIGTERM of a machine that shuts down, between two training steps instead of within one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interrupts_wait() -> Iterator[Callable[[], bool]]:
    """Hold back the first Ctrl-C or SIGTERM, so that a training step is either done or not begun when progress is saved.

    Yields a function that says whether one came; the loop asks it after every step. A second one ends the run at once.
    A signal that is ignored stays ignored. Outside the main thread, which alone receives signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came = False
    before = {number: signal.getsignal(number) for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: object) -> None:
        nonlocal came
        came = True
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: came
    finally:
        restore()
