"""From component features to semantic labels, and which images to trust: the clustering of docs/method.md, section 1.

Pure functions on arrays. Images and components are numbered in sorted file order; label 0 means "no label". This is the
published method; `beyond_clustering` is what some presets add.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MIN_MEMBERS = 0.5  # of the number of images; a cluster with fewer components is no label
MAX_STEPS, TOLERANCE = 300, 1e-3  # of MeanShift's climb; bandwidths
SEEDS_AT_ONCE = 1000  # of MeanShift
MIN_GROUP = 0.1  # of the number of images: HDBSCAN's min_cluster_size to begin with
TRUSTED = 0.5  # of the number of a group's images
MIN_AREA = 0.001  # mean fraction of the image that a label takes in the largest group, or it is dropped


@dataclass(frozen=True)
class SemanticLabels:
    """What clustering makes of all components of a category."""

    clusters: np.ndarray  # (components,) cluster of each component, 1..K, or 0 for no label
    # (components,) the same after labels too small were dropped and the rest renumbered, 1..L, or 0.
    labels: np.ndarray
    # (images, K) fraction of each image that each cluster takes; 0 for clusters that are no label.
    raw_histogram: np.ndarray
    filtered_histogram: np.ndarray  # (images, L) fraction that each label takes
    groups: np.ndarray  # (images,) group of each image, 0.. from the most frequent on, or -1 for none.
    trusted: np.ndarray  # indices of the images whose label maps are trusted, ascending

    @property
    def number_of_clusters(self) -> int:
        """How many clusters are a label, also those whose area is too small in the end."""
        return int(np.count_nonzero(np.unique(self.clusters)))


def semantic_labels(
    features: np.ndarray,
    areas: np.ndarray,
    image_of: np.ndarray,
    images: int,
    bandwidth: float,
    largest_group_only: bool,
) -> SemanticLabels:
    """Turn components into semantic labels.

    Args:
        features: (components, D).
        areas: (components,) fractions of the image, 0..1.
        image_of: (components,) index of each component's image.
        images: how many there are.
        bandwidth: of MeanShift, in units of ``features``.
        largest_group_only: trust images of the largest group only ("one histogram cluster").
    """
    clusters = drop_rare_clusters(mean_shift(features, bandwidth), int(MIN_MEMBERS * images))
    return labels_and_trusted(clusters, areas, image_of, images, largest_group_only)


def labels_and_trusted(
    clusters: np.ndarray, areas: np.ndarray, image_of: np.ndarray, images: int, largest_group_only: bool
) -> SemanticLabels:
    """What follows from the clusters (components,) 1..K, or 0 for no label; see `semantic_labels`."""
    histogram = label_histograms(clusters, areas, image_of, images)
    groups = group_images(histogram)
    numbers = renumbered(histogram[groups == 0].mean(0) > MIN_AREA)
    filtered, trusted = histogram[:, numbers[1:] > 0], trusted_images(histogram, groups, largest_group_only)
    return SemanticLabels(clusters, numbers[clusters], histogram, filtered, groups, trusted)


def mean_shift(features: np.ndarray, bandwidth: float, max_seeds: int | None = None) -> np.ndarray:
    """MeanShift with a flat kernel, as scikit-learn does it, (n, D) -> (n,) clusters 0.. in order of density.

    scikit-learn climbs from one seed after the other and takes minutes for what many seeds together climb in seconds.

    Args:
        max_seeds: climb from so many components, drawn from all; None: from every one, and the result is scikit-learn's.
    """
    # Here, like scikit-learn: not to be waited for where an option is wrong.
    from scipy.spatial.distance import cdist

    features = np.asarray(features, np.float64)
    features = features - features.mean(0)  # short vectors lose little in the differences of squares below
    # Not every n-th: components come in a regular order in each image, a stride can miss the same part in all of them.
    drawn = np.random.default_rng(0).permutation(len(features))[:max_seeds]
    seeds = features[np.sort(drawn)]
    at_once = max_seeds or SEEDS_AT_ONCE
    parts = [seeds[first : first + at_once] for first in range(0, len(seeds), at_once)]
    climbs = [_climb(part, features, bandwidth) for part in parts]
    centres, members = (np.concatenate(parts) for parts in zip(*climbs))
    # Of centres within one bandwidth of each other, the one with most members stays; draws go by coordinates.
    order = np.lexsort((*centres.T[::-1], members))[::-1]
    modes: list[np.ndarray] = []
    for centre in centres[order]:
        if not modes or cdist(centre[None], np.array(modes)).min() > bandwidth:
            modes.append(centre)
    return cdist(features, np.array(modes)).argmin(1)


def _climb(seeds: np.ndarray, features: np.ndarray, bandwidth: float) -> tuple[np.ndarray, np.ndarray]:
    """The points (s, D) at which seeds come to rest among features (n, D), and how many features (s,) lie within a bandwidth."""
    lengths = (features**2).sum(1)
    centres, climbing, members = seeds.copy(), np.arange(len(seeds)), np.zeros(len(seeds))
    for _ in range(MAX_STEPS):
        # As matrix products, which for wide features take a tenth of the time of cdist and of a product with booleans.
        squares = (centres[climbing] ** 2).sum(1)[:, None] + lengths - 2 * centres[climbing] @ features.T
        near = (squares <= bandwidth**2).astype(features.dtype)
        members[climbing] = near.sum(1)
        means = near @ features / np.maximum(members[climbing], 1)[:, None]
        steps = np.linalg.norm(means - centres[climbing], axis=1)
        centres[climbing] = means
        climbing = climbing[steps > TOLERANCE * bandwidth]
        if not len(climbing):
            break
    return centres, members


def drop_rare_clusters(clusters: np.ndarray, min_members: int) -> np.ndarray:
    """Clusters (n,) 0.. -> (n,) 1.., in the same order; 0 for those under ``min_members``."""
    return np.where(np.bincount(clusters) >= min_members, np.arange(1, clusters.max() + 2), 0)[clusters]


def label_histograms(labels: np.ndarray, areas: np.ndarray, image_of: np.ndarray, images: int) -> np.ndarray:
    """Fraction of each image that each label takes, (images, K); column k belongs to label k + 1."""
    histograms = np.zeros((images, int(labels.max(initial=0)) + 1))
    np.add.at(histograms, (image_of, labels), areas)
    return histograms[:, 1:]


def group_images(histograms: np.ndarray) -> np.ndarray:
    """Group images by their histograms (images, K) -> (images,) groups, the most frequent one is 0; -1 belongs to none.

    HDBSCAN asks for 10 % of the images in a group, and for fewer until a group appears; where none ever does, all images
    are of one group.
    """
    from sklearn.cluster import HDBSCAN

    images = len(histograms)
    for min_size in range(max(int(MIN_GROUP * images), 2), 1, -1):
        if images < min_size or not histograms.shape[1]:
            break
        groups = HDBSCAN(min_cluster_size=min_size, copy=True).fit_predict(histograms)
        if groups.max() >= 0:
            order = np.argsort(-np.bincount(groups[groups >= 0]), kind="stable")
            return np.where(groups >= 0, np.argsort(order)[groups], -1)
    return np.zeros(images, np.int64)


def apart(histograms: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Largest absolute difference of each histogram (n, K) from a mean one (K,), (n,)."""
    return np.abs(histograms - mean).max(1, initial=0)


def trusted_images(histograms: np.ndarray, groups: np.ndarray, largest_group_only: bool) -> np.ndarray:
    """The images nearest to each group's mean, of all images, half as many as it has; indices, ascending."""
    trusted: set[int] = set()
    for group in range(1 if largest_group_only else groups.max() + 1):
        members = np.flatnonzero(groups == group)
        count = max(int(TRUSTED * len(members)), 1)
        order = np.argsort(apart(histograms, histograms[members].mean(0)), kind="stable")
        trusted |= set(order[:count].tolist())
    return np.array(sorted(trusted), np.int64)


def renumbered(is_label: np.ndarray) -> np.ndarray:
    """New number of each label 0..K, (K + 1,): 1..L in the same order for those that are labels, (K,) bool, else 0."""
    return np.concatenate([[0], np.where(is_label, np.cumsum(is_label), 0)]).astype(np.int64)
