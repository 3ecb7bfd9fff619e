"""What benchmarks share: their parser, what a script takes, turns, Markdown tables, and what figures were measured on."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from csad.data.listing import count
from csad.errors import UserError
from csad.export.versions import versions
from csad.progress import ProgressBar

import torch

ROOT = Path(__file__).resolve().parent.parent
# Of Linux's names; those that decide how fast networks run.
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "sve")

Value = TypeVar("Value")


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


def measured(command: Sequence[object], log: Path | None = None) -> Usage:
    """Run a command to its end; what it prints goes to the log or the terminal. UserError if it failed."""
    start = time.perf_counter()
    with open(log or os.devnull, "w", encoding="utf-8") as handle:
        output, errors = (handle, subprocess.STDOUT) if log else (None, None)
        process = subprocess.Popen([str(part) for part in command], stdout=output, stderr=errors)
        _, status, resources = os.wait4(process.pid, 0)  # of this child alone
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"{command[1]} failed" + (f"; {log} says why" if log else ""))
    return Usage(
        time.perf_counter() - start, resources.ru_utime + resources.ru_stime, resources.ru_maxrss / 1024
    )


def measured_script(
    script: str, workspace: Path, options: Sequence[object], log: Path | None = None
) -> Usage:
    """Run a script of the repository's root on a workspace; see `measured`."""
    return measured([sys.executable, ROOT / f"{script}.py", "--workspace", workspace, *options], log)


def in_turns(
    variants: Sequence[Callable[[], Value]], turns: int, name: str, warm_ups: int = 1, pause: float = 0
) -> list[list[Value]]:
    """What each variant returns in each turn: all take turns, so that other work on the machine hits all alike.

    Args:
        name: of the progress bar.
        warm_ups: turns before those that count.
        pause: seconds before each run.
    """
    values: list[list[Value]] = [[] for _ in variants]
    for turn in ProgressBar(range(-warm_ups, turns), desc=name, unit="turn", leave=False):
        for variant, of_variant in zip(variants, values):
            time.sleep(pause)
            value = variant()
            if turn >= 0:
                of_variant.append(value)
    return values


def seconds_of(run: Callable[[], object]) -> Callable[[], float]:
    """A function that says how many seconds another one takes."""

    def timed() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return timed


def markdown(head: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    """A table's lines."""
    first, *others = (f"| {' | '.join(map(str, cells))} |" for cells in (head, *rows))
    return [first, "|" + "---|" * len(head), *others]


# The machine


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, cores, instruction sets, threads, and the packages that this process runs with."""
    flags = " ".join(_cpuinfo("flags") + _cpuinfo("Features")).split()
    return {
        "cpu": (_cpuinfo("model name") or [platform.processor() or platform.machine()])[0],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "system": platform.system(),
        "packages": versions(),
    }


def machine_in_words(machine: dict[str, Any]) -> str:
    """In half a line, for people."""
    sets = f" ({', '.join(machine['instruction_sets'])})" if machine["instruction_sets"] else ""
    device = "" if machine["device"] == "cpu" else f", {machine['device']}"
    return f"{machine['cpu']}{sets}, {count(machine['cores'], 'core')}, {count(machine['threads'], 'thread')}{device}"


def _cpuinfo(field: str) -> list[str]:
    """The values of a field of Linux's /proc/cpuinfo on the first processor; empty elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    return [line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field][:1]
