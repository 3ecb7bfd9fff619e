"""What training keeps on the device, and how it gets there."""

from __future__ import annotations

import torch
from torch import Tensor

CACHE_BYTES = 4 * 2**30  # the largest LOCO category needs 0.9 GB for the teacher, 1.8 GB for the segmentor (fp32, paper widths)


def cache_room(device: torch.device) -> int:
    """Bytes that features kept on the device may take."""
    if device.type == "cuda":
        return min(CACHE_BYTES, torch.cuda.mem_get_info(device)[0] // 2)
    return CACHE_BYTES


def send(part: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for it: only pinned memory can be copied while a GPU computes."""
    return part.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else part.to(device)
