"""What the branches that nothing is trained for make of images on disk, batch by batch: patch memory and DFM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from csad.progress import batches
from csad.training.stage import Job

import torch
from torch import Tensor

from models import dfm
from models.patch_memory import PatchMemory

BATCH = 4
DFM_BATCH = 16  # of views 256 wide


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
        maps.append(memory.anomaly_map(memory.image_distances(job.backbone.encoder, views)).cpu())
    return torch.cat(maps)


@torch.no_grad()
def pooled_maps(job: Job, paths: Sequence[Path], what: str) -> Tensor:
    """What DFM sees (N, C, 8, 8) of images on disk."""
    pooled = [torch.zeros(0, job.backbone.channels[2], dfm.SIDE, dfm.SIDE, device=job.device)]
    for few in batches(len(paths), DFM_BATCH, f"{job.name}: {what}"):
        views = torch.from_numpy(job.view.read_256(paths[few])).to(job.device).float()
        pooled.append(dfm.pool(job.backbone.encoder(views)))
    return torch.cat(pooled)
