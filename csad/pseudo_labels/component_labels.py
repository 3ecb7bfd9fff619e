"""From the features of all components of a category to their labels: the space that they are clustered in, and the clustering."""

from __future__ import annotations

from collections.abc import Iterable

from csad.data.listing import count
from csad.errors import UserError
from csad.evaluation.metrics import LOCO
from csad.pseudo_labels import beyond_clustering, clustering, masks
from csad.pseudo_labels.crop_embedding import random_projection
from csad.settings import PseudoLabelSettings, load

import numpy as np

from models.backbone import CROP_WEIGHTS, PUBLISHED, Backbone

MAX_CLUSTERS = 30  # without a warning: few products have so many kinds of parts


def set_by_a_person(category: str, settings: PseudoLabelSettings, names: Iterable[str]) -> list[str]:
    """Which of these settings of stage 1 a person set, on the command line or in a file for a category of their own.

    The files for MVTec LOCO AD's categories come with the code: what they say is nobody's doing.
    """
    shipped = load(category).pseudo_labels if category in LOCO else PseudoLabelSettings()
    return [name for name in names if getattr(settings, name) != getattr(shipped, name)]


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
    print(f"{category}: parts are told apart by {', '.join(settings.features)}")
    if set_by_a_person(category, settings, ("bandwidth",)):
        print(
            f"{category}: --pseudo_labels.bandwidth has no effect, because it is about the feature cnn_image of "
            f"{PUBLISHED} alone; leave it out, or take --pseudo_labels.features '[cnn_image]' --backbone {PUBLISHED}"
        )
    vectors = beyond_clustering.comparable({name: features[name] for name in settings.features})
    return vectors, beyond_clustering.UNIT_BANDWIDTH


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

    def remedy(direction: str) -> str:
        # Of features in units of their own no other bandwidth can be set.
        if bandwidth == beyond_clustering.UNIT_BANDWIDTH:
            return "other --pseudo_labels.features, such as '[lab, area, shape_hu, position]'"
        return f"{direction} --pseudo_labels.bandwidth than {bandwidth:.3g}"

    arguments = vectors, areas, image_of, images, bandwidth, settings.one_histogram_cluster
    if settings.variants or settings.lookalikes:
        labels = beyond_clustering.semantic_labels(*arguments, settings.variants, settings.lookalikes)
    else:
        labels = clustering.semantic_labels(*arguments)
    if not labels.filtered_histogram.shape[1]:
        raise UserError(
            f"{category}: clustering the {count(len(vectors), 'component')} left no label, as none is alike in half of the "
            f"pictures; try {remedy('a larger')}"
        )
    if labels.clusters.max() > masks.MAX_LABELS:
        raise UserError(
            f"{category}: the components fall into {labels.clusters.max()} clusters (bandwidth {bandwidth:.3g}), and "
            f"a label map holds {masks.MAX_LABELS}; try {remedy('a larger')}"
        )
    clusters = labels.number_of_clusters
    made = f"{count(len(vectors), 'component')} make {count(clusters, 'cluster')}"
    if clusters == 1:
        made = (
            f"warning: {made}, so all count as one kind of part; if the product has only one kind, that is right and there is "
            f"nothing to do; if it has several, one in place of another may go unnoticed: try {remedy('a smaller')}, with "
            "--overwrite"
        )
    elif clusters > MAX_CLUSTERS:
        made = (
            f"warning: {made}, so they count as that many kinds of parts; if the product has so many, that is right and there "
            f"is nothing to do; if it has fewer, one kind has several labels, and a missing part may go unnoticed: try "
            f"{remedy('a larger')}, with --overwrite"
        )
    print(f"{category}: {made}")
    return labels


def paint(labels: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Replace the components of a label map (H, W), in ascending order, by their numbers; the rest is 0; (H, W) uint8."""
    table = np.zeros(256, np.uint8)
    table[masks.components_in_sight(labels)] = numbers
    return table[labels]
