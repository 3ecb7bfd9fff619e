"""What a model says about a batch: one type, whatever runs the model."""

from __future__ import annotations

from typing import Any, NamedTuple


class Prediction(NamedTuple):
    """Everything that a model knows about a batch; tensors inside a model, NumPy arrays from an engine.

    K is the number of fused branches, in the order that the model's metadata names.
    """

    score: Any  # (B,) float32, the sum of branch_scores; higher = more anomalous
    branch_scores: Any  # (B, K) float32, contributions: normalised scores by the fusion's rule, times weights
    anomaly_map: Any  # (B, 64, 64) float32 >= 0, the branch_maps added (models.fusion.fused_map)
    branch_maps: Any  # (B, K, 64, 64) float32, scaled so that of the validation maps' values 0.5 % lie over 1
    label_map: Any  # (B, 256, 256) uint8 component index; 0 everywhere in a model without a segmentor
