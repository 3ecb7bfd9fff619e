"""The patch memory: how far is each patch of an image from the most similar patch of good images?

PatchCore (Roth et al., CVPR 2022), docs/METHOD.md section 6; beyond the paper. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbone import resize
from models.prediction import MAP_SIZE

QUANTILES = (0.9, 0.995)  # of the validation maps, scaled to 0 and 1
SUBSET = 100_000  # patches from which rows are chosen
PROJECTED = 128  # dimensions in which rows are chosen


class PatchMemory(nn.Module):
    """Encoder maps in, distances out.

    Args:
        channels: of the maps at 1/8 and 1/16 together.
        rows: remembered patches.
        score_share: of a map's values, the largest, whose mean is the score.

    Attributes:
        scale (1, C, 1, 1): one over each channel's standard deviation on the training images.
        rows (M, C): remembered patches, scaled.
        q_start, q_end: quantiles of the validation maps.
    """

    def __init__(self, channels: int, rows: int, score_share: float):
        super().__init__()
        self.score_share = score_share
        self.register_buffer("scale", torch.ones(1, channels, 1, 1))
        self.register_buffer("rows", torch.zeros(rows, channels))
        self.register_buffer("q_start", torch.tensor(0.0))
        self.register_buffer("q_end", torch.tensor(1.0))

    def embed(self, maps: tuple[Tensor, ...]) -> Tensor:
        """Maps at 1/4 (unused), 1/8 and 1/16 -> patches (B, C, H/8, W/8): 3x3 means, side by side, scaled."""
        return patches(maps) * self.scale

    def distances(self, embedded: Tensor) -> Tensor:
        """Patches (B, C, h, w) -> Euclidean distance of each to the nearest row, (B, h, w)."""
        # |x - r|^2 = |x|^2 + (|r|^2 - 2 x r): a 1x1 convolution and a minimum, which every runtime is good at.
        apart = F.conv2d(embedded, -2 * self.rows[:, :, None, None], self.rows.square().sum(1))
        return (apart.amin(1) + embedded.square().sum(1)).clamp(min=0).sqrt()

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        """The encoder's maps -> anomaly map (B, h, w), not scaled."""
        return self.distances(self.embed(maps))

    def score(self, anomaly_map: Tensor) -> Tensor:
        """Mean of the largest values of each map (B, h, w), (B,)."""
        values = anomaly_map.flatten(1)
        count = max(round(self.score_share * int(values.shape[1])), 1)
        return values.topk(count, sorted=False).values.mean(1)

    def scaled(self, anomaly_map: Tensor) -> Tensor:
        """(B, h, w) -> (B, 64, 64), comparable between images and branches."""
        return resize(((anomaly_map - self.q_start) / (self.q_end - self.q_start))[:, None], (MAP_SIZE, MAP_SIZE))[:, 0]

    def fit_map_normalisation(self, validation: Tensor) -> None:
        """Set the quantiles from the maps of all validation images (N, h, w)."""
        ordered = validation.flatten().sort().values
        start, end = (ordered[round(fraction * (len(ordered) - 1))] for fraction in QUANTILES)
        self.q_start.copy_(start)
        self.q_end.copy_(end if end > start else start + 1)


def patches(maps: tuple[Tensor, ...]) -> Tensor:
    """The encoder's maps -> 3x3 means at 1/8 and 1/16, side by side on the finer grid, (B, C, H/8, W/8)."""
    eighth, sixteenth = (F.avg_pool2d(one, 3, stride=1, padding=1, count_include_pad=False) for one in maps[1:])
    return torch.cat([eighth, resize(sixteenth, eighth.shape[-2:])], 1)


def greedy_k_centre(candidates: Tensor, count: int, generator: torch.Generator,
                    progress: Callable[[Iterable[int]], Iterable[int]] = iter) -> Tensor:
    """Choose rows such that no candidate is far from the nearest one: each next one is the farthest so far.

    Args:
        candidates: (N, D).
        count: how many to choose, at most N.
        generator: draws the first one.
        progress: wraps the counter of chosen rows, for a progress bar.

    Returns:
        Their indices (count,), in the order in which they were chosen.
    """
    first = int(torch.randint(len(candidates), (1,), generator=generator))
    chosen = [first]
    nearest = (candidates - candidates[first]).square().sum(1)
    lengths = candidates.square().sum(1)
    for _ in progress(range(count - 1)):
        farthest = int(nearest.argmax())
        chosen.append(farthest)
        apart = lengths + lengths[farthest] - 2 * candidates @ candidates[farthest]
        nearest = torch.minimum(nearest, apart)
        nearest[farthest] = -1
    return torch.tensor(chosen)
