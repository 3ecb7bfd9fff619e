"""LGST, the local-global student-teacher (paper section 3.3, docs/method.md section 3).

A teacher of fixed random projections of encoder features; a student with two heads, one imitating the teacher
(*local*), one imitating the autoencoder (*global*); and EfficientAD's autoencoder, which imitates the teacher.
Where they disagree, the image is unlike the training images.

The networks come first, then the losses, in the paper's order. models/lgst_on_features.py is the same method on encoder maps.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbone import Normalise, resize
from models.constants import IMAGENET_MEAN, IMAGENET_STD, MAP_SIZE
from models.statistics import map_range, quantile

Map = TypeVar("Map", Tensor, np.ndarray)


class Teacher(nn.Module):
    """Encoder layers 2 and 3 side by side, averaged over 3x3, projected at random.

    Args:
        in_channels: of layers 2 and 3 together (1536 for the published encoder).
        channels: of the projection (512 in the paper).
    """

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, 1)

    def forward(self, stride8: Tensor, stride16: Tensor) -> Tensor:
        """(B, C2, H/8, W/8) and (B, C3, H/16, W/16) -> (B, channels, 64, 64), not yet normalised."""
        return self.merge_levels(*self.project_levels(stride8, stride16))

    # Enlarging and averaging treat every channel alike and the projection every position alike, so the projection may as
    # well come first, where the maps are small: the same sum for an eighth of the multiplications. What it gives is
    # also less to keep than the teacher's features: training keeps it for every image.

    def project_levels(self, stride8: Tensor, stride16: Tensor) -> tuple[Tensor, Tensor]:
        """Each map's part of the projection, (B, channels, H/8, W/8) and (B, channels, H/16, W/16)."""
        weight = self.proj.weight.split([stride8.shape[1], stride16.shape[1]], dim=1)
        return F.conv2d(stride8, weight[0]), F.conv2d(stride16, weight[1])

    def merge_levels(self, stride8: Tensor, stride16: Tensor) -> Tensor:
        """Both parts -> (B, channels, 64, 64)."""
        size = (MAP_SIZE, MAP_SIZE)
        averaged = F.avg_pool2d(resize(stride8, size) + resize(stride16, size), 3, stride=1, padding=1)
        return averaged + self.proj.get_parameter("bias").view(1, -1, 1, 1)


class Student(nn.Module):
    """The patch description network with two heads.

    Args:
        width: channels of the trunk (512 in the paper; its first layer has half of them).
        channels: of each head.
    """

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width // 2, 4, padding=3)
        self.conv2 = nn.Conv2d(width // 2, width, 4, padding=3)
        self.conv3 = nn.Conv2d(width, width, 1)
        self.conv4 = nn.Conv2d(width, width, 3, padding=1)
        self.conv5 = nn.Conv2d(width, width, 4)
        self.conv_st = nn.Conv2d(width, channels, 1)
        self.conv_ae = nn.Conv2d(width, channels, 1)

    def trunk(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, width, 64, 64)."""
        x = F.avg_pool2d(F.relu(self.conv1(images)), 2, stride=2, padding=1)
        x = F.avg_pool2d(F.relu(self.conv2(x)), 2, stride=2, padding=1)
        x = F.relu(self.conv4(F.relu(self.conv3(x))))
        return resize(F.relu(self.conv5(x)), (MAP_SIZE, MAP_SIZE))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> local and global features, each (B, channels, 64, 64)."""
        features = self.trunk(images)
        return self.conv_st(features), self.conv_ae(features)


class Autoencoder(nn.Module):
    """EfficientAD's autoencoder: the image through one 64-vector, then out to the teacher's features.

    Takes 256x256 images only: the bottleneck has to come out at 1x1.
    """

    def __init__(self, channels: int):
        super().__init__()
        for number, (inputs, outputs) in enumerate([(3, 32), (32, 32), (32, 64), (64, 64), (64, 64)], 1):
            setattr(self, f"enconv{number}", nn.Conv2d(inputs, outputs, 4, stride=2, padding=1))
        self.enconv6 = nn.Conv2d(64, 64, 8)
        for number in range(1, 7):
            setattr(self, f"deconv{number}", nn.Conv2d(64, 64, 4, padding=2))
        self.deconv7 = nn.Conv2d(64, 64, 3, padding=1)
        self.deconv8 = nn.Conv2d(64, channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, 256, 256) -> (B, channels, 64, 64)."""
        x = images
        for number in range(1, 6):
            x = F.relu(getattr(self, f"enconv{number}")(x))
        x = self.enconv6(x)
        for number, size in enumerate((3, 8, 15, 32, 63, 127), 1):
            x = F.relu(getattr(self, f"deconv{number}")(resize(x, (size, size))))
            x = F.dropout(x, 0.2, self.training)
        x = F.relu(self.deconv7(resize(x, (MAP_SIZE, MAP_SIZE))))
        return self.deconv8(x)


class Differences(NamedTuple):
    """Channel means of squared differences, each (B, 64, 64)."""

    local: Tensor
    global_: Tensor


class LgstMap(nn.Module):
    """LGST in any form: RGB in 0..255 (B, 3, 256, 256), the encoder's maps of it, and those of the larger view in; anomaly map
    (B, 64, 64) out, whose maximum is the score."""

    on_features = False  # whether the student sees the encoder's maps of the larger view instead of pixels

    @staticmethod
    def scaled(anomaly_map: Map) -> Map:
        """An anomaly map -> comparable with other branches' maps: 0.1 is what 0.5 % of one difference's values exceed."""
        return anomaly_map / 0.1


class MapNormalisation(LgstMap):
    """What turns the two differences into an anomaly map, whatever networks they come from."""

    q_st_start: Tensor
    q_st_end: Tensor
    q_ae_start: Tensor
    q_ae_end: Tensor

    def __init__(self) -> None:
        super().__init__()
        for branch in ("st", "ae"):
            self.register_buffer(f"q_{branch}_start", torch.tensor(0.0))
            self.register_buffer(f"q_{branch}_end", torch.tensor(1.0))

    def anomaly_map(self, differences: Differences) -> Tensor:
        """(B, 64, 64): both differences scaled by the validation quantiles, added. Its maximum is the LGST score."""
        local = 0.1 * (differences.local - self.q_st_start) / (self.q_st_end - self.q_st_start)
        global_ = 0.1 * (differences.global_ - self.q_ae_start) / (self.q_ae_end - self.q_ae_start)
        return local + global_

    def fit_map_normalisation(self, validation: Differences) -> None:
        """Set the quantiles from the differences on all validation images, each (N, 64, 64)."""
        for branch, maps in (("st", validation.local), ("ae", validation.global_)):
            start, end = map_range(maps)
            getattr(self, f"q_{branch}_start").copy_(start)
            getattr(self, f"q_{branch}_end").copy_(end)


class LGST(MapNormalisation):
    """Teacher, student, autoencoder, and the numbers that normalise what they say.

    The parameter and buffer names are the published ones.

    Args:
        encoder_channels: of the encoder's three maps.
        width, channels: of the student and of the teacher.
    """

    teacher_mean: Tensor
    teacher_std: Tensor

    def __init__(self, encoder_channels: tuple[int, ...], width: int, channels: int):
        super().__init__()
        self.normalise = Normalise(IMAGENET_MEAN, IMAGENET_STD)  # an encoder brings its own
        self.teacher = Teacher(encoder_channels[1] + encoder_channels[2], channels)
        self.teacher.requires_grad_(False)
        self.local_st = Student(width, channels)
        self.autoencoder = Autoencoder(channels)
        self.register_buffer("teacher_mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("teacher_std", torch.ones(1, channels, 1, 1))

    def teacher_features(self, maps: tuple[Tensor, ...]) -> Tensor:
        """The encoder's three maps -> normalised teacher features (B, channels, 64, 64)."""
        return self.normalise_teacher(self.teacher(maps[1], maps[2]))

    def normalise_teacher(self, features: Tensor) -> Tensor:
        """Teacher features (B, channels, 64, 64) -> with their mean and std over the training images taken off."""
        return (features - self.teacher_mean) / self.teacher_std

    def forward(self, images: Tensor, maps: tuple[Tensor, ...], _: tuple[Tensor, ...]) -> Tensor:
        """RGB in 0..255 (B, 3, 256, 256) and the encoder's maps of it; those of the larger view -> anomaly map (B, 64, 64)."""
        return self.anomaly_map(self.differences(images, maps))

    def differences(self, images: Tensor, maps: tuple[Tensor, ...]) -> Differences:
        """RGB in 0..255 (B, 3, 256, 256) and the encoder's maps of it -> where student, teacher and autoencoder disagree."""
        normalised = self.normalise(images)
        local, global_ = self.local_st(normalised)
        return Differences(
            (self.teacher_features(maps) - local).square().mean(1),
            (self.autoencoder(normalised) - global_).square().mean(1),
        )

    def training_features(
        self,
        images: Tensor,
        teacher: Tensor,
        augmented: Tensor | None,
        augmented_teacher: Tensor | None,
        penalty: Tensor,
    ) -> TrainingFeatures:
        """What `losses` compares in one step.

        Args:
            images: training images, (B, 3, 256, 256) RGB in 0..255, like the two below.
            teacher: `teacher_features` of them, (B, channels, 64, 64).
            augmented: their colour-jittered views; None on steps that train the local head alone.
            augmented_teacher: `teacher_features` of the views.
            penalty: an ImageNet-like image.
        """
        local, _ = self.local_st(self.normalise(images))
        local_of_penalty, _ = self.local_st(self.normalise(penalty))
        if augmented is None or augmented_teacher is None:
            return TrainingFeatures(teacher, local, local_of_penalty)
        decoded = self.autoencoder(self.normalise(augmented))
        _, global_ = self.local_st(self.normalise(augmented))
        views = ViewFeatures(augmented_teacher, decoded, global_)
        return TrainingFeatures(teacher, local, local_of_penalty, views)

    def fit_teacher_normalisation(self, mean: Tensor, std: Tensor) -> None:
        """Set the teacher's channel mean and std, each (channels,); a dead channel keeps std 1."""
        self.teacher_mean.copy_(mean.view(1, -1, 1, 1))
        self.teacher_std.copy_(torch.where(std > 0, std, 1).view(1, -1, 1, 1))


class ViewFeatures(NamedTuple):
    """What teacher, autoencoder and the student's second head make of augmented views, each (B, channels, 64, 64)."""

    teacher: Tensor
    decoded: Tensor
    global_: Tensor


class TrainingFeatures(NamedTuple):
    """What teacher, student and autoencoder make of the images of one step, each (B, channels, 64, 64)."""

    teacher: Tensor  # of the training images
    local: Tensor  # the student's first head on the same images
    penalty: Tensor | None = None  # the student's first head on an image unlike them, if the step has one
    views: ViewFeatures | None = None  # None on local steps


def losses(features: TrainingFeatures, hard_quantile: float | None = None) -> dict[str, Tensor]:
    """The losses of one training step, to be added with weight 1; in float32, whatever the networks multiplied in.

    Args:
        hard_quantile: the local loss averages the squared differences at or over it; None: all of them.

    Returns:
        local: teacher-student difference; penalty: squared student output on the penalty image; autoencoder:
        teacher-autoencoder difference; global: autoencoder-student difference. Without the features that they compare,
        the last three are missing.
    """
    difference = (features.teacher.float() - features.local.float()).square()
    if hard_quantile is not None:
        difference = difference[difference >= quantile(difference.detach(), hard_quantile)]
    parts = {"local": difference.mean()}
    if features.penalty is not None:
        parts["penalty"] = features.penalty.float().square().mean()
    if features.views is not None:
        teacher, decoded, global_ = (maps.float() for maps in features.views)
        parts["autoencoder"] = (teacher - decoded).square().mean()
        parts["global"] = (decoded - global_).square().mean()
    return parts
