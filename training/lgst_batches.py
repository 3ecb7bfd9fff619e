"""One training step of LGST: its random draws and its losses (paper section 3.3, METHOD.md section 3).

What every step would do again the same way is done once: images lie on the device as 8-bit RGB, and what the frozen
encoder and the teacher's projection make of them is kept. Only the colour-jittered twins, new in every step, go
through the encoder. tests/reference_steps.py says the same step as plainly as METHOD.md; both agree.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms import functional as TF
from tqdm import tqdm

from data.images import normalise, read_rgb
from data.layouts import IMAGE_SUFFIXES
from errors import UserError
from models.device import autocast, memory_format
from models.lgst import LGST
from settings import IMAGE_SIZE, LgstSettings
from training.feature_cache import cache_room, send
from training.formula_pictures import render_picture

JITTER = 0.2
GREY_PROBABILITY = 0.3
PENALTY_RESIZE = 512
TEACHING_BATCH = 8
LAST_PHASE = 0.95  # share of the steps after which the learning rate drops to a tenth


class Draw(NamedTuple):
    """The random choices of one step."""

    indices: Tensor  # (B,) int64 into the training images
    adjustments: Tensor  # (B,) int64, what the twin's jitter changes: 0 brightness, 1 contrast, 2 saturation; or (0,)
    factors: Tensor  # (B,) float32, by how much; (0,) on steps without twins
    penalty: Tensor  # (1, 3, 256, 256) float RGB in 0..255, or (0, 3, 256, 256) on steps without one
    dropout_seed: int


class Batch(NamedTuple):
    """What one step sees: float RGB in 0..255, not yet normalised."""

    images: Tensor  # (B, 3, 256, 256)
    twins: Tensor  # the same, colour-jittered, or (0, 3, 256, 256) on steps that train the local head alone
    penalty: Tensor  # (1, 3, 256, 256), or (0, 3, 256, 256) on steps without one
    taught: tuple[Tensor, Tensor] | None  # Teacher.project of the images, if it was kept


class PenaltyImages:
    """ImageNet-like pictures on which the student should say nothing.

    Args:
        source: a folder of pictures, or ``rendered`` for formula-made ones (a stand-in for ImageNet).

    Raises:
        UserError: the folder has no pictures.
    """

    def __init__(self, source: str):
        self.paths: list[Path] = []
        if source != "rendered":
            self.paths = sorted(path for path in Path(source).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
            if not self.paths:
                raise UserError(f"lgst.penalty_images: no pictures under {source}; name a folder of pictures or 'rendered'")

    def draw(self, rng: np.random.Generator) -> Tensor:
        """One (1, 3, 256, 256) picture, float in 0..255: resized to 512, grey with p 0.3, centre 256."""
        if self.paths:
            picture = read_rgb(self.paths[rng.integers(len(self.paths))], PENALTY_RESIZE)
            margin = (PENALTY_RESIZE - IMAGE_SIZE) // 2
            picture = picture[margin:margin + IMAGE_SIZE, margin:margin + IMAGE_SIZE]
        else:
            # The centre of a formula picture is a formula picture.
            picture = render_picture(rng, IMAGE_SIZE)
        tensor = torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1))).float()
        if rng.random() < GREY_PROBABILITY:
            tensor = TF.rgb_to_grayscale(tensor, num_output_channels=3)
        return tensor[None]


def draw(count: int, penalties: PenaltyImages, settings: LgstSettings, step: int, category: str, seed: int) -> Draw:
    """Make the random choices of one step.

    They depend on seed, category and step alone, so a resumed run sees what an uninterrupted one would have.

    Args:
        count: number of training images.
    """
    rng = np.random.default_rng([seed, zlib.crc32(category.encode()), step])
    dropout_seed = int(rng.integers(2**63))
    # Shuffled epochs: every image is seen before any is seen twice, whatever the batch size.
    first = step * settings.batch_size
    indices = []
    for position in range(first, first + settings.batch_size):
        epoch, within = divmod(position, count)
        order = np.random.default_rng([seed, zlib.crc32(category.encode()), epoch, 1]).permutation(count)
        indices.append(int(order[within]))
    jitters = [(int(rng.integers(3)), float(rng.uniform(1 - JITTER, 1 + JITTER))) for _ in indices]
    penalty = penalties.draw(rng) if step % settings.penalty_every == 0 else torch.zeros(0, 3, IMAGE_SIZE, IMAGE_SIZE)
    adjustments, factors = (torch.tensor(values) for values in zip(*jitters))
    twins = settings.batch_size if step % settings.global_every == 0 else 0
    return Draw(torch.tensor(indices), adjustments[:twins], factors[:twins], penalty, dropout_seed)


class Lessons:
    """All training images on the device, and what the teacher's projection makes of them.

    Args:
        images: (N, 3, 256, 256) uint8.
        description: of the progress bar.
    """

    def __init__(self, images: Tensor, model: LGST, encoder: nn.Module, device: torch.device, description: str):
        self.images = images.to(device)
        self.device = device
        self._model, self._encoder, self._description = model, encoder, description
        self._taught: tuple[Tensor, Tensor] | None = None
        sides, channels = (IMAGE_SIZE // 8, IMAGE_SIZE // 16), model.teacher.proj.out_channels
        needed = 4 * len(images) * channels * sum(side * side for side in sides)
        if needed <= cache_room(device):
            kept = tuple(torch.empty(len(images), channels, side, side, device=device) for side in sides)
            for parts in zip(*(maps.split(TEACHING_BATCH) for maps in kept), self.teach_all()):
                for space, found in zip(parts, parts[-1]):
                    space.copy_(found)
            self._taught = kept

    @torch.no_grad()
    def teach_all(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Teacher.project of all training images, batch by batch, in float32: kept, or computed anew."""
        if self._taught is not None:
            yield from zip(*(maps.split(TEACHING_BATCH) for maps in self._taught))
            return
        for batch in tqdm(self.images.split(TEACHING_BATCH), desc=self._description, leave=False):
            yield self._model.teacher.project(*self._encoder(normalise(batch))[1:])

    @torch.no_grad()
    def fit_teacher_normalisation(self) -> None:
        """Set the teacher's channel mean and std over all positions of all training images."""
        count, total, total_of_squares = 0, 0.0, 0.0
        for maps in self.teach_all():
            # On the CPU, because MPS has no float64.
            features = self._model.teacher.assemble(*maps).cpu().double()
            count += features.shape[0] * features.shape[2] * features.shape[3]
            total = total + features.sum((0, 2, 3))
            total_of_squares = total_of_squares + features.square().sum((0, 2, 3))
        mean = total / count
        std = (total_of_squares / count - mean**2).clamp(min=0).sqrt()
        self._model.fit_teacher_normalisation(mean.float(), std.float())

    def batch(self, drawn: Draw) -> Batch:
        """Fetch and jitter the drawn images on the device; also seeds PyTorch, for the autoencoder's dropout."""
        torch.manual_seed(drawn.dropout_seed)
        indices, adjustments, factors, penalty = (send(part, self.device) for part in drawn[:4])
        images = self.images[indices].float()
        taught = None if self._taught is None else tuple(maps[indices] for maps in self._taught)
        return Batch(images, jitter_colour(images[:len(factors)], adjustments, factors), penalty, taught)


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


def losses(model: LGST, encoder: nn.Module, batch: Batch, hard_quantile: float, precision: str) -> dict[str, Tensor]:
    """The four losses of one step, to be added with weight 1.

    Args:
        precision: fp32 or bf16, what convolutions multiply in; differences are taken in float32.

    Returns:
        local: hard teacher-student difference; penalty: squared student output on the penalty image;
        autoencoder: teacher-autoencoder; global: autoencoder-student, the last two on the jittered twins. 0 where there
        is no penalty image, or are no twins.
    """
    count, end = len(batch.images), len(batch.images) + len(batch.twins)
    pictures = normalise(torch.cat([batch.images, batch.twins, batch.penalty])).contiguous(
        memory_format=memory_format(precision))
    with autocast(pictures.device, precision):
        with torch.no_grad():
            new = pictures[:end] if batch.taught is None else pictures[count:end]
            taught = [model.teacher.project(*encoder(new)[1:])] if len(new) else []
        seen = model.colours(pictures)
        features = model.local_st.trunk(seen)
        # Originals and penalty are asked for what the teacher says, twins for what the autoencoder says.
        local = model.local_st.conv_st(torch.cat([features[:count], features[end:]])).float()
        if len(batch.twins):
            global_ = model.local_st.conv_ae(features[count:end]).float()
            decoded = model.autoencoder(seen[count:end]).float()
    if batch.taught is not None:
        taught.insert(0, batch.taught)
    targets = model.normalise_taught(model.teacher.assemble(*(torch.cat(maps).float() for maps in zip(*taught))))
    nothing = local.new_zeros(())
    return {
        "local": hard_mean((targets[:count] - local[:count]).square(), hard_quantile),
        "penalty": local[count:].square().mean() if len(batch.penalty) else nothing,
        "autoencoder": (targets[count:] - decoded).square().mean() if len(batch.twins) else nothing,
        "global": (decoded - global_).square().mean() if len(batch.twins) else nothing,
    }


def learning_rate(settings: LgstSettings, step: int) -> float:
    """Of one step: a tenth in the last phase, or falling along half a cosine."""
    if settings.cosine:
        return settings.lr * (1 + math.cos(math.pi * step / settings.steps)) / 2
    return settings.lr * (0.1 if step >= max(1, int(LAST_PHASE * settings.steps)) else 1)
