"""The component segmentor: a DeepLabV3+ style head over the frozen encoder (paper section 3.2, METHOD.md section 2).

Module names follow the published checkpoints, so that their state dicts load as they are.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from models.backbone import resize

ASPP_RATES = (6, 12, 18)
REDUCED_SHARE = 3 / 16  # of the width: what is left of the encoder's first map (48 of 256)


class ConvBnRelu(nn.Module):
    """Convolution without bias, batch norm, ReLU; padding keeps the size. (B, inputs, H, W) -> (B, outputs, H, W)."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, rate: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=rate * (kernel // 2), dilation=rate, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


class ImagePool(nn.Module):
    """What the whole image says, at every place: mean over space, 1x1 convolution, spread out again."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = ConvBnRelu(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.mean((2, 3), keepdim=True)).expand(-1, -1, x.shape[2], x.shape[3])


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: (B, inputs, H, W) -> (B, 5 outputs, H, W), from c0, c1, c2, c3, imagepool."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.stages = nn.ModuleDict({"c0": ConvBnRelu(inputs, outputs)})
        for number, rate in enumerate(ASPP_RATES, start=1):
            self.stages[f"c{number}"] = ConvBnRelu(inputs, outputs, kernel=3, rate=rate)
        self.stages["imagepool"] = ImagePool(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([stage(x) for stage in self.stages.values()], dim=1)


class Segmentor(nn.Module):
    """Encoder maps in, one logit per class and pixel out.

    Args:
        encoder_channels: of the encoder's maps at 1/4, 1/8 and 1/16 (Wide-ResNet-50-2: 256, 512, 1024).
        width: channels of ASPP and decoder (the paper: 256).
        classes: components and background, which is class 0.
        output_size: side of the logits in pixels.
    """

    def __init__(self, encoder_channels: tuple[int, int, int], width: int, classes: int, output_size: int = 256):
        super().__init__()
        shallow, _, deep = encoder_channels
        reduced = round(width * REDUCED_SHARE)
        self.output_size = output_size
        self.aspp = ASPP(deep, width)
        self.reduce = ConvBnRelu(shallow, reduced)
        self.fc1 = ConvBnRelu((len(ASPP_RATES) + 2) * width, width)
        self.fc2 = nn.Sequential(OrderedDict(
            conv1=ConvBnRelu(width + reduced, width, kernel=3),
            conv2=ConvBnRelu(width, width, kernel=3),
            conv3=nn.Conv2d(width, classes, 1),
        ))

    def forward(self, features: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """(B, *, H/4, W/4), (B, *, H/8, W/8) (unused), (B, *, H/16, W/16) -> logits (B, classes, *output_size)."""
        shallow, _, deep = features
        context = resize(self.fc1(self.aspp(deep)), shallow.shape[-2:])
        logits = self.fc2(torch.cat([context, self.reduce(shallow)], dim=1))
        return resize(logits, (self.output_size, self.output_size))
