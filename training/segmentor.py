"""One training step of the segmentor: its random draws and its losses (paper section 3.2, METHOD.md section 2)."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from loco.images import normalise
from settings import SegmentorSettings
from training import losses
from training.logical_synthesis import synthesise

AUGMENTATION_PROBABILITY = 0.5  # of each pair: place (shift and scale, rotation), light (brightness and contrast)
SHIFT = SCALE = 0.01  # of the side
ROTATION = 2.0  # degrees
BRIGHTNESS = CONTRAST = 0.05


@dataclass(frozen=True)
class TrainingData:
    """All training images of a category and what stage 1 says about them.

    Attributes:
        images: (N, 3, 256, 256) uint8 RGB.
        labels: (N, 256, 256) uint8 pseudo-labels; only those of trusted images are looked at.
        backgrounds: (N, 256, 256) bool, where logical synthesis pastes nothing.
        trusted: indices of the images whose labels are trusted.
        others: indices of the images for the unsupervised losses.
    """

    images: Tensor
    labels: np.ndarray
    backgrounds: np.ndarray
    trusted: np.ndarray
    others: np.ndarray


class Batch(NamedTuple):
    """What one step sees; images are uint8 RGB, labels int64."""

    images: Tensor  # (B, 3, 256, 256) trusted, with logical synthesis and augmentation
    labels: Tensor  # (B, 256, 256) theirs
    others: Tensor  # (B, 3, 256, 256) as they are, or (0, 3, 256, 256) before the unsupervised losses join
    other_labels: Tensor  # (B, 256, 256) of random trusted images

    def to(self, device: torch.device) -> Batch:
        return Batch(*(part.to(device) for part in self))


def draw_batch(data: TrainingData, settings: SegmentorSettings, step: int, unsupervised: bool, category: str,
               seed: int) -> Batch:
    """Draw the batch of one step, which depends on seed, category and step alone: a resumed run sees the same."""
    key = [seed, zlib.crc32(category.encode())]
    rng = np.random.default_rng([*key, step])
    images, labels = [], []
    for index in _take_turns(data.trusted, step, settings.batch_size, key):
        image, label = synthesise(data.images[index].permute(1, 2, 0).numpy(), data.labels[index],
                                  data.backgrounds[index], rng, settings.paste_distance, settings.fill_holes)
        image, label = augment(image, label, rng)
        images.append(torch.from_numpy(image.transpose(2, 0, 1).copy()))
        labels.append(torch.from_numpy(label.astype(np.int64)))
    count = settings.batch_size if unsupervised else 0
    others = rng.choice(data.others, count, replace=len(data.others) < count)
    compared = data.labels[rng.choice(data.trusted, count)]
    return Batch(torch.stack(images), torch.stack(labels), data.images[torch.from_numpy(others)],
                 torch.from_numpy(compared.astype(np.int64)))


def augment(image: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Shift, scale and rotate a little; change brightness and contrast a little; each pair with probability 0.5.

    Args:
        image: (H, W, 3) uint8.
        labels: (H, W) uint8, warped by nearest neighbour.
    """
    if rng.random() < AUGMENTATION_PROBABILITY:
        height, width = labels.shape
        movement = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), rng.uniform(-ROTATION, ROTATION),
                                           1 + rng.uniform(-SCALE, SCALE))
        movement[:, 2] += rng.uniform(-SHIFT, SHIFT, 2) * (width, height)
        image, labels = (cv2.warpAffine(picture, movement, (width, height), flags=interpolation,
                                        borderMode=cv2.BORDER_REFLECT_101)
                         for picture, interpolation in ((image, cv2.INTER_LINEAR), (labels, cv2.INTER_NEAREST)))
    if rng.random() < AUGMENTATION_PROBABILITY:
        gain, offset = 1 + rng.uniform(-CONTRAST, CONTRAST), rng.uniform(-BRIGHTNESS, BRIGHTNESS) * 255
        image = np.clip(image * gain + offset, 0, 255).round().astype(np.uint8)
    return image, labels


def weighted_losses(segmentor: nn.Module, encoder: nn.Module, batch: Batch,
                    settings: SegmentorSettings) -> dict[str, Tensor]:
    """The losses of one step, weighted, to be added up.

    Returns:
        ce, focal and dice of the trusted images; where there are others, their histogram, and the entropy of both.
    """
    count = len(batch.images)
    # One pass for both kinds of images: batch norm sees what it will see in use.
    images = normalise(torch.cat([batch.images, batch.others]))
    with torch.no_grad():
        features = encoder(images)
    logits = segmentor(features)
    probabilities = logits.softmax(1)
    supervised, unsupervised = probabilities[:count], probabilities[count:]
    parts = {
        "ce": settings.weight_ce * losses.cross_entropy(logits[:count], batch.labels, settings.softmax_twice),
        "focal": settings.weight_focal * losses.focal(supervised, batch.labels),
        "dice": settings.weight_dice * losses.balanced_dice(supervised, batch.labels),
    }
    if len(unsupervised):
        parts["histogram"] = settings.weight_histogram * losses.histogram(unsupervised, batch.other_labels)
        parts["entropy"] = settings.weight_entropy * (losses.entropy(supervised) + losses.entropy(unsupervised))
    return parts


def learning_rate(settings: SegmentorSettings, step: int, steps: int) -> float:
    """The learning rate of one step: from `lr` to its final share along half a cosine."""
    left = (1 + math.cos(math.pi * step / steps)) / 2
    return settings.lr * (settings.final_lr_share + (1 - settings.final_lr_share) * left)


def _take_turns(indices: np.ndarray, step: int, count: int, key: list[int]) -> list[int]:
    """The indices of one step from endless shuffled epochs: each is seen before any is seen twice."""
    chosen = []
    for position in range(step * count, (step + 1) * count):
        epoch, within = divmod(position, len(indices))
        # The 1 keeps this generator apart from those of the steps.
        chosen.append(int(np.random.default_rng([*key, epoch, 1]).permutation(indices)[within]))
    return chosen
