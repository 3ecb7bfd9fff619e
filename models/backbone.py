"""Frozen feature extractors: maps at 1/4, 1/8 and 1/16 of the image (paper section 3.2, docs/method.md section 2).

All of them are timm's. The published one is Wide-ResNet-50-2 with torchvision's ``IMAGENET1K_V2`` weights, and with others,
timm's own, where stage 1 looks at crops of components; their names and shapes are the same, so files are told apart by what
they hold. EfficientNet-Lite0 comes with its ImageNet weights in a package of the registry, for machines that can or need not
have the larger one (docs/beyond.md). Any other convolutional network of timm that has the three maps will do.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from csad.errors import UserError, did_you_mean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PUBLISHED = "wide_resnet50_2"
PACKAGED = "efficientnet_lite0"
REDUCTIONS = (4, 8, 16)
# What timm calls them, with the weights that docs/method.md means; all others go by timm's own names.
TIMM_NAMES = {PUBLISHED: "wide_resnet50_2.tv2_in1k", PACKAGED: "tf_efficientnet_lite0.in1k"}
# Of `Backbone.deepest`: what plain wide_resnet50_2 means in the timm that the published code pins.
CROP_WEIGHTS = "wide_resnet50_2.racm_in1k"
logging.getLogger("timm").setLevel(logging.ERROR)  # which weights it leaves out is what we asked for


@dataclass(frozen=True)
class Backbone:
    """A frozen network, ready to use."""

    name: str  # wide_resnet50_2, efficientnet_lite0, or a name of timm's
    encoder: Encoder  # see `Encoder`
    fingerprint: str  # of the encoder's weights; stages compare it before they combine what they made
    # RGB in 0..255 (B, 3, H, W) -> a tuple with the last feature map (B, D, h, w), for component features;
    # None where it was not asked for.
    deepest: Encoder | None = None
    # As far as can be told, the encoder's weights are those that its name stands for.
    is_confirmed: bool = True
    # The weights of ``deepest`` in words; `CROP_WEIGHTS` where they are the published ones.
    deepest_origin: str = ""

    @property
    def channels(self) -> tuple[int, ...]:
        """Of the encoder's three maps."""
        return self.encoder.channels

    @property
    def is_stand_in(self) -> bool:
        """True for anything but the published network and weights: results are not comparable with the published ones."""
        return self.name != PUBLISHED or not self.is_confirmed

    @property
    def has_published_crops(self) -> bool:
        """Whether `deepest` has the weights in whose features the published bandwidths are distances."""
        return self.deepest_origin == CROP_WEIGHTS

    def to(self, device: torch.device) -> Backbone:
        self.encoder.to(device)
        if self.deepest is not None:
            self.deepest.to(device)
        return self


class Normalise(nn.Module):
    """RGB in 0..255 -> with a network's own mean and std (given for 0..1) taken off; (B, 3, H, W) float32."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        # Not persistent: state dicts keep the published keys.
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class Encoder(nn.Module):
    """Feature maps of a timm network at fixed fractions of the image; it brings its own normalisation.

    Args:
        network: timm's, with ``features_only``, giving exactly these maps.
        mean, std: of its input, for RGB in 0..1.
        reductions: the maps' fractions, 4 for a quarter of the side.
    """

    def __init__(
        self,
        network: nn.Module,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        reductions: tuple[int, ...] = REDUCTIONS,
    ):
        super().__init__()
        self.normalise, self.network, self.reductions = Normalise(mean, std), network, reductions
        info: Any = network.feature_info  # timm's, though torch's hints say: a tensor or a module
        self.channels: tuple[int, ...] = tuple(info.channels())

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """RGB in 0..255, float or uint8, (B, 3, H, W) -> one map per reduction r, (B, C, H/r, W/r) where r divides the sides."""
        return to_grids(self.network(self.normalise(images)), self.reductions, tuple(images.shape[-2:]))


def resize(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """Bilinear resize without aligned corners, as everywhere in docs/method.md; (B, C, *, *) -> (B, C, *size)."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def to_grids(maps: Sequence[Tensor], reductions: Sequence[int], size: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Bring maps to exactly their fraction of an image of this size: networks without padding round their sides."""
    return tuple(
        level
        if size[0] % stride or size[1] % stride
        else resize(level, (size[0] // stride, size[1] // stride))
        for level, stride in zip(maps, reductions)
    )


def empty_encoder(name: str) -> Encoder:
    """An encoder without weights, to be filled from a state dict; UserError if no such network, or no maps at
    1/4, 1/8 and 1/16."""
    return build_encoder(name, feature_taps(name)[0], REDUCTIONS, None)


def fingerprint(module: nn.Module) -> str:
    """First 16 hex digits of the SHA-256 over all tensors of a module's state."""
    return state_fingerprint(module.state_dict())


def state_fingerprint(state: Mapping[str, Tensor]) -> str:
    """The same of a state dict."""
    digest = hashlib.sha256()
    for key, tensor in sorted(state.items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@cache  # it builds the whole network, and every model that is opened asks
def feature_taps(name: str) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Which of timm's feature maps lie at `REDUCTIONS`, and the deepest map with its reduction."""
    import timm  # takes two seconds, and not every script builds a network

    if not timm.is_model(TIMM_NAMES.get(name, name)):
        raise UserError(
            f"unknown backbone '{name}'; choose one of auto, {PUBLISHED}, {PACKAGED} or timm's networks (resnet18, "
            f"mobilenetv3_large_100, ...){did_you_mean(name, [PUBLISHED, PACKAGED, *timm.list_models()])}"
        )
    problem = UserError(
        f"backbone {name} has no feature maps at 1/4, 1/8 and 1/16 of the image; choose a convolutional "
        "one like resnet18"
    )
    try:
        network: Any = timm.create_model(TIMM_NAMES.get(name, name), features_only=True)
        info = network.feature_info
    except (RuntimeError, AttributeError, AssertionError) as reason:
        raise problem from reason
    strides = info.reduction()
    if not set(REDUCTIONS) <= set(strides):
        raise problem
    last = len(strides) - 1
    # Of several maps of one size the last one.
    return tuple(last - strides[::-1].index(stride) for stride in REDUCTIONS), (last, strides[-1])


def build_encoder(
    name: str, taps: tuple[int, ...], reductions: tuple[int, ...], state: Mapping[str, Tensor] | None
) -> Encoder:
    import timm

    loading: dict[str, Any] = {}
    if state is not None:
        loading = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": dict(state)}}
    network = timm.create_model(TIMM_NAMES.get(name, name), features_only=True, out_indices=taps, **loading)
    config: Any = timm.get_pretrained_cfg(TIMM_NAMES.get(name, name))  # not None: timm has just built it
    return Encoder(network, config.mean, config.std, reductions).eval().requires_grad_(False)
