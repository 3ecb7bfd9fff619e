"""Frozen feature extractors: three maps at 1/4, 1/8 and 1/16 for segmentor and teacher, and the deepest one for crops.

The method's own is Wide-ResNet-50-2 with torchvision's ``IMAGENET1K_V2`` weights (METHOD.md section 2). Any other
torchvision classification network can stand in its place, and ``embedded`` ships with this repository for machines
that have no ImageNet weights and no way to get them.
"""

from __future__ import annotations

import hashlib
import socket
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.feature_extraction import create_feature_extractor

from errors import DAMAGED, UserError
from models.embedded_backbone import EmbeddedBackbone, load_embedded_backbone

PUBLISHED = "wide_resnet50_2"
EMBEDDED = "embedded"
FRACTIONS = (4, 8, 16)


@dataclass(frozen=True)
class Backbone:
    """A frozen network, ready to use.

    Attributes:
        name: wide_resnet50_2, embedded, or a torchvision network's name.
        encoder: images (B, 3, H, W), ImageNet-normalised -> maps at exactly H/4, H/8 and H/16.
        deepest: the same images -> the last feature map (B, D, h, w), for component features.
        channels: of the encoder's three maps.
        fingerprint: of the weights; stages compare it before they combine what they made.
    """

    name: str
    encoder: nn.Module
    deepest: nn.Module
    channels: tuple[int, int, int]
    fingerprint: str

    @property
    def blind_to_light(self) -> bool:
        """See `blind_to_light`."""
        return blind_to_light(self.name)

    @property
    def is_stand_in(self) -> bool:
        """True for anything but the published network."""
        return self.name != PUBLISHED

    def to(self, device: torch.device) -> Backbone:
        self.encoder.to(device)
        self.deepest.to(device)
        return self


class ResNetEncoder(nn.Module):
    """The trunk of a torchvision ResNet up to layer3, with the published parameter names."""

    def __init__(self, resnet: nn.Module):
        super().__init__()
        self.conv1, self.bn1 = resnet.conv1, resnet.bn1
        self.layer1, self.layer2, self.layer3 = resnet.layer1, resnet.layer2, resnet.layer3

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, stride=2, padding=1)
        quarter = self.layer1(x)
        eighth = self.layer2(quarter)
        return quarter, eighth, self.layer3(eighth)


class TapEncoder(nn.Module):
    """Feature maps tapped from a network by the names of its blocks.

    Args:
        taps: names of blocks.
        fractions: for each tap, resize its map to exactly 1/fraction of the image (networks without padding round
            their sizes); empty leaves the sizes alone. A single tap returns its map rather than a tuple.
    """

    def __init__(self, network: nn.Module, taps: tuple[str, ...], fractions: tuple[int, ...]):
        super().__init__()
        self.taps, self.fractions = taps, fractions
        self.network = create_feature_extractor(network, list(taps))

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        features = self.network(images)
        maps = [features[tap] for tap in self.taps]
        if len(maps) == 1:
            return maps[0]
        return tuple(resize(one, (images.shape[-2] // fraction, images.shape[-1] // fraction))
                     for one, fraction in zip(maps, self.fractions))


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize without aligned corners, as everywhere in METHOD.md; (B, C, *, *) -> (B, C, *size)."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


class WeightsMissing(UserError):
    """No weights at hand and none to be downloaded."""


def build_backbone(name: str, weights: Path | None, folder: Path) -> Backbone:
    """Build a frozen backbone in eval mode.

    Args:
        name: auto, wide_resnet50_2, embedded, or a torchvision classification network. ``auto`` is wide_resnet50_2
            where its weights are at hand or can be downloaded, else embedded.
        weights: its state dict; None looks for ``{folder}/{name}.pth`` and then asks torchvision to download.
        folder: where downloaded weights lie.

    Raises:
        UserError: no such network, no weights, weights of another network, or no maps at 1/4, 1/8 and 1/16.
    """
    if name == "auto":
        try:
            return build_backbone(PUBLISHED, weights, folder)
        except WeightsMissing:
            print(f"backbone: embedded stand-in, no ImageNet weights at hand; to get the real thing, put torchvision's "
                  f"{PUBLISHED} (IMAGENET1K_V2) state dict into {folder / PUBLISHED}.pth")
            return build_backbone(EMBEDDED, None, folder)
    if name == EMBEDDED:
        if weights is not None:
            raise UserError("--backbone embedded brings its own weights; leave --backbone_weights out")
        network = load_embedded_backbone()
    else:
        network = _network(name)
        path = weights or folder / f"{name}.pth"
        if weights is not None and not path.exists():
            raise UserError(f"--backbone_weights {path} does not exist")
        _load(network, name, path)
    encoder, deepest, channels = _parts(name, network)
    for part in (encoder, deepest):
        part.eval().requires_grad_(False)
    return Backbone(name, encoder, deepest, channels, fingerprint(encoder))


def empty_encoder(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """An encoder without weights, to be filled from a fused model's state dict, and its channels."""
    network = EmbeddedBackbone() if name == EMBEDDED else _network(name)
    encoder, _, channels = _parts(name, network)
    return encoder.eval().requires_grad_(False), channels


def blind_to_light(name: str) -> bool:
    """True if the backbone of that name does not see the light's strength and colour (`models.light`).

    LGST's student and autoencoder must not see it, either: they could not tell what of it the teacher overlooks, since
    they look at one neighbourhood at a time.
    """
    return name == EMBEDDED


def fingerprint(module: nn.Module) -> str:
    """First 16 hex digits of the SHA-256 over all tensors of a module's state."""
    digest = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _network(name: str) -> nn.Module:
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise UserError(f"backbone '{name}' is none of auto, {PUBLISHED}, {EMBEDDED} and torchvision's classification "
                        "networks (resnet18, squeezenet1_0, ...)")
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, **options).eval()


def _load(network: nn.Module, name: str, path: Path) -> None:
    if path.exists():
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            network.load_state_dict(state)
        except (*DAMAGED, IsADirectoryError) as problem:
            raise UserError(f"{path} does not hold a state dict of torchvision's {name}; name the right network with "
                            "--backbone or the right file with --backbone_weights") from problem
        return
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)
    try:
        network.load_state_dict(torchvision.models.get_model_weights(name).DEFAULT.get_state_dict(
            progress=True, check_hash=True, map_location="cpu", weights_only=True))
    except (OSError, *DAMAGED) as problem:
        reason = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise WeightsMissing(f"no ImageNet weights for {name}: {path} is missing, and torchvision's file could not be "
                             f"downloaded or its copy in {torch.hub.get_dir()} is damaged ({reason}); "
                             "name a file with --backbone_weights, or use --backbone embedded") from problem
    finally:
        socket.setdefaulttimeout(patience)


def _parts(name: str, network: nn.Module) -> tuple[nn.Module, nn.Module, tuple[int, int, int]]:
    """Split a network into encoder and deepest map; both share its parameters."""
    taps, channels, last = _find_taps(name, network)
    if isinstance(network, torchvision.models.ResNet):
        return ResNetEncoder(network), TapEncoder(network, (last,), ()), channels
    return TapEncoder(network, taps, FRACTIONS), TapEncoder(network, (last,), ()), channels


def _find_taps(name: str, network: nn.Module) -> tuple[tuple[str, ...], tuple[int, int, int], str]:
    """Find the last block at 1/4, 1/8 and 1/16 of the input, and the last one with a map at all."""
    maps: dict[str, torch.Size] = {}
    stages = {path: module for path, module in network.named_modules()
              if path.count(".") <= 1 and path.split(".")[0] not in _HEADS}
    stages.pop("", None)

    def note(path: str):
        def hook(module: nn.Module, inputs: tuple, output) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] == output.shape[3]:
                maps.pop(path, None)  # keep the order of the last call
                maps[path] = output.shape
        return hook

    hooks = [module.register_forward_hook(note(path)) for path, module in stages.items()]
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, 3, 256, 256))
    except (AssertionError, RuntimeError):
        maps.clear()  # a transformer for another size of image
    for hook in hooks:
        hook.remove()

    taps = []
    for fraction in FRACTIONS:
        # Networks without padding lose a few pixels (SqueezeNet: 62 for 64), hence the tolerance.
        fitting = [path for path, shape in maps.items() if abs(shape[2] * fraction / 256 - 1) < 0.1]
        if not fitting:
            raise UserError(f"backbone {name} has no feature map at 1/{fraction} of the image; choose a convolutional "
                            "one like resnet18 or squeezenet1_0")
        taps.append(fitting[-1])
    spatial = [path for path, shape in maps.items() if shape[2] > 1]
    return tuple(taps), tuple(maps[path][1] for path in taps), spatial[-1]


# What comes after the features in torchvision's networks.
_HEADS = ("classifier", "fc", "head", "avgpool", "dropout", "AuxLogits", "aux1", "aux2")
