"""One piece of work for each of many pictures, in as many processes as there are cores.

Results come in the order of the pictures, and so does the first error. Where the work on a picture depends on that
picture alone, files and sentences are the same whatever the number of processes.

Processes are spawned, since a fork of a process with threads (PyTorch's, OpenMP's) may hang, and some systems have
none. They import the module in which the work is defined, not the script that runs: that would take each of them
seconds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import ModuleType
from typing import Any, TypeVar

from csad.errors import UserError
from csad.progress import ProgressBar

Item = TypeVar("Item")
Result = TypeVar("Result")
MIN_PICTURES = 8  # pictures for each process, or starting it takes longer than it saves
MAX_PROCESSES = 61 if sys.platform == "win32" else sys.maxsize  # that Windows can wait for at a time
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_work: Callable[[Any], Any]  # of a worker process
_sharers = 1  # processes that do jobs side by side, this one among them


def share_cores(count: int) -> None:
    """From now on this process is one of ``count`` that do jobs side by side."""
    global _sharers
    _sharers = count


def share_of(count: int) -> int:
    """How many of ``count`` cores or processes this process may use where others work beside it, at least 1."""
    return max(1, count // _sharers)


def cores() -> int:
    """How many cores this process may use: its share of them."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return share_of(available or 1)


def workers_option(parser: argparse.ArgumentParser | argparse._ArgumentGroup, meaning: str) -> None:
    """The option ``--workers``."""
    parser.add_argument(
        "--workers",
        type=number_of_processes,
        default=cores(),
        metavar="N",
        help=f"{meaning}; the results do not depend on it, by default one for each core",
    )


def number_of_processes(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of processes; it must be 1 or more")
    return int(text)


def map_pictures(
    work: Callable[[Item], Result], pictures: Sequence[Item], workers: int, bar: ProgressBar
) -> list[Result]:
    """``work`` for each of the pictures; its results in their order.

    Ctrl-C, an error or the end of this process lets workers finish the picture in hand, and no more.

    Args:
        work: a function of a module, or a `functools.partial` of one; it is pickled once for each process.
        workers: processes at most; of fewer than `MIN_PICTURES` pictures each there are fewer, and with one all is done here.
        bar: is moved on by one for each picture.

    Raises:
        UserError: a worker was killed. Whatever ``work`` raises for the first picture that it cannot do is raised as it is.
    """

    def counted(result: Result) -> Result:
        bar.update()
        return result

    workers = min(workers, len(pictures) // MIN_PICTURES, MAX_PROCESSES)
    if workers < 2:
        return [counted(work(picture)) for picture in pictures]
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, (work,))
    try:
        with _circumstances_of_workers():
            results = [pool.submit(_do, picture) for picture in pictures]
        return [counted(result.result()) for result in results]
    except BrokenProcessPool as problem:
        raise UserError(
            "one of the processes that work on pictures was killed, as systems do where memory runs out; finished "
            "pictures are kept, so run the same command again, with fewer --workers where it has them"
        ) from problem
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _circumstances_of_workers() -> Iterator[None]:
    """What processes that are started meanwhile inherit: one thread each, no script, and deafness to Ctrl-C."""
    script, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        with inherited_by_children(cores()):
            yield
    finally:
        sys.modules["__main__"] = script


@contextmanager
def inherited_by_children(count: int) -> Iterator[None]:
    """What ``count`` processes that are started meanwhile inherit: each its share of the cores, and deafness to Ctrl-C.

    Ctrl-C reaches all processes of a terminal, and is for their parent to handle.
    """
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, str(max(1, cores() // count))))
    signals = None
    if hasattr(signal, "pthread_sigmask"):
        from multiprocessing import resource_tracker  # of POSIX

        resource_tracker.ensure_running()  # its start, else that of the first process, would let Ctrl-C through again
        signals = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        if signals is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, signals)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _begin(work: Callable[[Any], Any]) -> None:
    """Prepare a worker."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if "cv2" in sys.modules:  # heeds no variable; a work without OpenCV needs not load it
        sys.modules["cv2"].setNumThreads(1)
    end_with_parent()


def end_with_parent() -> None:
    """End this process where its parent is killed outright: that one cannot tell its children, which would wait for ever."""

    def wait() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _do(picture: Any) -> Any:
    return _work(picture)
