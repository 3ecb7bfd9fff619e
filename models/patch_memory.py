"""The patch memory: how far is each patch of an image from the most similar patch of good images?

PatchCore (Roth et al., CVPR 2022) with a correction for places where good images vary, docs/METHOD.md section 6; beyond the
paper. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbone import resize
from models.prediction import MAP_QUANTILES, MAP_SIZE

SMOOTHING = 1.0  # standard deviation in places of the Gaussian over a map
USUAL_SMOOTHING, USUAL_WEIGHT = 1.5, 0.5  # the same of the map of usual distances; its share that is taken off
ROUND, OVERSAMPLING = 250, 6  # rows chosen at a time; candidates looked at for each


class PatchMemory(nn.Module):
    """Encoder maps in, distances out.

    Args:
        channels: of the maps at 1/8 and 1/16 together.
        rows: remembered patches.
        side: of the maps, an eighth of the image's.
        score_share: of a map's values, the largest, whose mean is the score.

    Attributes:
        mean, std (1, C, 1, 1): of each channel over the training images.
        rows (M, C): remembered patches, with mean and std taken off.
        usual (1, h, w): what is taken off the distances at each place.
        q_start, q_end: quantiles of the validation maps.
    """

    def __init__(self, channels: int, rows: int, side: int, score_share: float):
        super().__init__()
        self.score_share = score_share
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("std", torch.ones(1, channels, 1, 1))
        self.register_buffer("rows", torch.zeros(rows, channels))
        self.register_buffer("usual", torch.zeros(1, side, side))
        self.register_buffer("q_start", torch.tensor(0.0))
        self.register_buffer("q_end", torch.tensor(1.0))

    def embed(self, maps: tuple[Tensor, ...]) -> Tensor:
        """Maps at 1/4 (unused), 1/8 and 1/16 -> patches (B, C, h, w) on the finer grid, mean and std taken off."""
        return (patches(maps) - self.mean) / self.std

    def distances(self, embedded: Tensor, left_out: Tensor | None = None) -> Tensor:
        """Patches (B, C, h, w) -> Euclidean distance of each to the nearest row, (B, h, w).

        Args:
            left_out: (M,) bool, rows that do not count.
        """
        # |x - r|^2 = |x|^2 + (|r|^2 - 2 x r): a 1x1 convolution and a minimum, which every runtime is good at.
        offset = self.rows.square().sum(1)
        if left_out is not None:
            offset = offset.masked_fill(left_out, float("inf"))
        apart = F.conv2d(embedded, -2 * self.rows[:, :, None, None], offset)
        return (apart.amin(1) + embedded.square().sum(1)).clamp(min=0).sqrt()

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        """The encoder's maps -> anomaly map (B, h, w), not scaled."""
        return smooth(self.distances(self.embed(maps)) - self.usual, SMOOTHING)

    def score(self, anomaly_map: Tensor) -> Tensor:
        """Mean of the largest values of each map (B, h, w), (B,)."""
        values = anomaly_map.flatten(1)
        count = max(round(self.score_share * int(values.shape[1])), 1)
        return values.topk(count, sorted=False).values.mean(1)

    def scaled(self, anomaly_map: Tensor) -> Tensor:
        """(B, h, w) -> (B, 64, 64), comparable between images and branches."""
        return resize(((anomaly_map - self.q_start) / (self.q_end - self.q_start))[:, None], (MAP_SIZE, MAP_SIZE))[:, 0]

    def fit_usual(self, distances: Iterable[Tensor]) -> None:
        """Set what is usual at each place from distance maps (h, w) of training images whose own rows were left out."""
        self.usual.copy_(USUAL_WEIGHT * smooth(torch.stack(list(distances)).mean(0, keepdim=True), USUAL_SMOOTHING))

    def fit_map_normalisation(self, validation: Tensor) -> None:
        """Set the quantiles from the maps of all validation images (N, h, w)."""
        ordered = validation.flatten().sort().values
        start, end = (ordered[round(fraction * (len(ordered) - 1))] for fraction in MAP_QUANTILES)
        self.q_start.copy_(start)
        self.q_end.copy_(end if end > start else start + 1)


def patches(maps: tuple[Tensor, ...]) -> Tensor:
    """The encoder's maps at 1/8 and 1/16 side by side on the finer grid, (B, C, H/8, W/8)."""
    return torch.cat([maps[1], resize(maps[2], maps[1].shape[-2:])], 1)


def smooth(maps: Tensor, sigma: float) -> Tensor:
    """Gaussian over (B, h, w), the border's values repeated."""
    radius = int(4 * sigma + 0.5)
    line = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=maps.device) / sigma) ** 2)
    line = line / line.sum()
    padded = F.pad(maps[:, None], (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))[:, 0]


def greedy_k_centre(candidates: Tensor, count: int, generator: torch.Generator,
                    progress: Callable[[int], object] = lambda chosen: None) -> Tensor:
    """Choose rows such that no candidate is far from the nearest one: the next is always the farthest so far.

    For speed the distances of all candidates are brought up to date once a round; within a round the choice is among those that
    were farthest at its beginning.

    Args:
        candidates: (N, D).
        count: how many to choose, at most N.
        generator: draws the first one.
        progress: told how many more are chosen.

    Returns:
        Their indices (count,), in the order in which they were chosen.
    """
    lengths = candidates.square().sum(1)
    chosen = torch.randint(len(candidates), (1,), generator=generator)
    nearest = (candidates - candidates[chosen]).square().sum(1)
    nearest[chosen] = -1
    while len(chosen) < count:
        size = min(ROUND, count - len(chosen), max(4, len(chosen)))
        farthest = nearest.topk(min(len(candidates), OVERSAMPLING * size)).indices
        rows, distance, new = candidates[farthest], nearest[farthest].clone(), []
        for _ in range(size):
            new.append(int(distance.argmax()))
            distance = torch.minimum(distance, (rows - rows[new[-1]]).square().sum(1))
            distance[new[-1]] = -1
        new = farthest[new]
        chosen = torch.cat([chosen, new])
        for part in torch.arange(len(candidates)).split(20_000):
            apart = torch.addmm(lengths[new], candidates[part], candidates[new].T, alpha=-2).amin(1) + lengths[part]
            nearest[part] = torch.minimum(nearest[part], apart.clamp(min=0))
        nearest[chosen] = -1
        progress(len(new))
    return chosen
