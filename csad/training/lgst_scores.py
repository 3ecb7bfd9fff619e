"""LGST's difference maps of many images, batch by batch, and what chooses its weights by those of the test images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from csad.progress import batches
from csad.training.best_on_test import BestOnTest, mean_auroc, read_scored
from csad.training.stage import Job

import torch
from torch import Tensor

from models.lgst import LGST, Differences
from models.lgst_on_features import FeatureLGST

SCORING_BATCH = 8
EVALUATED_EVERY = 1000  # steps, where the test images choose the weights


@torch.no_grad()
def differences(
    model: LGST | FeatureLGST, job: Job, pictures: Tensor | Sequence[Path], what: str
) -> Differences:
    """Difference maps, two (N, 64, 64) tensors on the job's device, as the numbers that normalise them are.

    Args:
        pictures: loaded, (N, 3, S, S) uint8 as the model sees them, or on disk.
    """
    parts: list[tuple[Tensor, Tensor]] = [(torch.zeros(0, 64, 64, device=job.device),) * 2]
    read = job.view.read_tile_sized if model.on_features else job.view.read_256
    for few in batches(len(pictures), SCORING_BATCH, f"{job.name}: {what}"):
        batch = pictures[few]
        views = (batch if isinstance(batch, Tensor) else torch.from_numpy(read(batch))).to(job.device).float()
        maps = job.backbone.encoder(views)
        if isinstance(model, FeatureLGST):
            parts.append(model.differences(maps))
        else:
            parts.append(model.differences(views, maps))
    return Differences(*(torch.cat(maps) for maps in zip(*parts)))


def best_on_test(job: Job) -> BestOnTest[LGST | FeatureLGST]:
    """What chooses the weights by the AUROC of LGST on the test images, which are read once."""
    settings = job.settings.lgst
    read = job.view.read_256 if settings.student == "pixels" else job.view.read_tile_sized
    pictures = {name: torch.from_numpy(images) for name, images in read_scored(job, read).items()}

    def measure(model: LGST | FeatureLGST) -> float:
        parts = {
            name: differences(model, job, images, f"evaluate {name}") for name, images in pictures.items()
        }
        model.fit_map_normalisation(parts.pop("val"))
        scores = {split: model.anomaly_map(part).amax((1, 2)).cpu().numpy() for split, part in parts.items()}
        return mean_auroc(scores)

    return BestOnTest(EVALUATED_EVERY, settings.steps, measure)
