"""A training step of LGST, fast: its random draws, and the losses of models/lgst.py with everything kept that can be.

The frozen encoder sees each training image once; only the colour-jittered views, new in every step, go through it again.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from csad.data.images import View
from csad.progress import ProgressBar
from csad.settings import LgstSettings
from csad.training.feature_cache import FeatureCache

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import functional as TF

from models.backbone import Encoder, resize
from models.device import CACHE_BYTES, autocast, memory_format, send
from models.lgst import LGST
from models.lgst_on_features import FeatureLGST, averaged, moments

JITTER = 0.2  # brightness, contrast or saturation times 0.8 to 1.2
WARM_UP = 50  # steps of a short run
LAST_PHASE = 0.95  # share of the steps after which the learning rate drops to a tenth


class PenaltyPictures(Protocol):
    """A source of ImageNet-like pictures."""

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """One picture (1, 3, 256, 256), float32 RGB in 0..255."""
        ...


class Sample(NamedTuple):
    """The random choices of one step."""

    indices: Tensor  # (B,) int64 into the training images
    adjustments: Tensor  # (B,) int64, what the jitter changes: 0 brightness, 1 contrast, 2 saturation; or (0,)
    factors: Tensor  # (B,) float32, by how much; (0,) on steps without augmented views
    penalty: Tensor  # (1, 3, 256, 256) float RGB in 0..255, or (0, 3, 256, 256) on steps without one
    dropout_seed: int


class Batch(NamedTuple):
    """What one step sees: float RGB in 0..255."""

    images: Tensor  # (B, 3, 256, 256)
    augmented: Tensor  # the same, colour-jittered, or (0, 3, 256, 256) on steps that train the local head alone
    penalty: Tensor  # (1, 3, 256, 256), or (0, 3, 256, 256) on steps without one
    teacher: tuple[Tensor, ...]  # Teacher.project of the images


def draw_sample(count: int, penalties: PenaltyPictures, settings: LgstSettings, step: int, category: str, seed: int) -> Sample:
    """Make the random choices of one step.

    They depend on seed, category and step alone, so a resumed run sees what an uninterrupted one would have.

    Args:
        count: number of training images.
    """
    rng = np.random.default_rng([seed, zlib.crc32(category.encode()), step])
    dropout_seed = int(rng.integers(2**63))
    indices = draw_indices(count, settings.batch_size, step, category, seed)
    jitters = [(int(rng.integers(3)), float(rng.uniform(1 - JITTER, 1 + JITTER))) for _ in indices]
    adjustments, factors = (torch.tensor(values) for values in zip(*jitters))
    penalty = penalties.draw(rng) if step % settings.penalty_every == 0 else np.zeros((0, 3, 256, 256), np.float32)
    augmented = settings.batch_size if step % settings.global_every == 0 else 0
    return Sample(indices, adjustments[:augmented], factors[:augmented], torch.from_numpy(penalty), dropout_seed)


def draw_indices(count: int, batch_size: int, step: int, category: str, seed: int) -> Tensor:
    """Which of ``count`` images a step sees, (B,) int64: shuffled epochs, every image before any is seen twice."""
    drawn = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, within = divmod(position, count)
        order = np.random.default_rng([seed, zlib.crc32(category.encode()), epoch, 1]).permutation(count)
        drawn.append(int(order[within]))
    return torch.tensor(drawn)


class EncodedImages:
    """The encoder's maps of all training images in half precision, and what teacher and networks need of them.

    They are kept where there is room for them, else read and encoded anew whenever they are asked for.

    Args:
        description: of the progress bar.
    """

    def __init__(self, paths: Sequence[Path], view: View, encoder: Encoder, device: torch.device, description: str):
        self.paths, self.view, self.encoder, self.device = paths, view, encoder, device
        self.kept: list[tuple[Tensor, ...]] | None = None
        if len(paths) * sum(one.nbytes for one in self._encode([0])) <= CACHE_BYTES:
            self.kept = [self._encode([index]) for index in ProgressBar(range(len(paths)), desc=description, leave=False)]

    def fit(self, model: FeatureLGST) -> None:
        """Set the teacher's projection and the means and stds of what student and autoencoder see."""
        model.teacher.fit(*moments(averaged(maps) for maps in self._all()))
        for name, index, size in (("fourth", 0, None), ("sixteenth", 2, (32, 32))):
            mean, covariance = moments(maps[index] if size is None else resize(maps[index], size) for maps in self._all())
            getattr(model, f"{name}_mean").copy_(mean.view(1, -1, 1, 1))
            getattr(model, f"{name}_std").copy_(covariance.diagonal().clamp(min=1e-12).sqrt().view(1, -1, 1, 1))

    @torch.no_grad()
    def batch(self, indices: Tensor, model: FeatureLGST) -> tuple[Tensor, Tensor, Tensor]:
        """The map at 1/4, teacher features, and the map at 1/16 of some images, float32 on the device."""
        maps = tuple(torch.cat(level).float() for level in zip(*(self._maps(int(index)) for index in indices)))
        return maps[0], model.teacher(maps), maps[2]

    def _all(self) -> Iterator[tuple[Tensor, ...]]:
        return (tuple(one.float() for one in self._maps(index)) for index in range(len(self.paths)))

    def _maps(self, index: int) -> tuple[Tensor, ...]:
        return self._encode([index]) if self.kept is None else self.kept[index]

    @torch.no_grad()
    def _encode(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        views = torch.from_numpy(self.view.read_middle([self.paths[index] for index in indices])).to(self.device).float()
        return tuple(one.half() for one in self.encoder(views))


class Batches:
    """All training images on the device, with what teacher and encoder make of them.

    Args:
        images: (N, 3, 256, 256) uint8 RGB.
        description: of the progress bar.
    """

    def __init__(self, images: Tensor, model: LGST, encoder: Encoder, device: torch.device, description: str):
        self.images, self.device, self.model = images.to(device), device, model
        self.teacher = FeatureCache(lambda batch: model.teacher.project(*encoder(batch)[1:]), self.images,
                                    torch.arange(len(images), device=device), description)

    @torch.no_grad()
    def fit_teacher_normalisation(self) -> None:
        """Set the teacher's channel mean and std over all positions of all training images."""
        count, total, total_of_squares = 0, 0.0, 0.0
        for maps in self.teacher:
            # On the CPU, because MPS has no float64.
            features = self.model.teacher.assemble(*maps).cpu().double()
            count += features.shape[0] * features.shape[2] * features.shape[3]
            total = total + features.sum((0, 2, 3))
            total_of_squares = total_of_squares + features.square().sum((0, 2, 3))
        mean = total / count
        std = (total_of_squares / count - mean**2).clamp(min=0).sqrt()
        self.model.fit_teacher_normalisation(mean.float(), std.float())

    def batch(self, sample: Sample) -> Batch:
        """Fetch and jitter the drawn images on the device; also seeds PyTorch, for the autoencoder's dropout."""
        torch.manual_seed(sample.dropout_seed)
        indices, adjustments, factors, penalty = (send(part, self.device) for part in sample[:4])
        images = self.images[indices].float()
        return Batch(images, jitter_colour(images[:len(factors)], adjustments, factors), penalty, self.teacher[indices])


def jitter_colour(images: Tensor, adjustments: Tensor, factors: Tensor) -> Tensor:
    """Change one of brightness, contrast and saturation of each image by its factor.

    As torchvision's adjust_brightness, adjust_contrast and adjust_saturation, but for a batch in which they are mixed.

    Args:
        images: (B, 3, H, W) float in 0..255; the result is, too.
        adjustments: (B,) 0 brightness, 1 contrast, 2 saturation.
        factors: (B,) 1 changes nothing.
    """
    grey = TF.rgb_to_grayscale(images)
    what = adjustments.view(-1, 1, 1, 1)
    # Away from black, away from the picture's mean grey, or away from the pixel's own grey.
    pivot = torch.where(what == 0, 0.0, torch.where(what == 1, grey.mean((1, 2, 3), keepdim=True), grey))
    return torch.lerp(pivot.expand_as(images), images, factors.view(-1, 1, 1, 1)).clamp(0, 255)


def hard_mean(differences: Tensor, quantile: float) -> Tensor:
    """Mean of the values at or over their quantile (by selection, not by sorting)."""
    values = differences.flatten()
    kept = values.numel() - int(np.ceil(quantile * (values.numel() - 1)))
    return values.topk(kept, sorted=False).values.mean()


def fast_losses(model: LGST, encoder: Encoder, batch: Batch, hard_quantile: float, precision: str) -> dict[str, Tensor]:
    """`models.lgst.losses` of one batch: the student sees all pictures at once, each asked for one head.

    Args:
        precision: fp32 or bf16, what convolutions multiply in; differences are taken in float32.
    """
    count, end = len(batch.images), len(batch.images) + len(batch.augmented)
    pictures = torch.cat([batch.images, batch.augmented, batch.penalty]).contiguous(memory_format=memory_format(precision))
    with autocast(pictures.device, precision):
        teacher = [batch.teacher]
        if len(batch.augmented):
            with torch.no_grad():
                teacher.append(model.teacher.project(*encoder(pictures[count:end])[1:]))
        normalised = model.normalise(pictures)
        features = model.local_st.trunk(normalised)
        # Originals and penalty are asked for what the teacher says, augmented views for what the autoencoder says.
        local = model.local_st.conv_st(torch.cat([features[:count], features[end:]])).float()
        if len(batch.augmented):
            global_ = model.local_st.conv_ae(features[count:end]).float()
            decoded = model.autoencoder(normalised[count:end]).float()
    targets = model.normalise_teacher(model.teacher.assemble(*(torch.cat(maps).float() for maps in zip(*teacher))))
    nothing = local.new_zeros(())
    return {
        "local": hard_mean((targets[:count] - local[:count]).square(), hard_quantile),
        "penalty": local[count:].square().mean() if len(batch.penalty) else nothing,
        "autoencoder": (targets[count:] - decoded).square().mean() if len(batch.augmented) else nothing,
        "global": (decoded - global_).square().mean() if len(batch.augmented) else nothing,
    }


def warm_cosine(settings: LgstSettings, step: int) -> float:
    """Of one step: rising over the first steps, then falling along half a cosine."""
    return settings.lr * min(1, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / settings.steps)) / 2


def learning_rate(settings: LgstSettings, step: int) -> float:
    """Of one step: a tenth in the last phase, or falling along half a cosine."""
    if settings.cosine:
        return settings.lr * (1 + math.cos(math.pi * step / settings.steps)) / 2
    return settings.lr * (0.1 if step >= max(1, int(LAST_PHASE * settings.steps)) else 1)
