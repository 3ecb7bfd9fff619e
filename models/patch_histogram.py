"""The patch histogram: does an image hold the usual amount of every component, in all and in each quarter?

Paper section 3.3, docs/method.md section 2. A histogram is the area fraction of every class; the score is how far
(Mahalanobis) it lies from the histograms of good training images. `PatchHistogramDetector` computes it, for batches of
any size and in every exported format; `fit_parameters` finds the numbers that it needs.

Index 0, the background, is kept as an entry, so that shapes follow the number of classes. There are two cases:

- ``background=False``, stage 2 and everything fitted here: the entry stays 0, and so do row and column 0 of the inverse
  covariance.
- ``background=True``, the exported model: the entry is the true share of background. With parameters fitted as above
  this changes nothing, since row and column 0 are 0; it matters for the published module's behaviour under other ones.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from models.constants import QUARTERS
from models.fusion import EXPORTED_STD_FLOOR, fit_trimmed_z, fit_z
from models.statistics import folds, regularised_covariance, sample_covariance

HISTOGRAMS = ("hist", "patch_hist")  # of the whole map, of its quarters: how the names of parameters begin


def label_histograms(labels: Tensor, classes: int, background: bool = False) -> tuple[Tensor, Tensor]:
    """Area fractions of the classes, over the whole map and over its quarters.

    Args:
        labels: (B, H, W) of any integer type, values 0..classes-1; H and W even.
        background: keep index 0, or leave it 0.

    Returns:
        (B, C) and (B, 4C) float32: the quarters top-left, bottom-left, top-right, bottom-right, one after another, each
        relative to its own area. Exact for maps of 256x256.
    """
    height, width = labels.shape[-2:]
    numbers = torch.arange(classes, device=labels.device).view(1, classes, 1, 1, 1, 1)
    blocks = labels.reshape(-1, 1, 2, height // 2, 2, width // 2)
    fractions = (blocks == numbers).float().mean((3, 5))  # (B, C, row, column)
    if not background:
        fractions = fractions * (torch.arange(classes, device=labels.device) > 0).float().view(
            1, classes, 1, 1
        )
    whole = fractions.mean((2, 3))
    quarters = fractions.permute(0, 3, 2, 1).reshape(-1, QUARTERS * classes)
    return whole, quarters


def mahalanobis(
    histograms: Tensor, mean: Tensor, inverse_covariance: Tensor, factor: Tensor | None = None
) -> Tensor:
    """Distances of histograms (B, n) from a mean (n, 1), (B,); Euclidean where Mahalanobis is not a number.

    Args:
        factor: `whitening` of the inverse covariance, for near-singular ones in float32: the distance is the norm of W d.
    """
    difference = histograms - mean.view(1, -1)
    # Products and a sum instead of a matrix product: runtimes take the latter for a network's layer and run it in bf16.
    if factor is not None:
        return (difference[:, None, :] * factor).sum(2).square().sum(1).sqrt()
    squared = (difference[:, :, None] * inverse_covariance * difference[:, None, :]).sum((1, 2))
    euclidean = difference.square().sum(1)
    return torch.where(squared >= 0, squared, euclidean).sqrt()


def whitening(inverse_covariance: Tensor) -> Tensor:
    """W (n, n) with W^T W = the inverse covariance, so that a distance is the norm of W d: no difference of large numbers.

    Where the matrix has clearly negative eigenvalues (only made-up ones have), ValueError.
    """
    values, vectors = torch.linalg.eigh((inverse_covariance + inverse_covariance.T).double() / 2)
    if values.min() < -1e-6 * values.abs().max():
        raise ValueError("the inverse covariance has negative eigenvalues")
    return (values.clamp(min=0).sqrt()[:, None] * vectors.T).to(inverse_covariance.dtype)


class PatchHistogramDetector(nn.Module):
    """Label maps in, scores out; its buffers are the published ones.

    Args:
        classes: components and background.
        background: what happens to index 0, see above; True is the exported model.
    """

    # Of train images: (C, 1), (C, C), (4C, 1) and (4C, 4C); then scalars, the (trimmed) z of the distances.
    hist_mean: Tensor
    hist_invcov: Tensor
    patch_hist_mean: Tensor
    patch_hist_invcov: Tensor
    hist_val_mean: Tensor
    hist_val_std: Tensor
    patch_hist_val_mean: Tensor
    patch_hist_val_std: Tensor

    def __init__(self, classes: int, background: bool = True):
        super().__init__()
        self.classes, self.background = classes, background
        self.whitening: nn.ParameterList | None = None
        for name, size in zip(HISTOGRAMS, (classes, QUARTERS * classes)):
            self.register_buffer(f"{name}_mean", torch.zeros(size, 1))
            self.register_buffer(f"{name}_invcov", torch.zeros(size, size))
        for name in HISTOGRAMS:
            self.register_buffer(f"{name}_val_mean", torch.tensor(0.0))
            self.register_buffer(f"{name}_val_std", torch.tensor(1.0))

    def whiten(self) -> None:
        """From now on take distances as norms of whitened differences: right in float32, too, for near-singular covariances."""
        try:
            self.whitening = nn.ParameterList(
                nn.Parameter(whitening(inverse), requires_grad=False)
                for inverse in (self.hist_invcov, self.patch_hist_invcov)
            )
        except ValueError:
            self.whitening = None

    def distances(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Label maps (B, 256, 256) -> distances of the whole and of the quarters, (B,) each, not normalised."""
        counted = label_histograms(labels, self.classes, self.background)
        histograms = [histogram.to(self.hist_mean.dtype) for histogram in counted]
        means, inverses = (self.hist_mean, self.patch_hist_mean), (self.hist_invcov, self.patch_hist_invcov)
        factors = (None, None) if self.whitening is None else self.whitening
        whole, quarters = (mahalanobis(*each) for each in zip(histograms, means, inverses, factors))
        return whole, quarters

    def forward(self, labels: Tensor) -> Tensor:
        """Label maps (B, 256, 256) -> sum of the two normalised distances, (B,)."""
        return self.score(*self.distances(labels))

    def score(self, whole: Tensor, quarters: Tensor) -> Tensor:
        """Distances (B,) -> sum of both, each normalised, (B,)."""
        whole = (whole - self.hist_val_mean) / self.hist_val_std
        return whole + (quarters - self.patch_hist_val_mean) / self.patch_hist_val_std

    def load_parameters(
        self,
        parameters: Mapping[str, np.ndarray],
        std_floor: float = EXPORTED_STD_FLOOR,
        trimmed: bool = True,
    ) -> None:
        """Take over what `fit_parameters` found, or a published ``{category}_patchhist_params.npz``.

        Args:
            parameters: the six arrays named in docs/method.md section 2; means may be (n,) or (n, 1).
            std_floor: see `fit_trimmed_z`.
            trimmed: normalise the distances by `fit_trimmed_z` (the paper), otherwise by `fit_z`; those of held-out
                training images, where the file has them, count as validation images' do.

        Raises:
            ValueError: an array is missing, or was fitted for another number of classes.
        """
        for name in (
            f"{histogram}_{part}" for part in ("mean", "invcov", "val_score") for histogram in HISTOGRAMS
        ):
            if name not in parameters:
                raise ValueError(f"patch-histogram parameters lack '{name}'")
        for name in HISTOGRAMS:
            for part in ("mean", "invcov"):
                buffer, given = getattr(self, f"{name}_{part}"), np.asarray(parameters[f"{name}_{part}"])
                if given.size != buffer.numel():
                    raise ValueError(
                        f"patch-histogram parameter {name}_{part} has {given.size} values, expected "
                        f"{buffer.numel()} for {self.classes} classes"
                    )
                buffer.copy_(torch.as_tensor(given, dtype=buffer.dtype).view(buffer.shape))
            held_out = parameters.get(f"{name}_held_out_score", np.zeros(0))
            good = np.concatenate([parameters[f"{name}_val_score"], held_out])
            mean, std = (fit_trimmed_z if trimmed else fit_z)(good, std_floor)
            getattr(self, f"{name}_val_mean").fill_(mean)
            getattr(self, f"{name}_val_std").fill_(std)


def fit_parameters(
    train: Tensor,
    validation: Tensor,
    classes: int,
    floor: float = 0.0,
    segmented_twice: tuple[Tensor, Tensor] | None = None,
    incomplete: Tensor | None = None,
) -> dict[str, np.ndarray]:
    """Fit the detector in float64 (docs/method.md section 2).

    Args:
        train, validation: label maps (N, 256, 256) of good images, uint8.
        classes: components and background.
        floor: standard deviation whose square is added to every area fraction's variance; 0 as published, where the
            pseudo-inverse does not look at fractions that never vary in training.
        segmented_twice: label maps (M, 256, 256) of the same good images, as they are and slightly changed. What the
            fractions differ by is what segmentation itself wavers by, and joins the covariance; that of few images is
            shrunk, too, and distances are normalised by training images held out as well. None, as published: nothing
            of this.
        incomplete: the training images' label maps, each without one part; wanted with `segmented_twice` only.

    Returns:
        hist_mean (C,), hist_invcov (C, C), patch_hist_mean (4C,), patch_hist_invcov (4C, 4C), and the distances of the
        validation images, hist_val_score and patch_hist_val_score (n,): the content of the parameter file. With
        `segmented_twice` also those of training images (N,) of which none was fitted to, hist_held_out_score and
        patch_hist_held_out_score, and of the same, incomplete, hist_incomplete_score and patch_hist_incomplete_score.
    """
    parameters: dict[str, np.ndarray] = {}
    train_histograms, validation_histograms = _stacked(train, classes), _stacked(validation, classes)
    wavering = [np.zeros_like(fitted[:1]) for fitted in train_histograms]
    if segmented_twice is not None:
        plain, changed = (_stacked(maps, classes) for maps in segmented_twice)
        wavering = [after - before for before, after in zip(plain, changed)]
    left_out_histograms = {"held_out": train_histograms}
    if incomplete is not None:
        left_out_histograms["incomplete"] = _stacked(incomplete, classes)
    for index, name in enumerate(HISTOGRAMS):
        fitted, differences = train_histograms[index], wavering[index]
        components = np.arange(fitted.shape[1]) % classes > 0
        added = differences.T @ differences / len(differences)
        added[components, components] += floor**2

        def fit(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            covariance = sample_covariance(samples) + added
            if segmented_twice is not None:
                covariance[np.ix_(components, components)] = regularised_covariance(
                    samples[:, components], added[np.ix_(components, components)]
                )
            inverse = np.linalg.pinv(covariance)
            inverse[::classes] = inverse[:, ::classes] = 0  # the background's, but for rounding 0 already
            return samples.mean(0), inverse

        mean, inverse = fit(fitted)
        parameters |= {f"{name}_mean": mean, f"{name}_invcov": inverse}
        parameters[f"{name}_val_score"] = _distances(validation_histograms[index], mean, inverse)
        if segmented_twice is not None:
            count = len(fitted) if len(fitted) > 1 else 0
            distances = {part: np.zeros(count) for part in left_out_histograms}
            for others, left_out in folds(len(fitted)):
                mean, inverse = fit(fitted[others])
                for part, histograms in left_out_histograms.items():
                    distances[part][left_out] = _distances(histograms[index][left_out], mean, inverse)
            parameters |= {f"{name}_{part}_score": values for part, values in distances.items()}
    return parameters


def _distances(histograms: np.ndarray, mean: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    return mahalanobis(*(torch.from_numpy(values) for values in (histograms, mean, inverse))).numpy()


def fitted_detector(
    parameters: Mapping[str, np.ndarray], classes: int, trimmed: bool = True
) -> PatchHistogramDetector:
    """The detector of stage 2: float64, index 0 left out, a std replaced only where it is 0."""
    detector = PatchHistogramDetector(classes, background=False).double()
    detector.load_parameters(parameters, std_floor=0.0, trimmed=trimmed)
    return detector


def _stacked(labels: Tensor, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Both histograms of many maps, (N, C) and (N, 4C) float64, a few maps at a time to spare memory."""
    parts = [label_histograms(few, classes) for few in labels.split(16)]
    whole, quarters = (torch.cat(part).double().numpy() for part in zip(*parts))
    return whole, quarters
