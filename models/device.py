"""Where the networks run, and what numbers they are trained with."""

from __future__ import annotations

import ctypes
import os
import sys

from csad.errors import UserError

import torch
from torch import Tensor

# Of features kept during training; the largest LOCO category needs 1.8 GB at the paper's sizes.
CACHE_BYTES = 4 * 2**30
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


def choose_device(name: str) -> torch.device:
    """Turn ``--device`` into a device: auto takes CUDA, then Apple's MPS, then the CPU, for which memory is
    kept; UserError if the name means nothing to PyTorch, this machine has no such device, or nothing can be
    computed on it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("only cpu, cuda and mps are supported")
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
        raise UserError(
            f"device '{name}' is not available ({str(problem).splitlines()[0]}); use --device auto"
        ) from problem
    if device.type == "cpu":
        keep_freed_memory()
    return device


def choose_training_device(name: str) -> torch.device:
    """As `choose_device`, for what is kept: on CUDA, PyTorch is told to take deterministic kernels where it has them.

    For the few operations that have none it warns, and results may differ in the last digits.
    """
    # Before anything is computed: cuBLAS looks once, when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = choose_device(name)
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    return device


def keep_freed_memory() -> None:
    """Let the C library keep the memory of freed tensors for the next ones, where it is glibc; for this process, from now on.

    By default it gives large blocks back to the system at once, and every layer of every batch pays again for having
    its pages handed out one by one and zeroed: an encoder at 512 pixels then takes three times as long.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def choose_precision(name: str, device: torch.device) -> str:
    """Turn ``--precision`` into bf16, tf32 or fp32: auto takes bf16 where the device multiplies it faster than fp32.

    Weights, losses and optimizer stay fp32 in any case; bf16 or TF32 is what convolutions multiply in during training. Where
    it is fp32, products on CUDA are plain fp32 from now on (`forbid_tf32`). Elsewhere TF32 is fp32.

    Raises:
        UserError: bf16 on a GPU that has none.
    """
    if name == "tf32":
        torch.backends.cudnn.allow_tf32 = True
        return name if device.type == "cuda" else "fp32"
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if name == "bf16" and not has_bf16:
            raise UserError(f"{torch.cuda.get_device_name(device)} has no bf16; use --precision fp32")
    elif device.type == "cpu":
        # Other CPUs emulate it, which is slower than fp32.
        has_bf16 = any(
            getattr(torch.cpu, test, lambda: False)()
            for test in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        )
    else:
        has_bf16 = False
    precision = ("bf16" if has_bf16 else "fp32") if name == "auto" else name
    if precision == "fp32":
        forbid_tf32()
    return precision


def forbid_tf32() -> None:
    """Let fp32 products on CUDA keep all 24 bits of their factors; for this process, from now on.

    By default PyTorch lets cuDNN round the factors of convolutions to 11 bits.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A context in which convolutions multiply in that precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def memory_format(precision: str) -> torch.memory_format:
    """Channels last suits bf16 kernels; fp32 ones keep PyTorch's own order, and with it the order of random draws."""
    return torch.channels_last if precision == "bf16" else torch.contiguous_format


def send(part: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for it: only pinned memory can be copied while a GPU computes."""
    return part.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else part.to(device)


def describe_device(device: torch.device, precision: str) -> dict[str, str]:
    """What really ran, for records: the device's name, the precision, and whether fp32 products may be TF32."""
    if device.type != "cuda":
        return {"device": device.type, "precision": precision}
    tf32 = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    stored = "fp32" if precision == "tf32" else precision
    return {
        "device": torch.cuda.get_device_name(device),
        "precision": f"{stored}, TF32 allowed" if tf32 else stored,
    }
