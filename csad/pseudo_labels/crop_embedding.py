"""The deep component feature of docs/method.md section 1, ``cnn_image``; `components` has the others."""

from __future__ import annotations

import math

from csad.pseudo_labels.components import CROP

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbone import Encoder

PROJECTED = 512  # values of cnn_image after the published network's random projection
PROJECTION_STD = 0.01
CROPS_PER_BATCH = 256  # turned ones; on a GPU eight times as many


class CropEmbedding(nn.Module):
    """cnn_image: deepest features of an aligned crop, averaged over space and over rotations.

    Args:
        deepest: RGB in 0..255 (B, 3, 65, 65) -> a tuple with maps (B, D, h, w).
        rotations: number of equally spaced rotations from 0 on. The published code used 0 and 360 degrees both.
    """

    grids: Tensor

    def __init__(self, deepest: Encoder, rotations: int):
        super().__init__()
        self.deepest = deepest
        turns = torch.arange(rotations) * (2 * math.pi / rotations)
        self.register_buffer("grids", _rotation_grids(turns), persistent=False)

    @torch.inference_mode()
    def forward(self, crops: Tensor) -> Tensor:
        """(N, 3, 65, 65) RGB uint8 on any device -> (N, D) float32 on the module's device."""
        crops = crops.to(self.grids.device).float()
        # One batch per few crops: always cut the same way, so that a resumed run repeats the very same numbers.
        per_batch = max(CROPS_PER_BATCH * (1 if crops.device.type == "cpu" else 8) // len(self.grids), 1)
        return torch.cat([self._embed(batch) for batch in crops.split(per_batch)])

    def _embed(self, crops: Tensor) -> Tensor:
        rotations = len(self.grids)
        turned = F.grid_sample(
            crops.repeat_interleave(rotations, 0),
            self.grids.repeat(len(crops), 1, 1, 1),
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
        )
        features = self.deepest(turned)[0].mean((2, 3))
        return features.view(len(crops), rotations, features.shape[1]).mean(1)


def random_projection(values: int, seed: int) -> np.ndarray:
    """The fixed random projection behind cnn_image, (values, 512) float32, N(0, 0.01^2), without a bias."""
    return np.random.default_rng(seed).normal(0, PROJECTION_STD, (values, PROJECTED)).astype(np.float32)


def _rotation_grids(angles: Tensor) -> Tensor:
    """Sampling grids (R, 65, 65, 2) that turn a crop by each of the angles (R,) in radians."""
    cos, sin, zeros = angles.cos(), angles.sin(), torch.zeros_like(angles)
    matrices = torch.stack([torch.stack([cos, -sin, zeros], 1), torch.stack([sin, cos, zeros], 1)], 1)
    return F.affine_grid(matrices, [len(angles), 1, CROP, CROP], align_corners=False)
