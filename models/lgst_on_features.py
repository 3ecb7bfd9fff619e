"""LGST for short runs: the same three networks, on features that the frozen encoder gives for nothing (docs/beyond.md).

The published student learns from pixels what an ImageNet network knows, which takes tens of thousands of steps. Here it starts
from the encoder's map at 1/4 of a larger view, the autoencoder from the map at 1/16, and the teacher is whitened, so that the
few directions in which good images vary do not drown all others. A thousand steps of one image do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbone import resize
from models.constants import MAP_SIZE
from models.lgst import Differences, MapNormalisation, TrainingFeatures, ViewFeatures

RIDGE = 1e-3  # added to the eigenvalues of the correlation matrix, whose mean is 1, before whitening
SMOOTHING = 5  # side of the mean taken over the global difference
_GRID = (MAP_SIZE, MAP_SIZE)
CODED_SIZE = (32, 32)  # the autoencoder's input


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
        turn = torch.linalg.qr(torch.randn(len(mean), len(mean), dtype=torch.float64))[0]
        turn = turn[: self.proj.out_channels]
        weight = turn @ (vectors / (values.clamp(min=0) + RIDGE).sqrt()).T * scale
        self.proj.load_state_dict({"weight": weight[:, :, None, None], "bias": -weight @ mean})


class FeatureStudent(nn.Module):
    """The encoder's map at 1/4 -> local and global features, (B, channels, 64, 64) each."""

    def __init__(self, in_channels: int, width: int, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 4, stride=2, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_st = nn.Conv2d(width, channels, 1)
        self.conv_ae = nn.Conv2d(width, channels, 1)

    def forward(self, stride4: Tensor) -> tuple[Tensor, Tensor]:
        x = resize(F.relu(self.conv2(F.relu(self.conv1(stride4)))), _GRID)
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

    def forward(self, stride16: Tensor) -> Tensor:
        x = self.enconv3(F.relu(self.enconv2(F.relu(self.enconv1(stride16)))))
        x = F.relu(self.deconv1(x))
        x = F.relu(self.deconv2(resize(x, (16, 16))))
        return resize(self.deconv4(F.relu(self.deconv3(resize(x, CODED_SIZE)))), _GRID)


class FeatureLGST(MapNormalisation):
    """Teacher, student and autoencoder on encoder maps.

    Args:
        encoder_channels: of the encoder's three maps.
        width: of student and autoencoder.
    """

    on_features = True
    # Of the channels of what student and autoencoder see.
    fourth_mean: Tensor
    fourth_std: Tensor
    sixteenth_mean: Tensor
    sixteenth_std: Tensor

    def __init__(self, encoder_channels: tuple[int, ...], width: int, channels: int):
        super().__init__()
        stride4, stride8, stride16 = encoder_channels
        channels = min(channels, stride8 + stride16)
        self.teacher = WhitenedTeacher(stride8 + stride16, channels).requires_grad_(False)
        self.local_st = FeatureStudent(stride4, width, channels)
        self.autoencoder = FeatureAutoencoder(stride16, width, channels)
        for name, count in (("fourth", stride4), ("sixteenth", stride16)):
            self.register_buffer(f"{name}_mean", torch.zeros(1, count, 1, 1))
            self.register_buffer(f"{name}_std", torch.ones(1, count, 1, 1))
        self._initialise()

    def _initialise(self) -> None:
        """He's rule before a ReLU; what gives features starts near 0: the mean of whitened features is a fair first guess."""
        heads = (self.local_st.conv_st, self.local_st.conv_ae, self.autoencoder.deconv4)
        for module in [*self.local_st.modules(), *self.autoencoder.modules()]:
            if not isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                continue
            nn.init.zeros_(module.get_parameter("bias"))
            if isinstance(
                module, nn.ConvTranspose2d
            ):  # from 1x1: every output position sees one input position
                nn.init.normal_(module.weight, std=math.sqrt(2 / module.in_channels))
            elif module in heads:
                nn.init.normal_(module.weight, std=0.01)
            elif module is not self.autoencoder.enconv3:
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def student_features(self, stride4: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's map at 1/4 -> the student's local and global features."""
        return self.local_st((stride4 - self.fourth_mean) / self.fourth_std)

    def autoencoder_features(self, stride16: Tensor) -> Tensor:
        """The encoder's map at 1/16 -> the autoencoder's features."""
        return self.autoencoder((resize(stride16, CODED_SIZE) - self.sixteenth_mean) / self.sixteenth_std)

    def training_features(
        self, stride4: Tensor, teacher: Tensor, stride16: Tensor | None
    ) -> TrainingFeatures:
        """What `models.lgst.losses` compares in one step, without augmented views and penalty.

        Args:
            stride4, stride16: the encoder's maps of the images at 1/4 and 1/16; None for the latter trains the local head alone.
            teacher: teacher features of the images, (B, channels, 64, 64).
        """
        local, global_ = self.student_features(stride4)
        if stride16 is None:
            return TrainingFeatures(teacher, local)
        views = ViewFeatures(teacher, self.autoencoder_features(stride16), global_)
        return TrainingFeatures(teacher, local, views=views)

    def forward(self, images: Tensor, _: tuple[Tensor, ...], maps: tuple[Tensor, ...]) -> Tensor:
        """As `models.lgst.LGST.forward`, from the maps of the larger view alone."""
        return self.anomaly_map(self.differences(maps))

    def differences(self, maps: tuple[Tensor, ...]) -> Differences:
        """The encoder's three maps -> where student, teacher and autoencoder disagree, the global part averaged over 5x5."""
        local, global_ = self.student_features(maps[0])
        local = (self.teacher(maps) - local).square().mean(1)
        global_ = (self.autoencoder_features(maps[2]) - global_).square().mean(1, keepdim=True)
        return Differences(local, F.avg_pool2d(global_, SMOOTHING, stride=1, padding=SMOOTHING // 2)[:, 0])


def averaged(maps: tuple[Tensor, ...]) -> Tensor:
    """The encoder's maps at 1/8 and 1/16, each averaged over 3x3, side by side, (B, C, 64, 64)."""
    return torch.cat([resize(F.avg_pool2d(level, 3, stride=1, padding=1), _GRID) for level in maps[1:]], 1)
