"""Exported models behind one interface: give them images, get scores.

A new runtime is one class with ``runtime``, ``metadata`` and ``score``, and a line in ``open_model``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from loco import files
from models.fused import from_state, metadata


class Findings(NamedTuple):
    score: np.ndarray
    lgst_score: np.ndarray
    patch_histogram_score: np.ndarray
    anomaly_map: np.ndarray
    label_map: np.ndarray


class Engine(Protocol):
    runtime: str
    metadata: dict[str, Any]

    def score(self, images: np.ndarray) -> np.ndarray:
        """(B, 3, 256, 256) float32 RGB, ImageNet-normalised -> (B,) scores, higher = more anomalous."""


class TorchEngine:
    runtime = "torch"
    precision = "fp32"

    def __init__(self, path: Path, device: torch.device):
        state = files.read_state(path)
        self.metadata = metadata(state)
        self.device = device
        self.model = from_state(state).to(device)

    @torch.no_grad()
    def score(self, images: np.ndarray) -> np.ndarray:
        return self.model(torch.from_numpy(images).to(self.device)).cpu().numpy()

    @torch.no_grad()
    def findings(self, images: np.ndarray) -> Findings:
        m = self.model
        f = m.analyse(torch.from_numpy(images).to(self.device))
        lgst = (f.lgst_score - m.lgst_mean) / m.lgst_std
        maps = torch.nn.functional.interpolate(f.anomaly_map[:, None], size=(256, 256), mode="bilinear")[:, 0]
        return Findings(f.score.numpy(), lgst.numpy(), (f.score - lgst).numpy(), maps.numpy(), f.label_map.byte().numpy())


def open_model(path: Path, runtime=None, device: torch.device = torch.device("cpu")) -> Engine:  # noqa: B008
    return TorchEngine(path, device)
