"""Random draws of a training: they depend on seed, name and step alone, so a resumed run sees what it would have seen."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor


def step_generator(seed: int, name: str, step: int) -> np.random.Generator:
    """The source of all random choices of one step; ``name`` is the training's, a category for example."""
    return np.random.default_rng([*_key(seed, name), step])


def shuffled_epochs(count: int, batch_size: int, step: int, name: str, seed: int) -> Tensor:
    """Which of ``count`` images a step sees, (B,) int64: endless shuffled epochs, every image before any is seen twice."""
    drawn = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, within = divmod(position, count)
        # The 1 keeps this generator apart from those of the steps.
        drawn.append(int(np.random.default_rng([*_key(seed, name), epoch, 1]).permutation(count)[within]))
    return torch.tensor(drawn)


def _key(seed: int, name: str) -> list[int]:
    return [seed, zlib.crc32(name.encode())]
