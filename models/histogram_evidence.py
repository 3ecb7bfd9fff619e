"""Whether and where the arrangement of components is wrong: the patch histogram on finer grids (docs/beyond.md).

The patch histogram says that an image holds an unusual amount of something, but not where. Here the same kind of distance is
taken apart: on grids of 1x1 to 5x5 cells, each component's share of a cell is compared with what all other shares let one
expect. Too much of a component is drawn on its own pixels, too little on the places where good images have it. The map's
mean is added to the patch histogram's score. Closed form, beyond the paper.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from models.constants import MAP_SIZE, SIZE
from models.fusion import EXPORTED_STD_FLOOR, fit_z
from models.statistics import folds, sample_covariance

GRIDS = (1, 2, 3, 4, 5)  # cells per side
FLOOR = 0.001  # standard deviation whose square is added to an area fraction's variance, times the grid's cells per side
SLACK = 0.5  # of the usual largest deviation in a good image: evidence below it does not count
BLUR = 1.5  # standard deviation, in positions, of the Gaussian over where good images have a component
BATCH = 16


class HistogramEvidence(nn.Module):
    """Label maps in, evidence maps out.

    Args:
        classes: components and background; C below.

    Attributes:
        frequency (C - 1, 64, 64): share of good images that have a component at a position, blurred.
        expected (C - 1, 64, 64): the same relative to the component's most frequent position, squared.
        mean_n (D,), deviation_n (D, D): of the shares of the n x n cells, D = (C - 1) n^2; shares less mean, times deviation, are
            conditional deviations, in units of the usual largest one in a good image.
        val_mean, val_std: z of the scores of validation images and of training images held out, if any were.
    """

    frequency: Tensor
    expected: Tensor
    averages_64: Tensor
    val_mean: Tensor
    val_std: Tensor

    def __init__(self, classes: int):
        super().__init__()
        self.classes = classes
        for name in ("frequency", "expected"):
            self.register_buffer(name, torch.zeros(classes - 1, MAP_SIZE, MAP_SIZE))
        self.register_buffer("val_mean", torch.tensor(0.0))
        self.register_buffer("val_std", torch.tensor(1.0))
        for grid in GRIDS:
            entries = (classes - 1) * grid**2
            self.register_buffer(f"mean_{grid}", torch.zeros(entries))
            self.register_buffer(f"deviation_{grid}", torch.zeros(entries, entries))
            self.register_buffer(f"spread_{grid}", _spread(grid), persistent=False)
        for grid in (*GRIDS, MAP_SIZE):
            self.register_buffer(f"averages_{grid}", _averages(grid).float(), persistent=False)

    def forward(self, labels: Tensor) -> Tensor:
        """(B, 256, 256) integers below C -> evidence (B, 64, 64): 0 where nothing is unusual."""
        present = _one_hot(labels, self.classes).float()
        shares = _mean_over(present, self.averages_64)
        excess, lack = shares * (1 - self.frequency), (1 - shares) * self.expected
        evidence = torch.zeros_like(shares[:, 0])
        for grid in GRIDS:
            averages, spread = getattr(self, f"averages_{grid}"), getattr(self, f"spread_{grid}")
            cells = _mean_over(present, averages).flatten(1)
            deviations = (cells - getattr(self, f"mean_{grid}")) @ getattr(self, f"deviation_{grid}")
            drawn = spread @ deviations.view(-1, self.classes - 1, grid, grid) @ spread.T
            too_much, too_little = (drawn - SLACK).clamp(min=0), (-drawn - SLACK).clamp(min=0)
            evidence = evidence + torch.maximum(too_much * excess, too_little * lack).amax(1)
        return evidence

    def score(self, evidence: Tensor) -> Tensor:
        """Evidence (B, 64, 64) -> its mean, normalised on validation images, (B,)."""
        return self.normalised(evidence.mean((1, 2)))

    def normalised(self, means: Tensor) -> Tensor:
        """Means of the evidence of images (B,) -> scores (B,)."""
        return (means - self.val_mean) / self.val_std

    def load_parameters(self, parameters: Mapping[str, np.ndarray]) -> None:
        """Take over what `fit_evidence` found; ValueError if it was fitted for another number of classes."""
        for name, buffer in self.state_dict().items():
            if name not in parameters or parameters[name].shape != tuple(buffer.shape):
                raise ValueError(
                    f"the evidence's parameter {name} is missing or was fitted for another number of classes"
                )
            buffer.copy_(torch.from_numpy(parameters[name]))


def fit_evidence(
    train: Tensor, validation: Tensor, classes: int, segmented_twice: tuple[Tensor, Tensor] | None = None
) -> dict[str, np.ndarray]:
    """Fit `HistogramEvidence` in float64.

    Args:
        train, validation: label maps (N, 256, 256) of good images, uint8.
        classes: components and background.
        segmented_twice: see `models.patch_histogram.fit_parameters`.

    Returns:
        Its parameters, float32, by name; with `segmented_twice` also held_out_score (N,), means of the evidence in
        training images of which none was fitted to.
    """

    def fractions(labels: Tensor, grid: int) -> Tensor:
        parts = labels.split(BATCH)
        return torch.cat([_mean_over(_one_hot(few, classes).double(), _averages(grid)) for few in parts])

    fitted = {grid: fractions(train, grid) for grid in (*GRIDS, MAP_SIZE)}
    judged = {grid: fractions(validation, grid).flatten(1).numpy() for grid in GRIDS}
    floors = {grid: np.full(judged[grid].shape[1], (FLOOR * grid) ** 2) for grid in GRIDS}
    if segmented_twice is not None:
        for grid in GRIDS:
            plain, changed = (fractions(labels, grid).flatten(1).numpy() for labels in segmented_twice)
            floors[grid] += np.square(changed - plain).mean(0)
    blur = torch.arange(MAP_SIZE, dtype=torch.float64)
    blur = torch.exp(-0.5 * ((blur[:, None] - blur) / BLUR) ** 2)
    blur = blur / blur.sum(1, keepdim=True)

    def fit(images: np.ndarray) -> dict[str, np.ndarray]:
        frequency = blur @ fitted[MAP_SIZE][images].mean(0) @ blur.T
        parameters = {
            "frequency": frequency.numpy(),
            "expected": (frequency / frequency.amax((1, 2), keepdim=True).clamp(min=1e-6)).square().numpy(),
            "val_mean": np.zeros(()),
            "val_std": np.ones(()),
        }
        for grid in GRIDS:
            samples = fitted[grid][images].flatten(1).numpy()
            mean = samples.mean(0)
            precision = np.linalg.inv(sample_covariance(samples) + np.diag(floors[grid]))
            # What is left of a fraction's deviation once all other fractions are known, in standard deviations.
            deviation = precision / np.sqrt(np.diagonal(precision))
            largest = np.abs((judged[grid] - mean) @ deviation).max(1).mean() if len(validation) else 1.0
            parameters |= {f"mean_{grid}": mean, f"deviation_{grid}": deviation / max(largest, 1e-6)}
        return parameters

    def scores(parameters: Mapping[str, np.ndarray], labels: Tensor) -> np.ndarray:
        model = fitted_evidence(parameters, classes)
        return np.concatenate(
            [np.zeros(0), *(model.score(model(few)).numpy() for few in labels.split(BATCH))]
        )

    parameters = fit(np.arange(len(train)))
    good = scores(parameters, validation)
    if segmented_twice is not None:
        held_out = np.zeros(len(train) if len(train) > 1 else 0)
        for others, left_out in folds(len(train)):
            held_out[left_out] = scores(fit(others), train[left_out])
        parameters["held_out_score"] = held_out
        good = np.concatenate([good, held_out])
    if len(good):
        parameters |= dict(zip(("val_mean", "val_std"), map(np.asarray, fit_z(good, EXPORTED_STD_FLOOR))))
    return {name: values.astype(np.float32) for name, values in parameters.items()}


def fitted_evidence(parameters: Mapping[str, np.ndarray], classes: int) -> HistogramEvidence:
    """The module with what `fit_evidence` gave; errors as of `HistogramEvidence.load_parameters`."""
    evidence = HistogramEvidence(classes)
    evidence.load_parameters(parameters)
    return evidence


def _one_hot(labels: Tensor, classes: int) -> Tensor:
    """(B, H, W) -> (B, C - 1, H, W) bool, without the background."""
    return labels[:, None] == torch.arange(1, classes, device=labels.device).view(1, -1, 1, 1)


def _mean_over(present: Tensor, averages: Tensor) -> Tensor:
    return averages @ present @ averages.T


def _averages(cells: int) -> Tensor:
    """(n, 256) float64: the mean over each of n equal stretches of a side; pixels at an edge count with their share."""
    edges = torch.arange(cells + 1, dtype=torch.float64) * SIZE / cells
    pixels = torch.arange(SIZE, dtype=torch.float64)
    overlap = torch.minimum(pixels + 1, edges[1:, None]) - torch.maximum(pixels, edges[:-1, None])
    overlap = overlap.clamp(min=0)
    return overlap / overlap.sum(1, keepdim=True)


def _spread(cells: int) -> Tensor:
    """(64, n): which stretch of a side each position of the map lies in, by its centre."""
    index = ((torch.arange(MAP_SIZE) + 0.5) * cells / MAP_SIZE).long()
    return torch.eye(cells)[index]
