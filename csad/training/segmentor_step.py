"""A training step of the segmentor: its random draws, and what can be kept (paper section 3.2, docs/method.md section 2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from csad.settings import SegmentorSettings
from csad.training.draws import shuffled_epochs, step_generator
from csad.training.feature_cache import FeatureCache
from csad.training.logical_synthesis import synthesise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.backbone import Encoder
from models.device import autocast, memory_format, send
from models.segmentor import Segmentor, losses

AUGMENTATION_PROBABILITY = 0.5  # of each pair: affine (shift and scale, rotation), brightness and contrast
SHIFT = SCALE = 0.01  # of the side
ROTATION = 2.0  # degrees
BRIGHTNESS = CONTRAST = 0.05


@dataclass(frozen=True)
class TrainingData:
    """All training images of a category and what stage 1 says about them."""

    images: Tensor  # (N, 3, 256, 256) uint8 RGB
    # (N, 256, 256) uint8 pseudo-labels; of these three, only those of trusted images are looked at.
    labels: np.ndarray
    # (N, 256, 256) uint16, the components that logical synthesis pastes from; 0 for none.
    instances: np.ndarray
    backgrounds: np.ndarray  # (N, 256, 256) bool, where logical synthesis pastes little
    trusted: np.ndarray  # indices of the images whose labels are trusted
    unlabelled: np.ndarray  # indices of the images for the unsupervised losses


class Sample(NamedTuple):
    """The random choices of one step, logical synthesis done."""

    images: Tensor  # (B, 3, 256, 256) uint8, trusted images with pasted components
    labels: Tensor  # (B, 256, 256) uint8, theirs
    affine: Tensor  # (B, 2, 3) float32, see `augment`
    photometric: Tensor  # (B, 2) float32, see `augment`
    unlabelled: Tensor  # (B,) int64 indices; (0,) for a joint pass before the unsupervised losses join
    reference_labels: (
        Tensor  # (B,) int64 indices of trusted images, for the histogram loss; (0,) before it joins
    )


class Batch(NamedTuple):
    """What one step sees: float RGB in 0..255, labels int64."""

    images: Tensor  # (B, 3, 256, 256) trusted, with logical synthesis and augmentation
    labels: Tensor  # (B, 256, 256) theirs
    unlabelled: tuple[Tensor, ...]  # the encoder's maps at 1/4 and 1/16 of the unlabelled images
    reference_labels: (
        Tensor  # (B, 256, 256) label maps of random trusted images; (0, ...) before their loss joins
    )


def draw_sample(
    data: TrainingData, settings: SegmentorSettings, step: int, unsupervised: bool, category: str, seed: int
) -> Sample:
    """Make the random choices of one step, which depend on seed, category and step alone: a resumed run sees the same."""
    rng = step_generator(seed, category, step)
    images, labels, affine, photometric = [], [], [], []
    drawn = shuffled_epochs(len(data.trusted), settings.batch_size, step, category, seed).numpy()
    for index in data.trusted[drawn]:
        picture = data.images[index].permute(1, 2, 0).numpy()
        maps = data.labels[index], data.instances[index], data.backgrounds[index]
        image, label, _ = synthesise(picture, *maps, rng, settings.paste_distance, settings.paste_trials)
        images.append(image.transpose(2, 0, 1))
        labels.append(label)
        affine.append(_draw_affine(rng))
        photometric.append(_draw_photometric(rng))
    count = settings.batch_size if unsupervised or not settings.joint_pass else 0
    unlabelled = rng.choice(data.unlabelled, count, replace=len(data.unlabelled) < count)
    reference_labels = rng.choice(data.trusted, count if unsupervised else 0)
    return Sample(
        torch.from_numpy(np.stack(images)),
        torch.from_numpy(np.stack(labels)),
        torch.tensor(np.stack(affine)),
        torch.tensor(photometric),
        torch.from_numpy(unlabelled).long(),
        torch.from_numpy(reference_labels).long(),
    )


class Batches:
    """All training labels on the device, and what the encoder makes of the images that are never changed.

    Args:
        description: of the progress bar.
    """

    def __init__(
        self, data: TrainingData, encoder: Encoder, device: torch.device, precision: str, description: str
    ):
        self.device, self.labels = device, torch.from_numpy(data.labels).to(device)
        self.features = FeatureCache(
            lambda batch: encode(encoder, batch, precision),
            data.images.to(device),
            torch.from_numpy(data.unlabelled).to(device),
            description,
        )

    def batch(self, sample: Sample) -> Batch:
        """Augment the drawn trusted images on the device and fetch the unlabelled ones."""
        *trusted, unlabelled, reference_labels = (send(part, self.device) for part in sample)
        return Batch(*augment(*trusted), self.features[unlabelled], self.labels[reference_labels].long())


def augment(images: Tensor, labels: Tensor, affine: Tensor, photometric: Tensor) -> tuple[Tensor, Tensor]:
    """Shift, scale, rotate, and change brightness and contrast of a batch.

    Args:
        images: (B, 3, H, W) uint8.
        labels: (B, H, W) uint8, warped by nearest neighbour.
        affine: (B, 2, 3), from where in the old picture each place of the new one comes; both axes run from -1 to 1.
            What comes in from outside is 0, in images and labels.
        photometric: (B, 2), gain and then offset of the values 0..255.

    Returns:
        Images, float in 0..255, and labels, int64.
    """
    grid = F.affine_grid(affine, list(images.shape), align_corners=True)
    warped = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    values = labels[:, None].float()
    moved = F.grid_sample(values, grid, mode="nearest", padding_mode="zeros", align_corners=True)
    gain, offset = photometric.view(-1, 2, 1, 1, 1).unbind(1)
    return (warped * gain + offset).clamp(0, 255), moved[:, 0].round().long()


@torch.no_grad()
def encode(encoder: Encoder, images: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """The two of the encoder's maps that the segmentor looks at, at 1/4 and 1/16, of RGB images in 0..255."""
    with autocast(images.device, precision):
        shallow, _, deep = encoder(images.contiguous(memory_format=memory_format(precision)))
    return shallow, deep


def step_losses(
    segmentor: Segmentor, encoder: Encoder, batch: Batch, settings: SegmentorSettings, precision: str
) -> dict[str, Tensor]:
    """`models.segmentor.losses` of one batch.

    Trusted and unlabelled images pass the segmentor one after the other: batch norm normalises each by itself,
    and its running statistics see both, also before the unsupervised losses join. With ``joint_pass`` they pass
    it together, once these losses join.

    Args:
        precision: fp32 or bf16, what convolutions multiply in; losses are taken in float32.
    """
    trusted, count = encode(encoder, batch.images, precision), len(batch.images)
    if settings.joint_pass:
        both = tuple(torch.cat(maps) for maps in zip(trusted, batch.unlabelled))
        logits = _logits(segmentor, both, precision)
        return losses(logits[:count], batch.labels, logits[count:], batch.reference_labels, settings)
    logits = _logits(segmentor, trusted, precision)
    # Before the unsupervised losses join only batch norm's running statistics change.
    with torch.set_grad_enabled(len(batch.reference_labels) > 0):
        unlabelled = _logits(segmentor, batch.unlabelled, precision)
    return losses(logits, batch.labels, unlabelled, batch.reference_labels, settings)


def _logits(segmentor: Segmentor, maps: tuple[Tensor, ...], precision: str) -> Tensor:
    shallow, deep = maps
    with autocast(shallow.device, precision):
        logits = segmentor((shallow, None, deep))
    return logits.float()


def _draw_affine(rng: np.random.Generator) -> np.ndarray:
    """(2, 3) float32 for `augment`: where the augmented picture's places lie in the old one."""
    if rng.random() >= AUGMENTATION_PROBABILITY:
        return np.eye(2, 3, dtype=np.float32)
    angle = math.radians(rng.uniform(-ROTATION, ROTATION))
    scale = 1 + rng.uniform(-SCALE, SCALE)
    shift = 2 * rng.uniform(-SHIFT, SHIFT, 2)  # a side is 2 long
    back = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) / scale
    return np.c_[back, -back @ shift].astype(np.float32)


def _draw_photometric(rng: np.random.Generator) -> tuple[float, float]:
    """Gain and offset for `augment`."""
    if rng.random() >= AUGMENTATION_PROBABILITY:
        return 1.0, 0.0
    return 1 + rng.uniform(-CONTRAST, CONTRAST), 255 * rng.uniform(-BRIGHTNESS, BRIGHTNESS)
