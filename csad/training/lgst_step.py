"""What a training step of LGST sees: its random draws, and the teacher's features, kept where they never change.

The frozen encoder sees each training image once; only the colour-jittered views, new in every step, go through it again.
The losses are in models/lgst.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from csad.data.images import View
from csad.progress import ProgressBar
from csad.settings import LgstSettings
from csad.standins.penalty_pictures import PenaltyPictures
from csad.training.draws import shuffled_epochs, step_generator
from csad.training.feature_cache import FeatureCache

import torch
from torch import Tensor

from models.backbone import Encoder, resize
from models.device import CACHE_BYTES, autocast, memory_format, send
from models.lgst import LGST
from models.lgst_on_features import CODED_SIZE, FeatureLGST, averaged
from models.statistics import ChannelMoments, channel_covariance

JITTER = 0.2  # brightness, contrast or saturation times 0.8 to 1.2


class Sample(NamedTuple):
    """The random choices of one step."""

    indices: Tensor  # (B,) int64 into the training images
    adjustments: (
        Tensor  # (B,) int64, what the jitter changes: 0 brightness, 1 contrast, 2 saturation; or (0,)
    )
    factors: Tensor  # (B,) float32, by how much; (0,) on steps without augmented views
    penalty: Tensor  # (1, 3, 256, 256) float RGB in 0..255
    dropout_seed: int


class Batch(NamedTuple):
    """The arguments of `LGST.training_features`: images are float RGB in 0..255, teacher features float32."""

    images: Tensor  # (B, 3, 256, 256)
    teacher: Tensor  # (B, channels, 64, 64) of them
    augmented: Tensor | None  # the same, colour-jittered; None on steps that train the local head alone
    augmented_teacher: Tensor | None
    penalty: Tensor  # (1, 3, 256, 256)


def draw_sample(
    count: int, penalties: PenaltyPictures, settings: LgstSettings, step: int, category: str, seed: int
) -> Sample:
    """Make the random choices of one step.

    They depend on seed, category and step alone, so a resumed run sees what an uninterrupted one would have.

    Args:
        count: number of training images.
    """
    rng = step_generator(seed, category, step)
    dropout_seed = int(rng.integers(2**63))
    indices = shuffled_epochs(count, settings.batch_size, step, category, seed)
    jitters = [(int(rng.integers(3)), float(rng.uniform(1 - JITTER, 1 + JITTER))) for _ in indices]
    adjustments, factors = (torch.tensor(values) for values in zip(*jitters))
    penalty = torch.from_numpy(penalties.draw(rng))
    augmented = settings.batch_size if step % settings.global_every == 0 else 0
    return Sample(indices, adjustments[:augmented], factors[:augmented], penalty, dropout_seed)


class EncodedImages:
    """The encoder's maps of all training images in half precision, and what teacher and networks need of them.

    They are kept where there is room for them, else read and encoded anew whenever they are asked for.

    Args:
        description: of the progress bar.
    """

    def __init__(
        self, paths: Sequence[Path], view: View, encoder: Encoder, device: torch.device, description: str
    ):
        self.paths, self.view, self.encoder, self.device = paths, view, encoder, device
        self.kept: list[tuple[Tensor, ...]] | None = None
        if len(paths) * sum(level.nbytes for level in self._encode(0)) <= CACHE_BYTES:
            self.kept = [*map(self._encode, ProgressBar(range(len(paths)), desc=description, leave=False))]

    def fit(self, model: FeatureLGST) -> None:
        """Set the teacher's projection and the means and stds of what student and autoencoder see."""
        model.teacher.fit(*channel_covariance(averaged(maps) for maps in self._all()))
        fine, coarse = ChannelMoments(), ChannelMoments()
        for stride4, _, stride16 in self._all():
            fine.add(stride4)
            coarse.add(resize(stride16, CODED_SIZE))
        for name, moments in (("fourth", fine), ("sixteenth", coarse)):
            getattr(model, f"{name}_mean").copy_(moments.mean.view(1, -1, 1, 1))
            getattr(model, f"{name}_std").copy_(moments.std.clamp(min=1e-6).view(1, -1, 1, 1))

    @torch.no_grad()
    def batch(self, indices: Tensor, model: FeatureLGST) -> tuple[Tensor, Tensor, Tensor]:
        """The map at 1/4, teacher features, and the map at 1/16 of some images, float32 on the device.

        They are the arguments of `FeatureLGST.training_features`.
        """
        levels = zip(*map(self._maps, indices.tolist()))
        maps = tuple(torch.cat(level).float() for level in levels)
        return maps[0], model.teacher(maps), maps[2]

    def _all(self) -> Iterator[tuple[Tensor, ...]]:
        return (tuple(level.float() for level in self._maps(index)) for index in range(len(self.paths)))

    def _maps(self, index: int) -> tuple[Tensor, ...]:
        return self._encode(index) if self.kept is None else self.kept[index]

    @torch.no_grad()
    def _encode(self, index: int) -> tuple[Tensor, ...]:
        views = torch.from_numpy(self.view.read_tile_sized([self.paths[index]])).to(self.device).float()
        return tuple(level.half() for level in self.encoder(views))


class Batches:
    """All training images on the device, with what the teacher makes of them.

    Args:
        images: (N, 3, 256, 256) uint8 RGB.
        precision: fp32 or bf16, what the encoder's convolutions and the teacher's projection multiply in.
        description: of the progress bar.
    """

    def __init__(
        self,
        images: Tensor,
        model: LGST,
        encoder: Encoder,
        device: torch.device,
        precision: str,
        description: str,
    ):
        self.images, self.device, self.model, self.encoder = images.to(device), device, model, encoder
        self.precision = precision
        self.projections = FeatureCache(
            lambda batch: model.teacher.project_levels(*encoder(batch)[1:]),
            self.images,
            torch.arange(len(images), device=device),
            description,
        )

    @torch.no_grad()
    def fit_teacher_normalisation(self) -> None:
        """Set the teacher's channel mean and std over all positions of all training images."""
        moments = ChannelMoments()
        for maps in self.projections:
            moments.add(self.model.teacher.merge_levels(*maps))
        self.model.fit_teacher_normalisation(moments.mean.float(), moments.std.float())

    @torch.no_grad()
    def batch(self, sample: Sample) -> Batch:
        """Fetch and jitter the drawn images on the device; also seeds PyTorch, for the autoencoder's dropout."""
        torch.manual_seed(sample.dropout_seed)
        indices, adjustments, factors, penalty = (send(part, self.device) for part in sample[:4])
        images = self.images[indices].float()
        augmented = augmented_teacher = None
        if len(factors):
            augmented = self._ordered(jitter_colour(images, adjustments, factors))
            with autocast(self.device, self.precision):
                levels = self.model.teacher.project_levels(*self.encoder(augmented)[1:])
            augmented_teacher = self._teacher_features(levels)
        teacher = self._teacher_features(self.projections[indices])
        return Batch(self._ordered(images), teacher, augmented, augmented_teacher, self._ordered(penalty))

    def _teacher_features(self, levels: tuple[Tensor, ...]) -> Tensor:
        merged = self.model.teacher.merge_levels(*(level.float() for level in levels))
        return self.model.normalise_teacher(merged)

    def _ordered(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=memory_format(self.precision))


def jitter_colour(images: Tensor, adjustments: Tensor, factors: Tensor) -> Tensor:
    """Change one of brightness, contrast and saturation of each image by its factor.

    As torchvision's adjust_brightness, adjust_contrast and adjust_saturation, but for a batch in which they are mixed.

    Args:
        images: (B, 3, H, W) float in 0..255; the result is, too.
        adjustments: (B,) 0 brightness, 1 contrast, 2 saturation.
        factors: (B,) 1 changes nothing.
    """
    from torchvision.transforms.functional import rgb_to_grayscale  # takes a second, and few presets need it

    grey = rgb_to_grayscale(images)
    what = adjustments.view(-1, 1, 1, 1)
    # Away from black, away from the picture's mean grey, or away from the pixel's own grey.
    pivot = torch.where(what == 0, 0.0, torch.where(what == 1, grey.mean((1, 2, 3), keepdim=True), grey))
    return torch.lerp(pivot.expand_as(images), images, factors.view(-1, 1, 1, 1)).clamp(0, 255)
