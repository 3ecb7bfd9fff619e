"""One training step of the segmentor: its random draws and its losses (paper section 3.2, METHOD.md section 2)."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from data.images import normalise
from models.device import autocast, memory_format
from settings import SegmentorSettings
from training import losses
from training.feature_cache import cache_room, send
from training.logical_synthesis import synthesise

AUGMENTATION_PROBABILITY = 0.5  # of each pair: place (shift and scale, rotation), light (brightness and contrast)
SHIFT = SCALE = 0.01  # of the side
ROTATION = 2.0  # degrees
BRIGHTNESS = CONTRAST = 0.05
ENCODING_BATCH = 8


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


class Draw(NamedTuple):
    """The random choices of one step, logical synthesis done."""

    images: Tensor  # (B, 3, 256, 256) uint8, trusted images with pasted components
    labels: Tensor  # (B, 256, 256) uint8, theirs
    movements: Tensor  # (B, 2, 3) float32, see `augment`
    light: Tensor  # (B, 2) float32, see `augment`
    others: Tensor  # (B,) int64 indices of images for the unsupervised losses, or (0,) before these join
    compared: Tensor  # (B,) int64 indices of the trusted images that the others' histograms are compared with


class Batch(NamedTuple):
    """What one step sees: float RGB in 0..255, labels int64."""

    images: Tensor  # (B, 3, 256, 256) trusted, with logical synthesis and augmentation
    labels: Tensor  # (B, 256, 256) theirs
    others: Tensor  # (B, 3, 256, 256) as they are, or (0, 3, 256, 256) before the unsupervised losses join
    other_labels: Tensor  # (B, 256, 256) of random trusted images
    other_features: tuple[Tensor, Tensor] | None  # the encoder's first and last map of the others, if they were kept


def draw(data: TrainingData, settings: SegmentorSettings, step: int, unsupervised: bool, category: str, seed: int) -> Draw:
    """Make the random choices of one step, which depend on seed, category and step alone: a resumed run sees the same."""
    key = [seed, zlib.crc32(category.encode())]
    rng = np.random.default_rng([*key, step])
    images, labels, movements, light = [], [], [], []
    for index in _take_turns(data.trusted, step, settings.batch_size, key):
        image, label = synthesise(data.images[index].permute(1, 2, 0).numpy(), data.labels[index],
                                  data.backgrounds[index], rng, settings.paste_distance, settings.fill_holes)
        images.append(image.transpose(2, 0, 1))
        labels.append(label)
        movements.append(_draw_movement(rng))
        light.append(_draw_light(rng))
    count = settings.batch_size if unsupervised else 0
    others = rng.choice(data.others, count, replace=len(data.others) < count)
    compared = rng.choice(data.trusted, count)
    return Draw(torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels)), torch.tensor(np.stack(movements)),
                torch.tensor(light), torch.from_numpy(others).long(), torch.from_numpy(compared).long())


class Lessons:
    """All training images and labels on the device, and what the encoder makes of those that are never changed.

    Args:
        description: of the progress bar.
    """

    def __init__(self, data: TrainingData, encoder: nn.Module, device: torch.device, precision: str, description: str):
        self.device = device
        self.images, self.labels = data.images.to(device), torch.from_numpy(data.labels).to(device)
        self._features: tuple[Tensor, Tensor] | None = None
        others = torch.from_numpy(data.others).to(device)
        sample = encode(encoder, self.images[others[:1]], precision)
        needed = len(others) * sum(maps.nbytes for maps in sample)
        if needed > cache_room(device):
            return
        kept = tuple(maps.new_empty(len(others), *maps.shape[1:]) for maps in sample)
        for batch in tqdm(torch.arange(len(others)).split(ENCODING_BATCH), desc=description, leave=False):
            for space, found in zip(kept, encode(encoder, self.images[others[batch]], precision)):
                space[batch] = found
        self._features = kept
        self._row = torch.zeros(len(data.images), dtype=torch.int64, device=device)
        self._row[others] = torch.arange(len(others), device=device)

    def batch(self, drawn: Draw) -> Batch:
        """Augment the drawn trusted images on the device and fetch the others."""
        images, labels, movements, light, others, compared = (send(part, self.device) for part in drawn)
        images, labels = augment(images, labels, movements, light)
        known = None
        if self._features is not None:
            rows = self._row[others]
            known = tuple(maps[rows] for maps in self._features)
        return Batch(images, labels, self.images[others].float(), self.labels[compared].long(), known)


def augment(images: Tensor, labels: Tensor, movements: Tensor, light: Tensor) -> tuple[Tensor, Tensor]:
    """Shift, scale, rotate, and change the light of a batch.

    Args:
        images: (B, 3, H, W) uint8.
        labels: (B, H, W) uint8, warped by nearest neighbour.
        movements: (B, 2, 3), from where in the old picture each place of the new one comes; both axes run from -1 to 1.
        light: (B, 2), gain and then offset of the values 0..255.

    Returns:
        Images, float in 0..255, and labels, int64.
    """
    grid = F.affine_grid(movements, list(images.shape), align_corners=True)
    warped = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=True)
    moved = F.grid_sample(labels[:, None].float(), grid, mode="nearest", padding_mode="reflection", align_corners=True)
    gain, offset = light.view(-1, 2, 1, 1, 1).unbind(1)
    return (warped * gain + offset).clamp(0, 255), moved[:, 0].round().long()


@torch.no_grad()
def encode(encoder: nn.Module, images: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """The two of the encoder's maps that the segmentor looks at, at 1/4 and 1/16, of RGB images in 0..255."""
    prepared = normalise(images).contiguous(memory_format=memory_format(precision))
    with autocast(images.device, precision):
        shallow, _, deep = encoder(prepared)
    return shallow, deep


def weighted_losses(segmentor: nn.Module, encoder: nn.Module, batch: Batch, settings: SegmentorSettings,
                    precision: str) -> dict[str, Tensor]:
    """The losses of one step, weighted, to be added up.

    Args:
        precision: fp32 or bf16, what convolutions multiply in; losses are taken in float32.

    Returns:
        ce, focal and dice of the trusted images; where there are others, their histogram, and the entropy of both.
    """
    count = len(batch.images)
    if batch.other_features is None:
        shallow, deep = encode(encoder, torch.cat([batch.images, batch.others]), precision)
    else:
        shallow, deep = (torch.cat(maps) for maps in zip(encode(encoder, batch.images, precision), batch.other_features))
    # One pass for both kinds of images: batch norm sees what it will see in use.
    with autocast(batch.images.device, precision):
        logits = segmentor((shallow, None, deep))
    logits = logits.float()
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


def _draw_movement(rng: np.random.Generator) -> np.ndarray:
    """(2, 3) float32 for `augment`: where the augmented picture's places lie in the old one."""
    if rng.random() >= AUGMENTATION_PROBABILITY:
        return np.eye(2, 3, dtype=np.float32)
    angle = math.radians(rng.uniform(-ROTATION, ROTATION))
    scale = 1 + rng.uniform(-SCALE, SCALE)
    shift = 2 * rng.uniform(-SHIFT, SHIFT, 2)  # a side is 2 long
    back = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) / scale
    return np.c_[back, -back @ shift].astype(np.float32)


def _draw_light(rng: np.random.Generator) -> tuple[float, float]:
    """Gain and offset for `augment`."""
    if rng.random() >= AUGMENTATION_PROBABILITY:
        return 1.0, 0.0
    return 1 + rng.uniform(-CONTRAST, CONTRAST), 255 * rng.uniform(-BRIGHTNESS, BRIGHTNESS)
