"""What numbers the networks are trained with: plain fp32, or bf16 inside convolutions."""

from __future__ import annotations

import torch

from errors import UserError


def choose_precision(name: str, device: torch.device) -> str:
    """Turn ``--precision`` into bf16 or fp32: auto takes bf16 where the device multiplies it faster than fp32.

    Weights, losses and optimizer stay fp32 either way; bf16 is what convolutions multiply in during training.

    Raises:
        UserError: bf16 on a GPU that has none.
    """
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if name == "bf16" and not has_bf16:
            raise UserError(f"{torch.cuda.get_device_name(device)} has no bf16; use --precision fp32")
    elif device.type == "cpu":
        # Other CPUs emulate it, which is slower than fp32.
        has_bf16 = any(getattr(torch.cpu, test, lambda: False)()
                       for test in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    else:
        has_bf16 = False
    return ("bf16" if has_bf16 else "fp32") if name == "auto" else name


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A context in which convolutions multiply in that precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def memory_format(precision: str) -> torch.memory_format:
    """Channels last suits bf16 kernels; fp32 ones keep PyTorch's own order, and with it the order of random draws."""
    return torch.channels_last if precision == "bf16" else torch.contiguous_format
