"""LGST for short runs: the same three networks, on features that the frozen encoder gives for nothing (docs/beyond.md).

The published student learns from pixels what an ImageNet network knows, which takes tens of thousands of steps. Here it starts
from the encoder's map at 1/4 of a larger view, the autoencoder from the map at 1/16, and the teacher is whitened, so that the
few directions in which good images vary do not drown all others. A thousand steps of one image do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbone import resize
from models.constants import MAP_SIZE
from models.lgst import Differences, MapNormalisation

RIDGE = 1e-3  # added to the eigenvalues of the correlation matrix, whose mean is 1, before whitening
SMOOTHING = 5  # side of the mean taken over the global difference
_GRID = (MAP_SIZE, MAP_SIZE)
_CODED = (32, 32)  # the autoencoder's input


class WhitenedTeacher(nn.Module):
    """Encoder maps at 1/8 and 1/16, averaged over 3x3, side by side, whitened over the training images, turned at random."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, 1)

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        """The encoder's three maps -> (B, channels, 64, 64)."""
        return self.proj(averaged(maps))

    def fit(self, mean: Tensor, covariance: Tensor) -> None:
        """Set the projection from mean (C,) and covariance (C, C) of `averaged` over the training images, float64."""
        scale = covariance.diagonal().clamp(min=1e-12).rsqrt()
        values, vectors = torch.linalg.eigh(covariance * scale.outer(scale))
        turn = torch.linalg.qr(torch.randn(len(mean), len(mean), dtype=torch.float64))[0][:self.proj.out_channels]
        weight = turn @ (vectors / (values.clamp(min=0) + RIDGE).sqrt()).T * scale
        self.proj.weight.data.copy_(weight[:, :, None, None])
        self.proj.bias.data.copy_(-weight @ mean)


class FeatureStudent(nn.Module):
    """The encoder's map at 1/4 -> local and global features, (B, channels, 64, 64) each."""

    def __init__(self, in_channels: int, width: int, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 4, stride=2, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_st = nn.Conv2d(width, channels, 1)
        self.conv_ae = nn.Conv2d(width, channels, 1)

    def forward(self, fourth: Tensor) -> tuple[Tensor, Tensor]:
        x = resize(F.relu(self.conv2(F.relu(self.conv1(fourth)))), _GRID)
        return self.conv_st(x), self.conv_ae(x)


class FeatureAutoencoder(nn.Module):
    """The encoder's map at 1/16, 32x32, through one 64-vector, out to the teacher's features, (B, channels, 64, 64)."""

    def __init__(self, in_channels: int, width: int, channels: int):
        super().__init__()
        self.enconv1 = nn.Conv2d(in_channels, width, 4, stride=2, padding=1)
        self.enconv2 = nn.Conv2d(width, width, 4, stride=2, padding=1)
        self.enconv3 = nn.Conv2d(width, 64, 8)
        self.deconv1 = nn.ConvTranspose2d(64, width, 8)
        self.deconv2 = nn.Conv2d(width, width, 3, padding=1)
        self.deconv3 = nn.Conv2d(width, width, 3, padding=1)
        self.deconv4 = nn.Conv2d(width, channels, 1)

    def forward(self, sixteenth: Tensor) -> Tensor:
        x = self.enconv3(F.relu(self.enconv2(F.relu(self.enconv1(sixteenth)))))
        x = F.relu(self.deconv1(x))
        x = F.relu(self.deconv2(resize(x, (16, 16))))
        return resize(self.deconv4(F.relu(self.deconv3(resize(x, _CODED)))), _GRID)


class FeatureLGST(MapNormalisation):
    """Teacher, student and autoencoder on encoder maps.

    Args:
        encoder_channels: of the encoder's three maps.
        width: of student and autoencoder.

    Attributes:
        fourth_mean, fourth_std, sixteenth_mean, sixteenth_std: of the channels of what student and autoencoder see.
    """

    on_features = True

    def __init__(self, encoder_channels: tuple[int, ...], width: int, channels: int):
        super().__init__()
        fourth, eighth, sixteenth = encoder_channels
        channels = min(channels, eighth + sixteenth)
        self.teacher = WhitenedTeacher(eighth + sixteenth, channels).requires_grad_(False)
        self.local_st = FeatureStudent(fourth, width, channels)
        self.autoencoder = FeatureAutoencoder(sixteenth, width, channels)
        for name, count in (("fourth", fourth), ("sixteenth", sixteenth)):
            self.register_buffer(f"{name}_mean", torch.zeros(1, count, 1, 1))
            self.register_buffer(f"{name}_std", torch.ones(1, count, 1, 1))
        self._initialise()

    def _initialise(self) -> None:
        """He's rule before a ReLU; what gives features starts near 0: the mean of whitened features is a fair first guess."""
        heads = (self.local_st.conv_st, self.local_st.conv_ae, self.autoencoder.deconv4)
        for module in [*self.local_st.modules(), *self.autoencoder.modules()]:
            if not isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                continue
            nn.init.zeros_(module.bias)
            if isinstance(module, nn.ConvTranspose2d):  # from 1x1: every place of the output sees one of the input
                nn.init.normal_(module.weight, std=math.sqrt(2 / module.in_channels))
            elif module in heads:
                nn.init.normal_(module.weight, std=0.01)
            elif module is not self.autoencoder.enconv3:
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def imitate(self, fourth: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's map at 1/4 -> the student's local and global features."""
        return self.local_st((fourth - self.fourth_mean) / self.fourth_std)

    def reconstruct(self, sixteenth: Tensor) -> Tensor:
        """The encoder's map at 1/16 -> the autoencoder's features."""
        return self.autoencoder((resize(sixteenth, _CODED) - self.sixteenth_mean) / self.sixteenth_std)

    def forward(self, images: Tensor, _: tuple[Tensor, ...], maps: tuple[Tensor, ...]) -> Tensor:
        """As `models.lgst.LGST.forward`, from the maps of the larger view alone."""
        return self.anomaly_map(self.differences(maps))

    def differences(self, maps: tuple[Tensor, ...]) -> Differences:
        """The encoder's three maps -> where student, teacher and autoencoder disagree, the global part averaged over 5x5."""
        local, global_ = self.imitate(maps[0])
        local = (self.teacher(maps) - local).square().mean(1)
        global_ = (self.reconstruct(maps[2]) - global_).square().mean(1, keepdim=True)
        return Differences(local, F.avg_pool2d(global_, SMOOTHING, stride=1, padding=SMOOTHING // 2)[:, 0])


def averaged(maps: tuple[Tensor, ...]) -> Tensor:
    """The encoder's maps at 1/8 and 1/16, each averaged over 3x3, side by side, (B, C, 64, 64)."""
    eighth, sixteenth = (resize(F.avg_pool2d(one, 3, stride=1, padding=1), _GRID) for one in maps[1:])
    return torch.cat([eighth, sixteenth], 1)


def losses(model: FeatureLGST, teacher: Tensor, fourth: Tensor, sixteenth: Tensor | None) -> dict[str, Tensor]:
    """The losses of one training step, to be added with weight 1: as `models.lgst.losses`, without augmented views and penalty.

    Args:
        teacher: teacher features of the images, (B, channels, 64, 64).
        fourth, sixteenth: the encoder's maps of them at 1/4 and 1/16; None for the latter trains the local head alone.
    """
    local, global_ = model.imitate(fourth)
    found = {"local": (teacher - local.float()).square().mean()}
    if sixteenth is None:
        return found
    decoded = model.reconstruct(sixteenth).float()
    return found | {"autoencoder": (teacher - decoded).square().mean(), "global": (decoded - global_.float()).square().mean()}


def moments(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean (C,) and covariance (C, C) over all places of (B, C, H, W) batches, float64 on the CPU."""
    count, total, products = 0, 0.0, 0.0
    for batch in batches:
        rows = batch.float().permute(0, 2, 3, 1).flatten(0, 2)
        count, total, products = count + len(rows), total + rows.sum(0).cpu().double(), products + (rows.T @ rows).cpu().double()
    mean = total / count
    return mean, products / count - mean.outer(mean)
