"""One training step of each network as plainly as docs/METHOD.md says it: no batching, nothing kept, nothing left out.

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
    twins = [255 * adjust[what](images[index].float() / 255, factor) for index, what, factor in
             zip(drawn.indices.tolist(), drawn.adjustments.tolist(), drawn.factors.tolist())]
    return torch.stack(twins) if twins else torch.zeros(0, *images.shape[1:], device=images.device)


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
    """docs/METHOD.md section 3: images uint8, twins and penalty float in 0..255."""
    def teacher(pictures: Tensor) -> Tensor:
        with torch.no_grad():
            return (teacher_features(model, encoder, pictures) - model.teacher_mean) / model.teacher_std

    student_local, _ = model.local_st(prepared(images))
    difference = (teacher(images) - student_local).square()
    values = difference.flatten().sort().values  # torch.quantile refuses more than 2^24 of them
    position = hard_quantile * (len(values) - 1)
    below, above = values[int(position)], values[min(int(position) + 1, len(values) - 1)]
    threshold = torch.lerp(below, above, position - int(position)).detach()
    penalty_local = model.local_st(prepared(penalty))[0] if len(penalty) else torch.zeros(1)  # not every preset's every step
    parts = {"local": difference[difference >= threshold].mean(), "penalty": penalty_local.square().mean()}
    if len(twins):  # the same
        decoded = model.autoencoder(prepared(twins))
        _, student_global = model.local_st(prepared(twins))
        parts |= {"autoencoder": (teacher(twins) - decoded).square().mean(),
                  "global": (decoded - student_global).square().mean()}
    return parts


def segmentor_losses(segmentor: nn.Module, encoder: nn.Module, images: Tensor, labels: Tensor, others: Tensor,
                     other_labels: Tensor, weights) -> dict[str, Tensor]:
    """docs/METHOD.md section 2: images in 0..255, labels int64, weights the segmentor's settings; others may be none."""
    logits = segmentor(encoder(prepared(torch.cat([images, others]))))
    p = logits.softmax(1)
    own, free = p[:len(images)], p[len(images):]
    classes, tiny = p.shape[1], 1e-5
    t = torch.stack([labels == index for index in range(classes)], 1).float()

    doubtful = (own if weights.softmax_twice else logits[:len(images)]).log_softmax(1)
    q = (t.clamp(tiny / (classes - 1), 1 - tiny) * own).sum(1) + tiny
    pixels = t.sum((0, 2, 3))
    rarity = torch.where(pixels > 0, 1 / (pixels + tiny), torch.zeros(()))
    dice = (2 * (own * t).sum((2, 3)) + tiny) / (own.sum((2, 3)) + t.sum((2, 3)) + 2 * tiny)
    parts = {"ce": -weights.weight_ce * (t * doubtful).sum(1).mean(),
             "focal": -weights.weight_focal * ((1 - q) ** 2 * q.log()).mean(),
             "dice": weights.weight_dice * (rarity / rarity.sum() * (1 - dice)).mean()}
    if len(others):
        wanted = torch.stack([other_labels == index for index in range(classes)], 1).float().mean((2, 3))
        parts["histogram"] = weights.weight_histogram * (wanted - free.mean((2, 3)))[:, 1:].abs().sum(1).mean()
        parts["entropy"] = weights.weight_entropy * sum(-(one * (one + tiny).log()).mean() for one in (own, free))
    return parts


def assert_gradients_agree(engine: nn.Module, plain: nn.Module, step: int, relative: float = 1e-3) -> None:
    """Tensor by tensor within ``relative``; what is under 1e-5 of the whole gradient is rounding."""
    whole = torch.cat([one.grad.flatten() for one in plain.parameters() if one.grad is not None]).norm()
    for (name, ours), theirs in zip(engine.named_parameters(), plain.parameters()):
        if theirs.grad is not None:
            difference = (ours.grad - theirs.grad).norm()
            assert difference <= relative * theirs.grad.norm() + 1e-5 * whole, (step, name, difference)
