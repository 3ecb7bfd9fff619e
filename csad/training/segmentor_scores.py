"""Label maps of many images, batch by batch, what they score, and what chooses the segmentor's weights by it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from csad.data import files
from csad.progress import batches
from csad.training.best_on_test import BestOnTest, mean_auroc, read_scored
from csad.training.logical_synthesis import without_a_part
from csad.training.stage import Job

import numpy as np
import torch
from torch import Tensor

from models.histogram_evidence import HistogramEvidence, fit_evidence, fitted_evidence
from models.patch_histogram import HISTOGRAMS, PatchHistogramDetector, fit_parameters, fitted_detector
from models.segmentor import Segmentor

SCORING_BATCH = 8
EVALUATED_EVERY = 2  # epochs, where the test images choose the weights
# By what training images are changed to see how reliably they are segmented: pixels of 256, share, grey levels.
MAX_SHIFT, LIGHT, NOISE = 2, 0.03, 2.0
RELIABILITY_IMAGES = 64


@torch.no_grad()
def label_maps(
    segmentor: Segmentor, job: Job, pictures: Tensor | Sequence[Path], what: str
) -> Iterator[Tensor]:
    """Label maps (B, 256, 256) uint8 of images, loaded (N, 3, 256, 256) or on disk, batch by batch."""
    for few in batches(len(pictures), SCORING_BATCH, f"{job.name}: {what}"):
        batch = pictures[few]
        if not isinstance(batch, Tensor):
            batch = torch.from_numpy(job.view.read_256(batch))
        yield segmentor(job.backbone.encoder(batch.to(job.device).float())).argmax(1).byte().cpu()


def segment_twice(segmentor: Segmentor, job: Job, pictures: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Label maps of training images (N, 3, 256, 256) as they are, and of the same slightly changed.

    The changes say nothing about components: a shift by up to two pixels, which is undone in the label map, light, and noise.
    """
    subset = torch.arange(0, len(pictures), -(-len(pictures) // RELIABILITY_IMAGES))
    generator = torch.Generator().manual_seed(job.seed)
    shifts = torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (len(subset), 2), generator=generator).tolist()
    light = 1 + LIGHT * (2 * torch.rand(len(subset), 1, 1, 1, generator=generator) - 1)
    changed = torch.stack([torch.roll(*each, (1, 2)) for each in zip(pictures[subset], shifts)])
    changed = changed * light + NOISE * torch.randn(changed.shape, generator=generator)
    changed = changed.clamp(0, 255).round().byte()
    segmented = torch.cat([*label_maps(segmentor, job, changed, "segment changed training images")])
    undone = [torch.roll(label_map, (-y, -x), (0, 1)) for label_map, (y, x) in zip(segmented, shifts)]
    return maps[subset], torch.stack(undone)


class Fitted(NamedTuple):
    """What is fitted to the label maps of good images: parameters, as written, and modules made of them."""

    parameters: dict[str, np.ndarray]  # see `models.patch_histogram.fit_parameters`
    detector: PatchHistogramDetector
    evidence_parameters: dict[str, np.ndarray]  # see `models.histogram_evidence.fit_evidence`
    evidence: HistogramEvidence | None  # None, and no parameters, without --segmentor.evidence


def fit(
    segmentor: Segmentor,
    job: Job,
    train_images: Tensor,
    train_maps: Tensor,
    validation_maps: Tensor,
    classes: int,
    incomplete: Tensor | None = None,
) -> Fitted:
    """Fit what scores a segmentor's label maps, as the settings say.

    Args:
        train_images: (N, 3, 256, 256) uint8.
        train_maps, validation_maps: the segmentor's label maps (N, 256, 256) uint8.
        incomplete: see `models.patch_histogram.fit_parameters`; no score depends on them.
    """
    settings = job.settings.segmentor
    twice = segment_twice(segmentor, job, train_images, train_maps) if settings.reliability else None
    parameters = fit_parameters(
        train_maps, validation_maps, classes, settings.histogram_floor, twice, incomplete
    )
    detector = fitted_detector(parameters, classes, trimmed=not settings.evidence)
    if not settings.evidence:
        return Fitted(parameters, detector, {}, None)
    evidence_parameters = fit_evidence(train_maps, validation_maps, classes, twice)
    return Fitted(parameters, detector, evidence_parameters, fitted_evidence(evidence_parameters, classes))


def written(segmented: Iterable[Tensor], job: Job, split: str) -> Iterator[Tensor]:
    """The same label maps of a split's test images, each written on its way."""
    category, paths = job.category, iter(job.category.test(split))
    for maps in segmented:
        for label_map, path in zip(maps, paths):
            target = job.workspace.segmentation_output(category.name, split, category.key(path))
            files.write_image(target, label_map.numpy())
        yield maps


def score(
    detector: PatchHistogramDetector, evidence: HistogramEvidence | None, segmented: Iterable[Tensor]
) -> tuple[np.ndarray, np.ndarray]:
    """Scores (N,), those of the evidence among them if there is one, and evidence (N, 64, 64), else (0, 64, 64).

    Args:
        segmented: label maps (B, 256, 256) uint8; none is kept, so that memory does not grow with their number.
    """
    scores, drawn = [torch.zeros(0, dtype=torch.float64)], [torch.zeros(0, 64, 64)]
    for maps in segmented:
        scores.append(detector(maps))
        if evidence is not None:
            drawn.append(evidence(maps))
            scores[-1] = scores[-1] + evidence.score(drawn[-1])
    return torch.cat(scores).numpy(), torch.cat(drawn).numpy()


def incomplete_maps(maps: Tensor, seed: int) -> Tensor:
    """Label maps (N, 256, 256), each without one part: what of it would the histogram notice?"""
    rng = np.random.default_rng(seed)
    return torch.stack([torch.from_numpy(without_a_part(label_map, rng)) for label_map in maps.numpy()])


def held_out_scores(fitted: Fitted) -> np.ndarray:
    """Scores of training images held out (N,), as `score` would give them, of what the parameters say of these images."""
    distances = (torch.from_numpy(fitted.parameters[f"{name}_held_out_score"]) for name in HISTOGRAMS)
    scores = fitted.detector.score(*distances)
    if fitted.evidence is not None:
        means = torch.from_numpy(fitted.evidence_parameters["held_out_score"])
        scores = scores + fitted.evidence.normalised(means)
    return scores.numpy()


def best_on_test(job: Job, train_images: Tensor, classes: int, steps_per_epoch: int) -> BestOnTest[Segmentor]:
    """What chooses the weights by the AUROC on the test images, which are read once, by the scores that the
    stage would write of them."""
    settings = job.settings.segmentor
    pictures = {
        name: torch.from_numpy(images) for name, images in read_scored(job, job.view.read_256).items()
    }

    def measure(segmentor: Segmentor) -> float:
        def segmented(images: Tensor, what: str) -> Tensor:
            return torch.cat([*label_maps(segmentor, job, images, what)])

        train_maps = segmented(train_images, "segment training images")
        maps = {name: segmented(images, f"evaluate {name}") for name, images in pictures.items()}
        validation_maps = maps.pop("val")
        fitted = fit(segmentor, job, train_images, train_maps, validation_maps, classes)
        return mean_auroc(
            {
                name: score(fitted.detector, fitted.evidence, of_split.split(SCORING_BATCH))[0]
                for name, of_split in maps.items()
            }
        )

    return BestOnTest(EVALUATED_EVERY * steps_per_epoch, settings.epochs * steps_per_epoch, measure)
