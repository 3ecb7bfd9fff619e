"""Exported models behind one interface: give them images, get scores.

A new runtime is one class with ``runtime``, ``metadata`` and ``score``, and a line in ``open_model``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from loco import files
from models.fused import from_state, metadata


class Engine(Protocol):
    runtime: str
    metadata: dict[str, Any]

    def score(self, images: np.ndarray) -> np.ndarray:
        """(B, 3, 256, 256) float32 RGB, ImageNet-normalised -> (B,) scores, higher = more anomalous."""


class TorchEngine:
    """A fused state dict, published or ours, run by PyTorch in fp32.

    Raises:
        UserError: the file is missing, damaged, or no CSAD model.
    """

    runtime = "torch"

    def __init__(self, path: Path, device: torch.device):
        state = files.read_state(path)
        self.metadata = metadata(state)
        self.device = device
        self.model = from_state(state).to(device)

    @torch.no_grad()
    def score(self, images: np.ndarray) -> np.ndarray:
        return self.model(torch.from_numpy(images).to(self.device)).cpu().numpy()


def open_model(path: Path, runtime: str, device: torch.device) -> Engine:
    """Open an exported model with its runtime."""
    return {"torch": TorchEngine}[runtime](path, device)
