"""What the branches that nothing is trained for make of images on disk, batch by batch: patch memory and DFM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from csad.progress import ProgressBar, batches
from csad.training.stage import Job

import torch
from torch import Tensor

from models import dfm
from models.fused import block_means
from models.patch_memory import PatchMemory, RememberedPatches, greedy_k_centre
from models.statistics import ChannelMoments

CANDIDATES = 100_000  # patches from which rows are chosen
BATCH = 4
DFM_BATCH = 16  # of views 256 wide


class Candidates:
    """Patches drawn evenly from all training images, from which a memory's rows are chosen, and each channel's moments.

    Args:
        remembered: the memory.
        images: how many there are.
        seed: draws the patches.
    """

    def __init__(self, remembered: RememberedPatches, images: int, seed: int):
        (rows, channels), positions = remembered.rows.shape, remembered.usual.numel()
        self._remembered = remembered
        self._each = min(-(-max(CANDIDATES, rows) // images), positions)  # of one image
        self._patches = torch.empty(images, self._each, channels)
        self._images = iter(self._patches)
        self._moments, self._generator = ChannelMoments(), torch.Generator().manual_seed(seed)

    def add(self, features: Tensor) -> None:
        """Features (B, C, h, w) of the next images."""
        self._moments.add(features)
        for image in features.flatten(2).transpose(1, 2).cpu():  # (positions, C)
            drawn = torch.randperm(len(image), generator=self._generator)[: self._each]
            next(self._images).copy_(image[drawn])

    def choose(self, what: str) -> Tensor:
        """Set the memory's rows; returns of each row the index of its image, (M,)."""
        mean, std = self._moments.mean, torch.where(self._moments.std > 1e-6, self._moments.std, 1)
        standardised = self._patches.flatten(0, 1).sub_(mean.float()).div_(std.float())
        with ProgressBar(total=len(self._remembered.rows), desc=what, unit="patch", leave=False) as bar:
            rows = greedy_k_centre(standardised, bar.total, self._generator, bar.update)
        self._remembered.fit_rows(standardised[rows], mean, std)
        return rows // self._each


def read_views(job: Job, paths: Sequence[Path], what: str, batch: int = BATCH) -> Iterator[Tensor]:
    """Images on disk as (B, 3, S, S) RGB in 0..255, batch by batch; large ones, seen in tiles, one by one."""
    batch = batch if job.view.tiles == 1 else 1
    for few in batches(len(paths), batch, f"{job.name}: {what}"):
        yield torch.from_numpy(job.view.read(paths[few])).to(job.device).float()


@torch.no_grad()
def anomaly_maps(memory: PatchMemory, job: Job, paths: Sequence[Path], what: str) -> Tensor:
    """Anomaly maps (N, h, w) of images on disk, on the CPU."""
    side = job.view.size // 8
    maps = [torch.zeros(0, side, side)]
    for views in read_views(job, paths, f"score {what}"):
        small_maps = job.backbone.encoder(block_means(views))
        maps.append(memory.anomaly_map(job.backbone.encoder, views, small_maps).cpu())
    return torch.cat(maps)


@torch.no_grad()
def pooled_maps(job: Job, paths: Sequence[Path], what: str) -> Tensor:
    """What DFM sees (N, C, 8, 8) of images on disk."""
    pooled = [torch.zeros(0, job.backbone.channels[2], dfm.SIDE, dfm.SIDE, device=job.device)]
    for few in batches(len(paths), DFM_BATCH, f"{job.name}: {what}"):
        views = torch.from_numpy(job.view.read_256(paths[few])).to(job.device).float()
        pooled.append(dfm.pool(job.backbone.encoder(views)))
    return torch.cat(pooled)
