"""The whole detector as one module: image in, score out (METHOD.md section 4).

Its state dict has the keys and shapes of the published export, so published ``.pth`` files load and score.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from errors import UserError
from models.backbone import PUBLISHED, blind_to_light, empty_encoder
from models.lgst import LGST, Differences
from models.patch_histogram import PatchHistogramDetector
from models.segmentor import Segmentor

METADATA_KEY = "csad"


class Findings(NamedTuple):
    """Everything the detector knows about a batch."""

    score: Tensor  # (B,) fused
    lgst_score: Tensor  # (B,) maximum of the anomaly map, not normalised
    patch_histogram_score: Tensor  # (B,) sum of the two normalised distances
    label_map: Tensor  # (B, 256, 256) component index
    anomaly_map: Tensor  # (B, 64, 64)
    differences: Differences  # local and global, before map normalisation


class FusedModel(LGST):
    """LGST, segmentor and patch histogram over one shared encoder.

    Args:
        encoder: images (B, 3, 256, 256) -> maps at 1/4, 1/8 and 1/16.
        encoder_channels: of those maps.
        segmentor: its maps -> logits (B, C, 256, 256).
        detector: label maps -> patch-histogram score.
        width, channels: of the student and of the teacher.
        log_colours: see `LGST`.
    """

    def __init__(self, encoder: nn.Module, encoder_channels: tuple[int, int, int], segmentor: Segmentor,
                 detector: PatchHistogramDetector, width: int, channels: int,
                 log_colours: bool = False):
        super().__init__(encoder_channels, width, channels, log_colours)
        self.encoder = encoder
        self.segmentor = segmentor
        self.patch_hist_detector = detector
        for branch in ("lgst", "patch_hist"):
            self.register_buffer(f"{branch}_mean", torch.tensor(0.0))
            self.register_buffer(f"{branch}_std", torch.tensor(1.0))

    def analyse(self, images: Tensor) -> Findings:
        """(B, 3, 256, 256) RGB, ImageNet-normalised -> everything there is to know."""
        features = self.encoder(images)
        differences = self.differences(images, features)
        anomaly_map = self.anomaly_map(differences)
        lgst_score = anomaly_map.amax((1, 2))
        label_map = self.segmentor(features).argmax(1)
        patch_histogram_score = self.patch_hist_detector(label_map)
        score = ((lgst_score - self.lgst_mean) / self.lgst_std
                 + (patch_histogram_score - self.patch_hist_mean) / self.patch_hist_std)
        return Findings(score, lgst_score, patch_histogram_score, label_map, anomaly_map, differences)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, 256, 256) RGB, ImageNet-normalised -> score (B,)."""
        return self.analyse(images).score


def from_state(state: Mapping[str, Tensor]) -> FusedModel:
    """Build the model that a state dict describes, published or ours, in eval mode.

    Widths and class count are read off the shapes; the backbone's name is in our metadata, and a file without
    metadata is a published one.

    Raises:
        UserError: a key is missing, unknown, or has another shape than its neighbours imply.
    """
    try:
        backbone = metadata(state).get("backbone", PUBLISHED)
        encoder, encoder_channels = empty_encoder(backbone)
        classes, width = state["segmentor.fc2.conv3.weight"].shape[:2]
        channels, student_width = state["local_st.conv_st.weight"].shape[:2]
        model = FusedModel(encoder, encoder_channels, Segmentor(encoder_channels, width, classes),
                           PatchHistogramDetector(classes), student_width, channels, blind_to_light(backbone))
        model.load_state_dict(state)
    except (KeyError, RuntimeError, AttributeError, TypeError) as problem:
        reason = " ".join(str(problem).split())[:200]
        raise UserError(f"this is not a CSAD model's state dict ({reason}); make one with "
                        "export_model.py --format torch") from problem
    return model.eval().requires_grad_(False)


def metadata(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What is known about a fused state dict; empty for published files."""
    return getattr(state, "_metadata", {}).get(METADATA_KEY, {})


def attach_metadata(state: Mapping[str, Tensor], content: dict[str, Any]) -> None:
    """Keep plain values with a state dict.

    They go beside the version numbers that PyTorch itself keeps in ``_metadata``: saved and loaded with the file,
    while the keys stay the published ones.
    """
    state._metadata[METADATA_KEY] = content
