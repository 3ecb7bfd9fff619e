"""What stage 1's clustering adds to the published method, for the settings that ask for it (docs/beyond.md).

Parts that only some groups of images have (`variants`), parts alike but for one feature (`lookalikes`), features in units of
their own, and a bandwidth where none is published. `clustering` is the published method.
"""

from __future__ import annotations

from csad.pseudo_labels import clustering
from csad.pseudo_labels.clustering import MIN_AREA, MIN_MEMBERS, TRUSTED, SemanticLabels

import numpy as np

MIN_MEMBERS_VARIANTS = 0.15  # of the number of images, where parts may belong to some groups of images only
ALWAYS = 0.8  # of the images: so many have a part, or else one of those that take its place
EXCLUSIVE = 0.2  # of the rarer part's images: two that meet in fewer take each other's place
MAX_SEEDS = 1500  # of MeanShift, drawn from all components; every one is the start of a climb
NEIGHBOURS_OF = 2000  # components, drawn from all for the estimate of a bandwidth
# Spreads within the lookalikes; of the images, see _cooccurrence.
LOOKALIKES_APART, LOOKALIKES_TOGETHER = 4.0, 0.8
TAIL = 0.05  # of a cluster's values at either end, ignored in the search for a split

# Features of different kinds in comparable units, so that a MeanShift bandwidth of 1 suits them all. Chosen by trying
# some hundred combinations on 100 training images of each category of the built-in data set (seed 0) against its
# true component maps.
UNIT_BANDWIDTH = 1.0
LIGHTNESS_UNIT, CHROMA_UNIT = 40.0, 16.0  # in Lab; light changes from image to image more than hue does
LOG_AREA_UNIT, HU_UNIT, ELONGATION_UNIT, POSITION_UNIT, LOG_COLOR_UNIT = 2.0, 0.5, 0.5, 0.25, 1.0
DEEP_DIMENSIONS, DEEP_SPREAD = 10, 1.25  # principal components of cnn_image; their total standard deviation


def semantic_labels(
    features: np.ndarray,
    areas: np.ndarray,
    image_of: np.ndarray,
    images: int,
    bandwidth: float,
    largest_group_only: bool,
    variants: bool,
    lookalikes: bool,
) -> SemanticLabels:
    """Turn components into semantic labels, numbered from the most frequent on; see `clustering.semantic_labels`.

    Args:
        variants: also label parts that occur in some groups of images only, say a cable in three colours: clusters of
            15 % rather than half the images do if others take their place elsewhere (`drop_irregular_clusters`), and a label
            has to be large enough in any of the groups rather than in the largest one. All groups are trusted, and images of
            no group count to the nearest one, so that half of all images can be: a short training needs many.
        lookalikes: also tell apart parts that are alike but for one feature, say a long and a short bolt, where most images
            show both in the same numbers (see `split_similar_parts`).
    """
    min_members = MIN_MEMBERS_VARIANTS * images if variants else int(MIN_MEMBERS * images)
    clusters = clustering.mean_shift(features, bandwidth, MAX_SEEDS)
    if lookalikes:
        clusters = split_similar_parts(features, clusters, image_of, min_members)
    clusters = number_clusters(clusters, min_members)
    if not variants:
        return clustering.labels_and_trusted(clusters, areas, image_of, images, largest_group_only)
    clusters = drop_irregular_clusters(clusters, image_of, images)
    histogram = clustering.label_histograms(clusters, areas, image_of, images)
    groups = with_nearest_group(histogram, clustering.group_images(histogram))
    numbers, trusted = labels_of_any_group(histogram, groups), trusted_members(histogram, groups)
    filtered = histogram[:, numbers[1:] > 0]
    return SemanticLabels(clusters, numbers[clusters], histogram, filtered, groups, trusted)


def number_clusters(clusters: np.ndarray, min_members: float) -> np.ndarray:
    """Clusters (n,) in any numbering -> (n,) 1..K, the largest first; 0 for those under ``min_members``."""
    members = np.bincount(clusters)
    order = np.argsort(-members, kind="stable")
    numbers = np.zeros(len(members), np.int64)
    large = order[members[order] >= min_members]
    numbers[large] = np.arange(1, len(large) + 1)
    return numbers[clusters]


def drop_irregular_clusters(clusters: np.ndarray, image_of: np.ndarray, images: int) -> np.ndarray:
    """Clusters that good images regularly have, renumbered 1..; the others become 0. If none is left, all stay.

    Regularly means: in 80 % of the images, or in 80 % together with clusters that it hardly ever meets, which take its
    place there (the juices of a bottle). A tray's compartment that is proposed now and then, and anything else that comes
    and goes without a substitute, says more about the proposer than about the product.
    """
    present = np.zeros((images, clusters.max(initial=0) + 1), bool)
    present[image_of, clusters] = True
    present = present[:, 1:]
    presence = present.mean(0)
    together = (present.T.astype(float) @ present) / images
    exclusive = together < EXCLUSIVE * np.minimum(presence[:, None], presence)
    np.fill_diagonal(exclusive, True)  # a part stands in for itself
    regular = np.array([present[:, row].any(1).mean() >= ALWAYS for row in exclusive], bool)
    return clustering.renumbered(regular)[clusters] if regular.any() else clusters


def split_similar_parts(
    features: np.ndarray, clusters: np.ndarray, image_of: np.ndarray, min_members: float
) -> np.ndarray:
    """Split clusters that hold two parts which differ sharply in one feature, while lighting blurs all the others.

    One bandwidth for all features cannot see that. A cluster is split where, along one feature, it falls into two groups
    that lie four times their spread apart, each large enough for a label, and where four of five images show both in the
    same numbers. Both figures lie amid ranges (3.5..4.5, 0.7..0.9) that give the same labels on the built-in data set.

    Args:
        features: (n, D).
        clusters: (n,) 0..
        image_of: (n,) index of each component's image.
        min_members: of a group.

    Returns:
        (n,) clusters 0.., in another numbering.
    """
    clusters, pending = clusters.copy(), list(range(clusters.max() + 1))
    while pending:
        cluster = pending.pop()
        members = np.flatnonzero(clusters == cluster)
        if len(members) < 2 * min_members:
            continue
        splits = [
            (apart, upper)
            for upper, apart in map(_two_groups, features[members].T)
            if apart > LOOKALIKES_APART
            and min(upper.sum(), (~upper).sum()) >= min_members
            and _cooccurrence(image_of[members[upper]], image_of[members[~upper]]) > LOOKALIKES_TOGETHER
        ]
        if splits:
            _, upper = max(splits, key=lambda split: split[0])
            clusters[members[upper]] = clusters.max() + 1
            pending += [cluster, int(clusters.max())]
    return clusters


def _cooccurrence(first: np.ndarray, second: np.ndarray) -> float:
    """How regularly two groups, lists of image numbers, appear together, 0..1.

    Of the images that show the most common number of both together (proposals failed in the others), the fraction in
    which each group has its own most common number, at least one.
    """
    images = max(first.max(), second.max()) + 1
    counts = np.stack([np.bincount(group, minlength=images) for group in (first, second)], 1)
    totals = counts.sum(1)
    most_common = np.bincount(totals[totals > 0]).argmax()
    pairs, often = np.unique(counts[totals == most_common], axis=0, return_counts=True)
    return float(often.max() / often.sum()) if pairs[often.argmax()].all() else 0.0


def _two_groups(values: np.ndarray) -> tuple[np.ndarray, float]:
    """Cut values (n,) in two where that leaves the least variance: which are in the upper group, and how far apart they are.

    The distance of the groups' medians is in units of their mean spread (1.48 MAD, a standard deviation without outliers).
    """
    ordered = np.sort(values)
    tail = int(TAIL * len(ordered))
    ordered = ordered[tail : len(ordered) - tail]
    below = np.arange(1, len(ordered))
    above = len(ordered) - below
    sums = np.cumsum(ordered)[:-1]
    gain = (sums / below - (ordered.sum() - sums) / above) ** 2 * below * above
    cut = gain.argmax()
    upper = values > (ordered[cut] + ordered[cut + 1]) / 2
    if not upper.any() or upper.all():
        return upper, 0.0
    groups = (values[upper], values[~upper])
    medians = [np.median(group) for group in groups]
    spreads = [1.48 * np.median(np.abs(group - median)) for group, median in zip(groups, medians)]
    return upper, float((medians[0] - medians[1]) / max(np.mean(spreads), 1e-9))


def group_means(histograms: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Mean histogram of each group, (groups, K)."""
    return np.array([histograms[groups == group].mean(0) for group in range(groups.max() + 1)])


def with_nearest_group(histograms: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Give images of no group (-1) that whose mean histogram is nearest, by the largest absolute difference; (images,)."""
    means = group_means(histograms, groups)
    nearest = np.abs(histograms[:, None] - means).max(2, initial=0).argmin(1)
    return np.where(groups < 0, nearest, groups)


def trusted_members(histograms: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The half of each group's own images nearest to its mean histogram (`clustering.apart`); indices, ascending."""
    trusted: list[int] = []
    for group in range(groups.max() + 1):
        members = np.flatnonzero(groups == group)
        distances = clustering.apart(histograms[members], histograms[members].mean(0))
        nearest = np.argsort(distances, kind="stable")[: int(np.ceil(TRUSTED * len(members)))]
        trusted += members[nearest].tolist()
    return np.array(sorted(trusted), np.int64)


def labels_of_any_group(histograms: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """New number of each label, (K + 1,): 1..L for those with over 0.1 % mean area in any group of images, else 0."""
    return clustering.renumbered(group_means(histograms, groups).max(0) > MIN_AREA)


def estimate_bandwidth(features: np.ndarray, images: int) -> float:
    """A MeanShift bandwidth for components (n, D) of so many images.

    scikit-learn's estimate, the mean distance to the k-th nearest neighbour, with k = the members of the smallest cluster
    that counts as a label instead of 30 % of everything, which joins parts as soon as an image has more than three.
    """
    from sklearn.cluster import estimate_bandwidth as sklearn_estimate

    fraction = min(max(MIN_MEMBERS * images / len(features), 1 / min(len(features), NEIGHBOURS_OF)), 1)
    estimate = sklearn_estimate(features, quantile=fraction, n_samples=NEIGHBOURS_OF, random_state=0)
    return float(max(estimate, np.finfo(np.float32).eps))


def comparable(features: dict[str, np.ndarray]) -> np.ndarray:
    """Bring component features (docs/method.md; each (n, ...)) to comparable units and join them to vectors (n, D).

    Of shape_hu the first two moments count, the others are noise in small components: the first tells a disc from a
    ring or a rod, and the second one relative to it is the elongation, 0..1. cnn_image is scaled to length 1 before its
    principal components are taken.
    """
    columns = {
        "lab": lambda values: values / (LIGHTNESS_UNIT, CHROMA_UNIT, CHROMA_UNIT),
        "area": lambda values: np.log(values) / LOG_AREA_UNIT,
        "color": lambda values: np.log(np.maximum(values, 1e-3)) / LOG_COLOR_UNIT,
        "position": lambda values: values / POSITION_UNIT,
        "shape_hu": lambda values: np.c_[values[:, 0] / HU_UNIT, _elongation(values) / ELONGATION_UNIT],
        "cnn_image": _principal_components,
    }
    return np.concatenate([columns[name](values) for name, values in features.items()], axis=1)


def _elongation(shape_hu: np.ndarray) -> np.ndarray:
    """sqrt(second) / first Hu moment, from their logarithms (n, 7): 0 for a disc or a ring, near 1 for a rod; (n,)."""
    ratio = 10 ** (shape_hu[:, 0] - shape_hu[:, 1] / 2)
    return np.where(shape_hu[:, 1] == 0, 0, np.minimum(ratio, 1))


def _principal_components(deep: np.ndarray) -> np.ndarray:
    deep = deep.astype(np.float64)
    deep /= np.maximum(np.linalg.norm(deep, axis=1, keepdims=True), 1e-12)
    deep -= deep.mean(0)
    _, _, axes = np.linalg.svd(deep.T @ deep)
    reduced = deep @ axes[:DEEP_DIMENSIONS].T
    return reduced * (DEEP_SPREAD / np.sqrt(max((reduced**2).sum(1).mean(), 1e-12)))
