"""One training step of LGST: its random draws and its losses (paper section 3.3, METHOD.md section 3)."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms import functional as TF

from errors import UserError
from loco.images import normalise, read_rgb
from loco.layout import IMAGE_SUFFIXES
from models.lgst import LGST
from settings import IMAGE_SIZE, LgstSettings
from training.formula_pictures import render_picture

JITTER = 0.2
GREY_PROBABILITY = 0.3
PENALTY_RESIZE = 512


class Batch(NamedTuple):
    """What one step sees: float RGB in 0..255, not yet normalised."""

    images: Tensor  # (B, 3, 256, 256)
    twins: Tensor  # the same, colour-jittered
    penalty: Tensor  # (1, 3, 256, 256), or (0, 3, 256, 256) on steps without one

    def to(self, device: torch.device) -> Batch:
        return Batch(*(part.to(device) for part in self))


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


def draw_batch(images: Tensor, penalties: PenaltyImages, settings: LgstSettings, step: int, category: str,
               seed: int) -> Batch:
    """Draw the batch of one step.

    The draws depend on seed, category and step alone, so a resumed run sees what an uninterrupted one would have.
    Also seeds PyTorch, for the autoencoder's dropout.

    Args:
        images: all training images, (N, 3, 256, 256) uint8.
    """
    rng = np.random.default_rng([seed, zlib.crc32(category.encode()), step])
    torch.manual_seed(int(rng.integers(2**63)))
    # Shuffled epochs: every image is seen before any is seen twice, whatever the batch size.
    first = step * settings.batch_size
    chosen = []
    for position in range(first, first + settings.batch_size):
        epoch, within = divmod(position, len(images))
        order = np.random.default_rng([seed, zlib.crc32(category.encode()), epoch, 1]).permutation(len(images))
        chosen.append(int(order[within]))
    originals = images[chosen].float()
    twins = torch.stack([jitter_colour(image, rng) for image in originals])
    draws_penalty = step % settings.penalty_every == 0
    penalty = penalties.draw(rng) if draws_penalty else originals[:0]
    return Batch(originals, twins, penalty)


def jitter_colour(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Change one of brightness, contrast and saturation by up to 20 %; (3, H, W) float in 0..255."""
    adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)[rng.integers(3)]
    return adjust(image / 255, rng.uniform(1 - JITTER, 1 + JITTER)) * 255


def hard_mean(differences: Tensor, quantile: float) -> Tensor:
    """Mean of the values at or over their quantile (by selection, not by sorting)."""
    values = differences.flatten()
    kept = values.numel() - int(np.ceil(quantile * (values.numel() - 1)))
    return values.topk(kept, sorted=False).values.mean()


def losses(model: LGST, encoder: nn.Module, batch: Batch, hard_quantile: float) -> dict[str, Tensor]:
    """The four losses of one step, to be added with weight 1.

    Returns:
        local: hard teacher-student difference; penalty: squared student output on the penalty image;
        autoencoder: teacher-autoencoder; global: autoencoder-student, the last two on the jittered twins.
    """
    count = len(batch.images)
    seen = normalise(torch.cat([batch.images, batch.twins]))
    with torch.no_grad():
        targets = model.teach(encoder(seen))
    features = model.local_st.trunk(torch.cat([seen, normalise(batch.penalty)]))
    local = model.local_st.conv_st(torch.cat([features[:count], features[2 * count:]]))
    global_ = model.local_st.conv_ae(features[count:2 * count])
    decoded = model.autoencoder(seen[count:])
    penalty = local[count:].square().mean() if len(batch.penalty) else local.new_zeros(())
    return {
        "local": hard_mean((targets[:count] - local[:count]).square(), hard_quantile),
        "penalty": penalty,
        "autoencoder": (targets[count:] - decoded).square().mean(),
        "global": (decoded - global_).square().mean(),
    }
