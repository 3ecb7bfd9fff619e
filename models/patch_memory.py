"""The patch memory: how far is each patch of an image from the most similar patch of good images?

PatchCore (Roth et al., CVPR 2022) on two views of an image, with a correction for positions where good images vary;
docs/beyond.md, beyond the paper. Nothing is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbone import resize
from models.constants import MAP_SIZE, SIZE
from models.statistics import map_range

SMOOTHING = 1.0  # standard deviation, in positions, of the Gaussian over a map
BASELINE_SMOOTHING = 1.5  # the same of the map of baseline distances
BASELINE_FRACTION = 0.5  # of them, which is taken off
CONTEXT_WEIGHT = 0.25  # of the context beside the large view, both in standard deviations of good images
MARGIN = 32  # pixels of its neighbours that a tile sees
GROUPS = 32  # of rows, whose minima are taken first in ONNX
ROUND, OVERSAMPLING = 250, 6  # rows chosen at a time; candidates looked at for each


class RememberedPatches(nn.Module):
    """Patches of good images on one grid of features, and how far others lie from the nearest of them.

    Args:
        channels: of the features.
        rows: remembered patches.
        side: of the grid.
        border: what the Gaussian over a map finds beyond the image, zeros or replicate. Near the border an encoder sees its own
            padding, and parts cut off at positions that no good image has shown: zeros let that count less.
    """

    # (1, C, 1, 1), of each channel over the training images.
    mean: Tensor
    std: Tensor
    rows: Tensor  # (M, C), remembered patches, with mean and std taken off
    usual: Tensor  # (1, h, w), the baseline, which is taken off the distances at each position

    def __init__(self, channels: int, rows: int, side: int, border: str = "zeros"):
        super().__init__()
        self.border = border
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("std", torch.ones(1, channels, 1, 1))
        self.register_buffer("rows", torch.zeros(rows, channels))
        self.register_buffer("usual", torch.zeros(1, side, side))

    def embed(self, features: Tensor) -> Tensor:
        """Features (B, C, h, w) with mean and std taken off."""
        return (features - self.mean) / self.std

    def distances(self, embedded: Tensor, left_out: Tensor | None = None) -> Tensor:
        """Patches (B, C, h, w) -> Euclidean distance of each to the nearest row, (B, h, w).

        Args:
            left_out: (M,) bool, rows that do not count.
        """
        return nearest(embedded, *self.kernel(left_out))

    def deviations(self, distances: Tensor) -> Tensor:
        """Distances (B, h, w) of whole images, smoothed, less what is usual at each position."""
        return smooth(distances - self.usual, SMOOTHING, self.border)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, C, h, w) -> deviations (B, h, w)."""
        return self.deviations(self.distances(self.embed(features)))

    def fit_rows(self, patches: Tensor, mean: Tensor, std: Tensor) -> None:
        """Set the rows from patches (M, C), and mean and std (C,), which are taken off them."""
        self.mean.copy_(mean.view(1, -1, 1, 1))
        self.std.copy_(std.view(1, -1, 1, 1))
        self.rows.copy_(patches)

    def fit_baseline(self, distances: Sequence[Tensor]) -> None:
        """Set `usual` from distance maps (h, w) of training images whose own rows were left out."""
        mean = torch.stack([*distances]).mean(0, keepdim=True)
        self.usual.copy_(BASELINE_FRACTION * smooth(mean, BASELINE_SMOOTHING))

    def kernel(self, left_out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The rows as `nearest` takes them."""
        offset = self.rows.square().sum(1)
        if left_out is not None:
            offset = offset.masked_fill(left_out, float("inf"))
        return -2 * self.rows[:, :, None, None], offset


class PatchMemory(nn.Module):
    """Maps of two views of an image in, an anomaly map out: details of the large view, and the context of the small one.

    Args:
        channels: of the encoder's maps at 1/8 and at 1/16.
        rows: remembered patches of the large view.
        context_rows: of the small view.
        side: of the map, an eighth of the large view's.
        score_share: of a tile's values, the largest, whose mean is the score: defects are no more patches in more tiles.
        tiles: an image is seen in tiles x tiles of them.
        border: as of `RememberedPatches`.
    """

    context_scale: Tensor  # by which the context's deviations are multiplied
    # Quantiles of the validation maps as they are shown.
    q_start: Tensor
    q_end: Tensor

    def __init__(
        self,
        channels: tuple[int, ...],
        rows: int,
        context_rows: int,
        side: int,
        score_share: float,
        tiles: int = 1,
        border: str = "zeros",
    ):
        super().__init__()
        self.score_share, self.tiles = score_share, tiles
        self.detail = RememberedPatches(sum(channels), rows, side, border)
        self.context = RememberedPatches(channels[1], context_rows, SIZE // 16, border)
        self.register_buffer("context_scale", torch.tensor(0.0))
        self.register_buffer("q_start", torch.tensor(0.0))
        self.register_buffer("q_end", torch.tensor(1.0))

    def forward(self, large_maps: tuple[Tensor, ...], small_maps: tuple[Tensor, ...]) -> Tensor:
        """The encoder's maps of images in one tile, and of their small views -> anomaly map (B, h, w), not scaled."""
        return self._with_context(self.detail(patches(large_maps)), small_maps)

    def anomaly_map(
        self, encoder: Callable[[Tensor], tuple[Tensor, ...]], rgb: Tensor, small_maps: tuple[Tensor, ...]
    ) -> Tensor:
        """Images (B, 3, 8h, 8w) RGB in 0..255, tile by tile, and the encoder's maps of their small views -> as `forward`."""
        return self._with_context(self.detail.deviations(self.distances(encoder, rgb)), small_maps)

    def distances(
        self, encoder: Callable[[Tensor], tuple[Tensor, ...]], rgb: Tensor, left_out: Tensor | None = None
    ) -> Tensor:
        """Images (B, 3, 8h, 8w) RGB in 0..255, tile by tile -> distances of the details, (B, h, w)."""
        kernel = self.detail.kernel(left_out)  # once: an exported model would hold one for each tile

        def of_tile(tile: Tensor) -> Tensor:
            return nearest(self.detail.embed(patches(encoder(tile))), *kernel)

        return apply_tiled(of_tile, rgb, self.tiles)

    def _with_context(self, deviations: Tensor, small_maps: tuple[Tensor, ...]) -> Tensor:
        context = self.context(small_maps[2])[:, None]
        return deviations + self.context_scale * resize(context, tuple(deviations.shape[-2:]))[:, 0]

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

    def fit_context_scale(self, distances: Tensor, context_distances: Tensor) -> None:
        """Set the scale from distances (N, h, w) and (N, 16, 16) of training images whose own rows were left out."""
        spread = self.context.deviations(context_distances).std()
        if spread > 0:
            self.context_scale.copy_(CONTEXT_WEIGHT * self.detail.deviations(distances).std() / spread)

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
    squared = products.amin(1) + embedded.square().sum(1)
    # Not clamp, which is 0, a very normal distance, of what is no number in OpenVINO.
    return torch.where(squared < 0, 0.0, squared).sqrt()


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
