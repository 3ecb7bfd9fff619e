"""The embedded backbone: a small convolutional encoder whose weights ship with the repository.

It stands in for the ImageNet Wide-ResNet-50-2 of CSAD (METHOD.md section 2) where those weights cannot be had. It is a
residual network of four stages, trained on formula-made pictures only; `training/embedded_backbone.py` tells how, and
`embedded_backbone.json`, beside the weights, what came out. It is no match for ImageNet features, and results made with it
must say so.

It sees images without their light (`models.light`): an ImageNet network learns to overlook light from a million photographs,
this one is told.
"""

import hashlib
import json
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

from errors import UserError
from models.light import LogColours

WEIGHTS_PATH = Path(__file__).with_suffix(".pth")
PROVENANCE_PATH = Path(__file__).with_suffix(".json")

CHANNELS = (48, 96, 192, 256)  # of the four stages, at strides 4, 8, 16 and 32
BLOCKS = (1, 2, 2, 1)  # residual blocks per stage
STEM_CHANNELS = 32


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; at stride 2 the shortcut takes means of 2x2 before its 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride, stride, ceil_mode=True) if stride != 1 else nn.Identity(),
                nn.Conv2d(inputs, outputs, 1, bias=False),
                nn.BatchNorm2d(outputs),
            )
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.body(x) + self.shortcut(x))


class Gain(nn.Module):
    """Fixed factors of the channels that the backbone returns.

    Training sets them so that all channels of a stage vary alike on formula pictures: a random projection, as LGST's teacher
    makes one, would otherwise hear only the loudest.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("factor", torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class EmbeddedBackbone(nn.Module):
    """Four-stage residual encoder.

    Args:
        channels: output channels of the four stages.
        blocks: residual blocks of the four stages; the first of each halves the resolution.
        stem: channels of the first convolution, at half resolution.

    Attributes:
        channels: as given; what `forward` returns, stage by stage.
        gains: one per stage, see `Gain`.
    """

    def __init__(
        self, channels: tuple[int, ...] = CHANNELS, blocks: tuple[int, ...] = BLOCKS, stem: int = STEM_CHANNELS
    ) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.colours = LogColours()
        self.stem = nn.Sequential(
            nn.Conv2d(3, stem, 3, 2, 1, bias=False), nn.BatchNorm2d(stem), nn.ReLU(inplace=True)
        )
        self.stages = nn.ModuleList()
        inputs = stem
        for outputs, depth in zip(channels, blocks, strict=True):
            first = ResidualBlock(inputs, outputs, stride=2)
            self.stages.append(nn.Sequential(first, *(ResidualBlock(outputs, outputs, 1) for _ in range(depth - 1))))
            inputs = outputs
        self.gains = nn.ModuleList(Gain(width) for width in channels)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Encode images.

        Args:
            images: (B, 3, H, W), RGB normalised with the ImageNet mean and standard deviation.

        Returns:
            Four non-negative feature maps (B, channels[i], ceil(H / s), ceil(W / s)) at strides s = 4, 8, 16, 32.
        """
        x, features = self.stem(self.colours(images)), []
        for stage, gain in zip(self.stages, self.gains, strict=True):
            x = stage(x)
            features.append(gain(x))
        return tuple(features)


def load_embedded_backbone(weights: Path = WEIGHTS_PATH, provenance: Path = PROVENANCE_PATH) -> EmbeddedBackbone:
    """The embedded backbone with its shipped weights, in float32, on the CPU and in evaluation mode.

    Args:
        weights: state dict in half precision.
        provenance: JSON file with the weights' `sha256`.

    Raises:
        UserError: if one of the two files is missing, or the weights are not the ones that the provenance file describes.

    Example:
        >>> features = load_embedded_backbone()(torch.zeros(1, 3, 256, 256))
        >>> [tuple(f.shape[1:]) for f in features]
        [(48, 64, 64), (96, 32, 32), (192, 16, 16), (256, 8, 8)]
    """
    for path in (weights, provenance):
        if not path.is_file():
            raise UserError(
                f"the embedded backbone needs {path}, which is missing; restore it from the repository "
                "or train it anew with `python -m training.embedded_backbone`"
            )
    expected = json.loads(provenance.read_text())["sha256"]
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    if found != expected:
        raise UserError(
            f"{weights} is damaged or was replaced: its sha256 is {found}, but {provenance.name} says {expected}; "
            "restore both files from the repository"
        )
    state: OrderedDict[str, Tensor] = torch.load(weights, map_location="cpu", weights_only=True)
    backbone = EmbeddedBackbone()
    backbone.load_state_dict({name: value.float() if value.is_floating_point() else value for name, value in state.items()})
    return backbone.eval()
