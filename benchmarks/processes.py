"""What benchmarks share: their options' parser, and what a process takes: seconds, processor time, memory."""

from __future__ import annotations

import argparse
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from csad.errors import UserError


class Usage(NamedTuple):
    """Seconds by the clock and of the processor, and the most resident memory in MB."""

    seconds: float
    processor_seconds: float
    peak_mb: float


def options_of(description: str | None) -> argparse.ArgumentParser:
    """A parser that describes a benchmark by its module's docstring."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def measured(command: Sequence[object], log: Path | None = None, accepted: Sequence[int] = (0,)) -> Usage:
    """Run a command to its end.

    Args:
        log: takes what it prints; None: the terminal.
        accepted: exit statuses that are no failure.

    Raises:
        UserError: it ended with another one.
    """
    start = time.perf_counter()
    with open(log or os.devnull, "w", encoding="utf-8") as handle:
        to_log = {"stdout": handle, "stderr": subprocess.STDOUT} if log else {}
        process = subprocess.Popen([str(part) for part in command], **to_log)
        _, status, resources = os.wait4(process.pid, 0)  # of this child alone
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in accepted:
        raise UserError(f"{command[1]} failed" + (f"; {log} says why" if log else ""))
    return Usage(
        time.perf_counter() - start, resources.ru_utime + resources.ru_stime, resources.ru_maxrss / 1024
    )


def resident(pid: int | None) -> float | None:
    """Resident memory of a process in MB; None if it is not available."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    return int(status.split("VmRSS:")[1].split()[0]) / 1024 if "VmRSS:" in status else None
