"""What an image shows apart from its light."""

from __future__ import annotations

import torch
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DARK = 0.05  # added to colours (0..1) before the logarithm, so that noise in the dark is not blown up


class LogColours(nn.Module):
    """Logarithms of the colours, less their mean over the image.

    The strength and the colour of the light are factors of a photograph: a constant in its logarithms, gone with the mean.
    """

    def __init__(self) -> None:
        super().__init__()
        # Not persistent: state dicts keep the published keys.
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) RGB, ImageNet-normalised -> (B, 3, H, W), mean 0 in every image and channel."""
        logarithms = (images * self.std + self.mean + DARK).clamp(min=DARK / 2).log()
        return logarithms - logarithms.mean((2, 3), keepdim=True)
