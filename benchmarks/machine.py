"""What figures were measured on: processor, cores, instruction sets, threads, versions of packages."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from csad.export.versions import versions

import torch

# Of Linux's names; those that decide how fast networks run.
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "sve")


def describe(device: str = "cpu") -> dict[str, Any]:
    """This machine, and the packages that this process runs with."""
    on_gpu = device.startswith("cuda")
    return {
        "cpu": (_cpuinfo("model name") or [platform.processor() or platform.machine()])[0],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instruction_sets": [
            name
            for name in INSTRUCTION_SETS
            if name in " ".join(_cpuinfo("flags") + _cpuinfo("Features")).split()
        ],
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if on_gpu else device,
        "system": platform.system(),
        "packages": versions(),
    }


def in_words(machine: dict[str, Any]) -> str:
    """In half a line, for people."""
    sets = f" ({', '.join(machine['instruction_sets'])})" if machine["instruction_sets"] else ""
    device = "" if machine["device"] == "cpu" else f", {machine['device']}"
    return f"{machine['cpu']}{sets}, {machine['cores']} cores, {machine['threads']} threads{device}"


def _cpuinfo(field: str) -> list[str]:
    """The values of a field of Linux's /proc/cpuinfo on the first processor; empty elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    return [line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field][:1]
