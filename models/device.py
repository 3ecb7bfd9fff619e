"""Where the networks run."""

from __future__ import annotations

import torch

from errors import UserError


def choose_device(name: str) -> torch.device:
    """Turn ``--device`` into a device: auto takes CUDA, then Apple's MPS, then the CPU.

    Raises:
        UserError: the name means nothing to PyTorch, or this machine has no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as problem:
        raise UserError(f"device '{name}' is not to be had here ({str(problem).splitlines()[0]}); use --device auto") from problem
    return device


def all_devices(name: str) -> list[torch.device]:
    """Where trainings may run side by side: every GPU of this machine for auto and cuda, else the one device named."""
    chosen = choose_device(name)
    if chosen.type == "cuda" and chosen.index is None:
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [chosen]
