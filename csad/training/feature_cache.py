"""What a frozen network makes of images that never change, computed once and kept on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from csad.progress import ProgressBar

import torch
from torch import Tensor

from models.device import CACHE_BYTES

BATCH = 8


class FeatureCache:
    """Features of images, kept where there is room for them, else computed whenever they are asked for.

    Args:
        compute: images (B, 3, H, W) uint8 RGB -> tuple of tensors (B, ...).
        images: (N, 3, H, W) uint8, on the device.
        indices: (n,) int64, of the images whose features are asked for.
        description: of the progress bar.
    """

    def __init__(
        self,
        compute: Callable[[Tensor], tuple[Tensor, ...]],
        images: Tensor,
        indices: Tensor,
        description: str,
    ):
        self.compute, self.description = torch.no_grad()(compute), description
        self.images, self.indices = images, indices
        self._kept: tuple[Tensor, ...] | None = None
        sample = self.compute(images[indices[:1]])
        if len(indices) * sum(maps.nbytes for maps in sample) > CACHE_BYTES:
            return
        cached = tuple(maps.new_empty(len(indices), *maps.shape[1:]) for maps in sample)
        rows = torch.arange(len(indices), device=images.device)
        for few, maps_of_batch in zip(rows.split(BATCH), self._computed()):
            for space, maps in zip(cached, maps_of_batch):
                space[few] = maps
        self._kept = cached
        self._row = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        self._row[indices] = rows

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, ...]:
        """Features of some of the images, by their indices (B,)."""
        if self._kept is None:
            return self.compute(self.images[indices])
        rows = self._row[indices]
        return tuple(maps[rows] for maps in self._kept)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Features of all images, batch by batch, in order."""
        return self._computed() if self._kept is None else zip(*(maps.split(BATCH) for maps in self._kept))

    def _computed(self) -> Iterator[tuple[Tensor, ...]]:
        for batch in ProgressBar(self.indices.split(BATCH), desc=self.description, leave=False):
            yield self.compute(self.images[batch])
