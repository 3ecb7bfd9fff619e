"""The patch memory: how far is each patch of an image from the most similar patch of good images?

PatchCore (Roth et al., CVPR 2022) with a correction for positions where good images vary, docs/beyond.md; beyond the
paper. Nothing is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbone import resize
from models.constants import MAP_SIZE
from models.statistics import map_range

SMOOTHING = 1.0  # standard deviation, in positions, of the Gaussian over a map
BASELINE_SMOOTHING = 1.5  # the same of the map of baseline distances
BASELINE_FRACTION = 0.5  # of them, which is taken off
MARGIN = 32  # pixels of its neighbours that a tile sees
GROUPS = 32  # of rows, whose minima are taken first in ONNX
ROUND, OVERSAMPLING = 250, 6  # rows chosen at a time; candidates looked at for each


class PatchMemory(nn.Module):
    """Encoder maps in, distances out.

    Args:
        channels: of the maps at 1/8 and 1/16 together.
        rows: remembered patches.
        side: of the maps, an eighth of the image's.
        score_share: of a tile's values, the largest, whose mean is the score: defects are no more patches in more tiles.
        tiles: an image is seen in tiles x tiles of them.
        border: what the Gaussian over a map finds beyond the image, zeros or replicate. Near the border an encoder sees its own
            padding, and parts cut off at positions that no good image has shown: zeros let that count less.
    """

    # (1, C, 1, 1), of each channel over the training images.
    mean: Tensor
    std: Tensor
    rows: Tensor  # (M, C), remembered patches, with mean and std taken off
    usual: Tensor  # (1, h, w), the baseline, which is taken off the distances at each position
    # Quantiles of the validation maps as they are shown.
    q_start: Tensor
    q_end: Tensor

    def __init__(
        self, channels: int, rows: int, side: int, score_share: float, tiles: int = 1, border: str = "zeros"
    ):
        super().__init__()
        self.score_share, self.tiles, self.border = score_share, tiles, border
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
        return nearest(embedded, *self._kernel(left_out))

    def image_distances(
        self, encoder: Callable[[Tensor], tuple[Tensor, ...]], rgb: Tensor, left_out: Tensor | None = None
    ) -> Tensor:
        """Images (B, 3, 8h, 8w) RGB in 0..255, tile by tile -> as `distances`."""
        kernel = self._kernel(left_out)  # once: an exported model would hold one for each tile
        return apply_tiled(lambda tile: nearest(self.embed(encoder(tile)), *kernel), rgb, self.tiles)

    def anomaly_map(self, distances: Tensor) -> Tensor:
        """Distances (B, h, w) of whole images -> anomaly map (B, h, w), not scaled."""
        return smooth(distances - self.usual, SMOOTHING, self.border)

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        """The encoder's maps of images in one tile -> anomaly map (B, h, w), not scaled."""
        return self.anomaly_map(self.distances(self.embed(maps)))

    def score(self, anomaly_map: Tensor) -> Tensor:
        """Mean of the largest values of each map (B, h, w), (B,)."""
        values = anomaly_map.flatten(1)
        count = max(round(self.score_share * int(values.shape[1]) / self.tiles**2), 1)
        return values.topk(count, sorted=False).values.mean(1)

    def scaled(self, anomaly_map: Tensor) -> Tensor:
        """(B, h, w) -> (B, 64, 64), comparable between images and branches."""
        return (self._to_map_size(anomaly_map) - self.q_start) / (self.q_end - self.q_start)

    def _to_map_size(self, anomaly_map: Tensor) -> Tensor:
        """(B, h, w) -> (B, 64, 64); of tiled images the largest of each block, so that what is small stays to be seen."""
        maps = anomaly_map[:, None]
        if self.tiles > 1:
            maps = F.max_pool2d(maps, max(anomaly_map.shape[-1] // MAP_SIZE, 1))
        return resize(maps, (MAP_SIZE, MAP_SIZE))[:, 0]

    def _kernel(self, left_out: Tensor | None) -> tuple[Tensor, Tensor]:
        offset = self.rows.square().sum(1)
        if left_out is not None:
            offset = offset.masked_fill(left_out, float("inf"))
        return -2 * self.rows[:, :, None, None], offset

    def fit_baseline(self, distances: Sequence[Tensor]) -> None:
        """Set `usual` from distance maps (h, w) of training images whose own rows were left out."""
        mean = torch.stack([*distances]).mean(0, keepdim=True)
        self.usual.copy_(BASELINE_FRACTION * smooth(mean, BASELINE_SMOOTHING))

    def fit_map_normalisation(self, validation: Tensor) -> None:
        """Set the quantiles from the maps of all validation images (N, h, w)."""
        start, end = map_range(self._to_map_size(validation))
        self.q_start.copy_(start)
        self.q_end.copy_(end)


def nearest(embedded: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
    """Patches (B, C, h, w) -> distance of each to the nearest row r, given as weight -2 r and offset |r|^2."""
    # |x - r|^2 = |x|^2 + (|r|^2 - 2 x r): a 1x1 convolution and a minimum, which every runtime is good at.
    products = F.conv2d(embedded, weight, offset)
    if torch.onnx.is_in_onnx_export():
        # In two steps: onnxruntime takes one image's minimum over all channels on one core.
        products = products.unflatten(1, (math.gcd(len(offset), GROUPS), -1)).amin(2)
    return (products.amin(1) + embedded.square().sum(1)).clamp(min=0).sqrt()


def apply_tiled(fn: Callable[[Tensor], Tensor], rgb: Tensor, tiles: int) -> Tensor:
    """Apply a function to tiles x tiles of an image that overlap, and put its results together again.

    Every tile sees `MARGIN` pixels of its neighbours, and what it finds there is theirs to say. One tile after another, so that
    memory does not grow with their number.

    Args:
        fn: tiles (B, 3, h, w) -> results (B, ..., h/8, w/8).
        rgb: (B, 3, S, S).
    """
    if tiles == 1:
        return fn(rgb)
    own = rgb.shape[-1] // tiles
    side = own + 2 * MARGIN
    begins = [min(max(index * own - MARGIN, 0), tiles * own - side) for index in range(tiles)]
    offsets = [(index * own - begin) // 8 for index, begin in enumerate(begins)]
    tiled = []
    for top, below in zip(begins, offsets):
        row = [
            fn(rgb[..., top : top + side, left : left + side])[
                ..., below : below + own // 8, right : right + own // 8
            ]
            for left, right in zip(begins, offsets)
        ]
        tiled.append(torch.cat(row, -1))
    return torch.cat(tiled, -2)


def patches(maps: tuple[Tensor, ...]) -> Tensor:
    """The encoder's maps at 1/8 and 1/16 side by side on the finer grid, (B, C, H/8, W/8)."""
    return torch.cat([maps[1], resize(maps[2], maps[1].shape[-2:])], 1)


def smooth(maps: Tensor, sigma: float, border: str = "replicate") -> Tensor:
    """Gaussian over (B, h, w), beyond whose border the border's values are repeated (replicate), or nothing is (zeros)."""
    radius = int(4 * sigma + 0.5)
    line = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=maps.device) / sigma) ** 2)
    line = line / line.sum()
    padded, padding = maps[:, None], radius
    if border == "replicate":
        # By indices: OpenVINO folds padding into the convolution after it, and a 9x1 one then reads what was never written.
        for axis in (-2, -1):
            positions = torch.arange(-radius, int(maps.shape[axis]) + radius, device=maps.device)
            padded = padded.index_select(axis, positions.clamp(0, int(maps.shape[axis]) - 1))
        padding = 0
    smoothed = F.conv2d(padded, line.view(1, 1, -1, 1), padding=(padding, 0))
    return F.conv2d(smoothed, line.view(1, 1, 1, -1), padding=(0, padding))[:, 0]


def greedy_k_centre(
    candidates: Tensor,
    count: int,
    generator: torch.Generator,
    progress: Callable[[int], object] = lambda _: None,
) -> Tensor:
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
        rows, distance, ranks = candidates[farthest], nearest[farthest].clone(), []
        for _ in range(size):
            ranks.append(int(distance.argmax()))
            distance = torch.minimum(distance, (rows - rows[ranks[-1]]).square().sum(1))
            distance[ranks[-1]] = -1
        new = farthest[ranks]
        chosen = torch.cat([chosen, new])
        for part in torch.arange(len(candidates)).split(20_000):
            apart = torch.addmm(lengths[new], candidates[part], candidates[new].T, alpha=-2).amin(1)
            nearest[part] = torch.minimum(nearest[part], (apart + lengths[part]).clamp(min=0))
        nearest[chosen] = -1
        progress(len(new))
    return chosen
