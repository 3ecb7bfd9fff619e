"""One training step of each network as plainly as METHOD.md says it: no batching, nothing kept, nothing left out.

What the fast steps of training/ are tested and timed against. Random choices come in as arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import functional as TF

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


def prepared(images: Tensor) -> Tensor:
    """(B, 3, 256, 256) RGB in 0..255 -> ImageNet-normalised."""
    return (images.float() / 255 - MEAN.to(images.device)) / STD.to(images.device)


def jittered(images: Tensor, drawn) -> Tensor:
    """The drawn images (uint8) with one of brightness, contrast and saturation changed, float in 0..255."""
    adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)
    return torch.stack([255 * adjust[what](images[index].float() / 255, factor) for index, what, factor in
                        zip(drawn.indices.tolist(), drawn.adjustments.tolist(), drawn.factors.tolist())])


def teacher_features(model: nn.Module, encoder: nn.Module, images: Tensor) -> Tensor:
    """Encoder layers 2 and 3, each resized to 64x64, concatenated, 3x3 average, 1x1 projection."""
    _, eighth, sixteenth = encoder(prepared(images))
    maps = torch.cat([F.interpolate(one, size=(64, 64), mode="bilinear", align_corners=False)
                      for one in (eighth, sixteenth)], dim=1)
    return model.teacher.proj(F.avg_pool2d(maps, 3, stride=1, padding=1, count_include_pad=True))


@torch.no_grad()
def lgst_teacher(model: nn.Module, encoder: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Channel mean and std of the teacher over the training images."""
    features = teacher_features(model, encoder, images).double()
    return features.mean((0, 2, 3)).float(), features.std((0, 2, 3), correction=0).float()


def lgst_losses(model: nn.Module, encoder: nn.Module, images: Tensor, twins: Tensor, penalty: Tensor,
                hard_quantile: float) -> dict[str, Tensor]:
    """METHOD.md section 3: images uint8, twins and penalty float in 0..255."""
    def teacher(pictures: Tensor) -> Tensor:
        with torch.no_grad():
            return (teacher_features(model, encoder, pictures) - model.teacher_mean) / model.teacher_std

    student_local, _ = model.local_st(prepared(images))
    difference = (teacher(images) - student_local).square()
    values = difference.flatten().sort().values  # torch.quantile refuses more than 2^24 of them
    position = hard_quantile * (len(values) - 1)
    below, above = values[int(position)], values[min(int(position) + 1, len(values) - 1)]
    threshold = torch.lerp(below, above, position - int(position)).detach()
    penalty_local, _ = model.local_st(prepared(penalty))
    decoded = model.autoencoder(prepared(twins))
    _, student_global = model.local_st(prepared(twins))
    return {"local": difference[difference >= threshold].mean(),
            "penalty": penalty_local.square().mean(),
            "autoencoder": (teacher(twins) - decoded).square().mean(),
            "global": (decoded - student_global).square().mean()}
