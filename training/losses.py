"""The losses of the component segmentor (paper section 3.2, METHOD.md section 2).

Throughout: logits (B, C, H, W); probabilities their softmax over C; target (B, H, W) int64, values 0..C-1. Every loss
is a scalar tensor, unweighted.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SMOOTH = 1e-5  # keeps logarithms and divisions finite, everywhere below


def cross_entropy(logits: Tensor, target: Tensor, softmax_twice: bool) -> Tensor:
    """Cross-entropy, mean over pixels and images; as published, it takes the probabilities for logits."""
    return F.cross_entropy(logits.softmax(1) if softmax_twice else logits, target)


def focal(probabilities: Tensor, target: Tensor) -> Tensor:
    """Mean of -(1 - q)^2 log q, q = probability of the (slightly smoothed) target."""
    classes = probabilities.shape[1]
    # sum over classes of t p, with t clamped to [low, high]: the target's own class gets high, all others low
    low, high = SMOOTH / (classes - 1), 1 - SMOOTH
    own = probabilities.gather(1, target[:, None]).squeeze(1)
    q = low * (probabilities.sum(1) - own) + high * own + SMOOTH
    return -((1 - q).square() * q.log()).mean()


def balanced_dice(probabilities: Tensor, target: Tensor) -> Tensor:
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


def histogram(probabilities: Tensor, target: Tensor) -> Tensor:
    """Sum over the components of the difference in area fraction, averaged over images; background left out.

    Args:
        target: label maps of other images, with which `probabilities` only share the amount of each component.
    """
    classes = probabilities.shape[1]
    wanted = F.one_hot(target, classes).to(probabilities.dtype).mean((1, 2))
    found = probabilities.mean((2, 3))
    return (wanted - found)[:, 1:].abs().sum(1).mean()


def entropy(probabilities: Tensor) -> Tensor:
    """Mean over images, classes and pixels of -p log p: low where the segmentor has made up its mind."""
    return -(probabilities * (probabilities + SMOOTH).log()).mean()
