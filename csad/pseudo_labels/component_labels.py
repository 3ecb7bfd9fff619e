"""From the features of all components of a category to their labels: the space that they are clustered in, and the clustering."""

from __future__ import annotations

from csad.errors import UserError
from csad.pseudo_labels import beyond_clustering, clustering, masks
from csad.pseudo_labels.crop_embedding import random_projection
from csad.settings import PseudoLabelSettings

import numpy as np

from models.backbone import CROP_WEIGHTS, PUBLISHED, Backbone

MAX_CLUSTERS = 30  # without a warning: few products have so many kinds of parts


def feature_space(
    category: str,
    features: dict[str, np.ndarray],
    images: int,
    settings: PseudoLabelSettings,
    backbone: Backbone,
    seed: int,
) -> tuple[np.ndarray, float]:
    """The vectors (components, D) to cluster, and MeanShift's bandwidth among them.

    The published network's cnn_image is projected as published; a configured bandwidth is in units of that, and belongs to
    the weights that the published code takes for it. Anything else is brought to units of its own, in which the bandwidth
    is 1.
    """
    if backbone.name == PUBLISHED and settings.features == ["cnn_image"]:
        deep = features["cnn_image"]
        vectors = deep @ random_projection(deep.shape[1], seed)
        if settings.bandwidth != "auto" and backbone.has_published_crops:
            return vectors, settings.bandwidth
        bandwidth = beyond_clustering.estimate_bandwidth(vectors, images)
        reason = "no bandwidth is set for MeanShift"
        if settings.bandwidth != "auto":
            reason = f"bandwidth {settings.bandwidth} belongs to cnn_image by {CROP_WEIGHTS}, not to that by "
            reason += backbone.deepest_origin
        print(f"{category}: {reason}; estimated {bandwidth:.3g}")
        return vectors, bandwidth
    bandwidth = beyond_clustering.UNIT_BANDWIDTH
    print(
        f"{category}: clustering {', '.join(settings.features)} with bandwidth {bandwidth} in units of "
        "their own; a configured one is for wide_resnet50_2's cnn_image alone"
    )
    return beyond_clustering.comparable({name: features[name] for name in settings.features}), bandwidth


def label_components(
    category: str,
    vectors: np.ndarray,
    areas: np.ndarray,
    image_of: np.ndarray,
    images: int,
    bandwidth: float,
    settings: PseudoLabelSettings,
) -> clustering.SemanticLabels:
    """`clustering.semantic_labels` of the published method, or with what the settings add; says how many
    clusters there are. UserError if no label is left, or more than a label map can hold."""
    arguments = vectors, areas, image_of, images, bandwidth, settings.one_histogram_cluster
    if settings.variants or settings.lookalikes:
        labels = beyond_clustering.semantic_labels(*arguments, settings.variants, settings.lookalikes)
    else:
        labels = clustering.semantic_labels(*arguments)
    if not labels.filtered_histogram.shape[1]:
        raise UserError(
            f"{category}: clustering the {len(vectors)} components left no label (bandwidth {bandwidth:.3g}); "
            "try a larger --pseudo_labels.bandwidth or other --pseudo_labels.features"
        )
    if labels.clusters.max() > masks.MAX_LABELS:
        raise UserError(
            f"{category}: the components fall into {labels.clusters.max()} clusters (bandwidth {bandwidth:.3g}), and "
            f"a label map holds {masks.MAX_LABELS}; try a larger --pseudo_labels.bandwidth"
        )
    count = labels.number_of_clusters
    made = f"{len(vectors)} components make {count} cluster{'s' * (count != 1)}"
    if count == 1:
        made = f"warning: {made}; where pictures show several kinds of parts, try a smaller --pseudo_labels.bandwidth"
    elif count > MAX_CLUSTERS:
        made = (
            f"warning: {made}; if pictures show fewer kinds of parts, try a larger --pseudo_labels.bandwidth"
        )
    print(f"{category}: {made}")
    return labels


def paint(labels: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Replace the components of a label map (H, W), in ascending order, by their numbers; the rest is 0; (H, W) uint8."""
    table = np.zeros(256, np.uint8)
    table[masks.components_in_sight(labels)] = numbers
    return table[labels]
