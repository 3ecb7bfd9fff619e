"""The component segmentor, a DeepLabV3+ style head over the frozen encoder, and its losses (paper section 3.2, docs/method.md
section 2).

Module names follow the published checkpoints, so that their state dicts load as they are. Of the losses, throughout: logits
(B, C, H, W); probabilities their softmax over C; target (B, H, W) int64, values 0..C-1. Every loss is a scalar, unweighted.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbone import resize

ASPP_RATES = (6, 12, 18)
REDUCED_SHARE = 3 / 16  # of the width: what is left of the encoder's first map (48 of 256)
SMOOTH = 1e-5  # keeps logarithms and divisions finite, everywhere below


class ConvBnRelu(nn.Module):
    """Convolution without bias, batch norm, ReLU; padding keeps the size. (B, inputs, H, W) -> (B, outputs, H, W)."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, rate: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, padding=rate * (kernel // 2), dilation=rate, bias=False
        )
        self.bn = nn.BatchNorm2d(outputs, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


class ImagePool(nn.Module):
    """What the whole image says, at every position: mean over space, 1x1 convolution, spread out again."""

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

    def __init__(self, encoder_channels: tuple[int, ...], width: int, classes: int, output_size: int = 256):
        super().__init__()
        shallow, _, deep = encoder_channels
        reduced = round(width * REDUCED_SHARE)
        self.output_size = output_size
        self.aspp = ASPP(deep, width)
        self.reduce = ConvBnRelu(shallow, reduced)
        self.fc1 = ConvBnRelu((len(ASPP_RATES) + 2) * width, width)
        self.fc2 = nn.Sequential(
            OrderedDict(
                conv1=ConvBnRelu(width + reduced, width, kernel=3),
                conv2=ConvBnRelu(width, width, kernel=3),
                conv3=nn.Conv2d(width, classes, 1),
            )
        )

    def forward(self, features: tuple[Tensor, Tensor | None, Tensor]) -> Tensor:
        """(B, *, H/4, W/4), (B, *, H/8, W/8) or None (unused), (B, *, H/16, W/16) -> logits (B, classes, *output_size)."""
        shallow, _, deep = features
        context = resize(self.fc1(self.aspp(deep)), shallow.shape[-2:])
        logits = self.fc2(torch.cat([context, self.reduce(shallow)], dim=1))
        return resize(logits, (self.output_size, self.output_size))


def cross_entropy(logits: Tensor, target: Tensor, softmax_twice: bool) -> Tensor:
    """Cross-entropy, mean over pixels and images; as published, it takes the probabilities for logits."""
    return F.cross_entropy(logits.softmax(1) if softmax_twice else logits, target)


def focal_loss(probabilities: Tensor, target: Tensor) -> Tensor:
    """Mean of -(1 - q)^2 log q, q = probability of the (slightly smoothed) target."""
    classes = probabilities.shape[1]
    # sum over classes of t p, with t clamped to [low, high]: the target's own class gets high, all others low
    low, high = SMOOTH / (classes - 1), 1 - SMOOTH
    own = probabilities.gather(1, target[:, None]).squeeze(1)
    q = low * (probabilities.sum(1) - own) + high * own + SMOOTH
    return -((1 - q).square() * q.log()).mean()


def balanced_dice_loss(probabilities: Tensor, target: Tensor) -> Tensor:
    """Dice loss whose class weights are inverse to the classes' pixels in the batch.

    Classes absent from the batch weigh nothing; the published code gives them nearly all the weight.
    """
    classes = probabilities.shape[1]
    one_hot = F.one_hot(target, classes).movedim(-1, 1).to(probabilities.dtype)
    pixels = one_hot.sum((0, 2, 3))
    weights = torch.where(pixels > 0, 1 / (pixels + SMOOTH), 0)
    weights = weights / weights.sum()
    overlap = (probabilities * one_hot).sum((2, 3))
    size = probabilities.sum((2, 3)) + one_hot.sum((2, 3))
    dice = (2 * overlap + SMOOTH) / (size + 2 * SMOOTH)
    return (weights * (1 - dice)).mean()


def histogram_loss(probabilities: Tensor, target: Tensor) -> Tensor:
    """Sum over the components of the difference in area fraction, averaged over images; background left out.

    Args:
        target: label maps of other images, with which `probabilities` only share the amount of each component.
    """
    classes = probabilities.shape[1]
    expected = F.one_hot(target, classes).to(probabilities.dtype).mean((1, 2))
    return (expected - probabilities.mean((2, 3)))[:, 1:].abs().sum(1).mean()


def entropy_loss(probabilities: Tensor) -> Tensor:
    """Mean over images, classes and pixels of -p log p: low where the segmentor has made up its mind."""
    return -(probabilities * (probabilities + SMOOTH).log()).mean()


def losses(
    logits: Tensor, target: Tensor, unlabelled: Tensor, reference_labels: Tensor, weights: Any
) -> dict[str, Tensor]:
    """The losses of one step, weighted, to be added up.

    Args:
        logits, target: of the trusted images.
        unlabelled: logits of the unlabelled images.
        reference_labels: label maps of random trusted images, as many as unlabelled ones; (0, H, W) before the
            unsupervised losses join.
        weights: the segmentor's settings: weight_ce, weight_focal, weight_dice, weight_histogram, weight_entropy, and
            softmax_twice.

    Returns:
        ce, focal and dice of the trusted images; once the unsupervised losses join, the histogram of the
        unlabelled ones, and the entropy of both.
    """
    probabilities = logits.softmax(1)
    parts = {
        "ce": weights.weight_ce * cross_entropy(logits, target, weights.softmax_twice),
        "focal": weights.weight_focal * focal_loss(probabilities, target),
        "dice": weights.weight_dice * balanced_dice_loss(probabilities, target),
    }
    if len(reference_labels):
        of_unlabelled = unlabelled.softmax(1)
        parts["histogram"] = weights.weight_histogram * histogram_loss(of_unlabelled, reference_labels)
        entropy = entropy_loss(probabilities) + entropy_loss(of_unlabelled)
        parts["entropy"] = weights.weight_entropy * entropy
    return parts
