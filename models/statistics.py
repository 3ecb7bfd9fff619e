"""Quantiles, moments and covariances, by which branches are fitted and normalised."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from models.constants import MAP_QUANTILES

FOLDS = 5
FEW_IMAGES = 50  # covariances of fewer images are shrunk, by cross-validation
SHRINKAGES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)


def quantile(values: Tensor, fraction: float) -> Tensor:
    """Linear-interpolation quantile; torch.quantile refuses more than 2^24 values, which 4,096 maps exceed."""
    ordered = values.flatten().sort().values
    position = fraction * (ordered.numel() - 1)
    below = ordered[int(position)]
    above = ordered[min(int(position) + 1, ordered.numel() - 1)]
    return torch.lerp(below, above, position - int(position))


def map_range(maps: Tensor) -> tuple[Tensor, Tensor]:
    """The `MAP_QUANTILES` of all values of validation maps, by which maps are scaled; they differ, also for constant maps."""
    start, end = (quantile(maps, fraction) for fraction in MAP_QUANTILES)
    return start, end if end > start else start + 1


def folds(count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices of training images: for each of five folds those of the others, to fit to, and its own, to judge.

    What a model was fitted to lies nearer to it than any other good image; only images held out tell how far those lie.
    Nothing for fewer than two images.
    """
    fold = np.arange(count) % FOLDS
    for number in range(min(FOLDS, count) if count > 1 else 0):
        yield np.flatnonzero(fold != number), np.flatnonzero(fold == number)


class ChannelMoments:
    """Mean and standard deviation (divisor n) of channels over all positions of all maps that are added."""

    def __init__(self) -> None:
        self.count, self._total, self._squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, maps: Tensor) -> ChannelMoments:
        """Maps (B, C, H, W)."""
        values = maps.detach().cpu().double()  # MPS has no float64
        self.count += values.numel() // values.shape[1]
        self._total = self._total + values.sum((0, 2, 3))
        self._squares = self._squares + values.square().sum((0, 2, 3))
        return self

    @property
    def mean(self) -> Tensor:
        """(C,) float64 on the CPU, like `std`."""
        return self._total / self.count

    @property
    def std(self) -> Tensor:
        return (self._squares / self.count - self.mean**2).clamp(min=0).sqrt()


def channel_covariance(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean (C,) and covariance (C, C) over all positions of (B, C, H, W) batches; float64 on the CPU."""
    count, total, products = 0, torch.zeros(()), torch.zeros(())
    for batch in batches:
        rows = batch.float().permute(0, 2, 3, 1).flatten(0, 2)
        count, total = count + len(rows), total + rows.sum(0).cpu().double()
        products = products + (rows.T @ rows).cpu().double()
    mean = total / count
    return mean, products / count - mean.outer(mean)


def sample_covariance(samples: np.ndarray) -> np.ndarray:
    """Of (n, d) samples, divisor n - 1, (d, d); zeros for a single one."""
    if len(samples) < 2:
        return np.zeros((samples.shape[1],) * 2)
    return np.cov(samples, rowvar=False).reshape(samples.shape[1], -1)


def regularised_covariance(samples: np.ndarray, added: np.ndarray) -> np.ndarray:
    """Sample covariance plus what is known besides; of few samples, shrunk towards its diagonal.

    Args:
        samples: (n, d).
        added: (d, d), positive definite.

    Returns:
        (d, d). Of fewer than `FEW_IMAGES` samples, by that of `SHRINKAGES` with which held-out samples are likeliest
        (five folds, Gaussian).
    """

    def shrunk(subset: np.ndarray, shrinkage: float) -> np.ndarray:
        covariance = sample_covariance(subset)
        return (1 - shrinkage) * covariance + shrinkage * np.diag(np.diag(covariance)) + added

    def log_likelihood(shrinkage: float) -> float:
        total = 0.0
        for others, left_out in folds(len(samples)):
            covariance = shrunk(samples[others], shrinkage)
            difference = samples[left_out] - samples[others].mean(0)
            total -= len(left_out) * np.linalg.slogdet(covariance)[1]
            total -= (difference * np.linalg.solve(covariance, difference.T).T).sum()
        return total

    if not 2 * FOLDS <= len(samples) < FEW_IMAGES:
        return shrunk(samples, 0.0 if len(samples) >= FEW_IMAGES else 1.0)
    return shrunk(samples, max(SHRINKAGES, key=log_likelihood))
