"""From component features to semantic labels, and which images to trust: the clustering of docs/METHOD.md, section 1.

Pure functions on arrays. Images and components are numbered in sorted file order; label 0 means "no label".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import cdist
from sklearn.cluster import HDBSCAN
from sklearn.cluster import estimate_bandwidth as sklearn_estimate

LEAST_MEMBERS = 0.5  # of the number of images; a cluster with fewer components is no label
LEAST_MEMBERS_VARIANTS = 0.15  # the same where parts may belong to some kinds of images only
ALWAYS = 0.8  # of the images: so many have a part, or else one of those that take its place
EXCLUSIVE = 0.2  # of the rarer part's images: two that meet in fewer take each other's place
MOST_STEPS, CLOSE_ENOUGH = 300, 1e-3  # of MeanShift's climb; bandwidths
MOST_SEEDS = 1500  # of MeanShift, drawn from all components; every one is the start of a climb
NEIGHBOURS_OF = 2000  # components, drawn from all for the estimate of a bandwidth
LOOKALIKES_APART, LOOKALIKES_TOGETHER = 4.0, 0.8  # spreads within the lookalikes; of the images, see _side_by_side
TAIL = 0.05  # of a cluster's values at either end, not looked at for where to split it
LEAST_KIND = 0.1  # of the number of images: HDBSCAN's min_cluster_size to begin with
TRUSTED = 0.5  # of a kind's images
LEAST_AREA = 0.001  # mean share of the image that a label takes in the largest kind, or it is dropped

# Features of different kinds in comparable units, so that a MeanShift bandwidth of 1 suits them all. Chosen by trying
# some hundred combinations on 100 training images of each category of the built-in data set (seed 0) against its
# true component maps.
UNIT_BANDWIDTH = 1.0
LIGHTNESS_UNIT, CHROMA_UNIT = 40.0, 16.0  # in Lab; light changes from image to image more than hue does
LOG_AREA_UNIT, HU_UNIT, ELONGATION_UNIT, POSITION_UNIT, LOG_COLOR_UNIT = 2.0, 0.5, 0.5, 0.25, 1.0
DEEP_DIMENSIONS, DEEP_SPREAD = 10, 1.25  # principal components of cnn_image; their total standard deviation


@dataclass(frozen=True)
class SemanticLabels:
    """What clustering makes of all components of a category.

    Attributes:
        clusters: (components,) cluster of each component, 1..K, or 0 for no label.
        labels: (components,) the same after labels too small were dropped and the rest renumbered, 1..L, or 0.
        raw_histogram: (images, K) share of each image that each cluster takes.
        filtered_histogram: (images, L) share that each label takes.
        kinds: (images,) kind of each image, 0.. from the most frequent on, or -1 for none.
        trusted: indices of the images whose label maps are trusted, ascending.
    """

    clusters: np.ndarray
    labels: np.ndarray
    raw_histogram: np.ndarray
    filtered_histogram: np.ndarray
    kinds: np.ndarray
    trusted: np.ndarray


def semantic_labels(features: np.ndarray, areas: np.ndarray, image_of: np.ndarray, images: int, bandwidth: float,
                    largest_kind_only: bool, variants: bool = False, lookalikes: bool = False) -> SemanticLabels:
    """Turn components into semantic labels.

    Args:
        features: (components, D).
        areas: (components,) shares of the image, 0..1.
        image_of: (components,) index of each component's image.
        images: how many there are.
        bandwidth: of MeanShift, in units of ``features``.
        largest_kind_only: trust images of the largest kind only ("one histogram cluster").
        variants: also label parts that occur in some kinds of images only, say a cable in three colours: clusters of
            15 % rather than half the images do if others take their place elsewhere (`without_sporadic`), and a label
            has to be large enough in any of the trusted kinds rather than in the largest one. Images of no kind count to
            the nearest one, so that half of all images can be trusted: a short training needs many.
        lookalikes: also tell apart parts that are alike but for one feature, say a long and a short bolt, where most images
            show both in the same numbers (see `split_lookalikes`).
    """
    least = (LEAST_MEMBERS_VARIANTS if variants else LEAST_MEMBERS) * images
    found = mean_shift(features, bandwidth)
    clusters = number_clusters(split_lookalikes(features, found, image_of, least) if lookalikes else found, least)
    if variants:
        clusters = without_sporadic(clusters, image_of, images)
    raw_histogram = label_histograms(clusters, areas, image_of, images)
    kinds = kinds_of_images(raw_histogram)
    if variants:
        kinds = with_nearest_kind(raw_histogram, kinds)
    kept = labels_of_size(raw_histogram, kinds, every_kind=variants and not largest_kind_only)
    return SemanticLabels(clusters, kept[clusters], raw_histogram, raw_histogram[:, kept[1:] > 0], kinds,
                          trusted_images(raw_histogram, kinds, largest_kind_only))


def comparable(features: dict[str, np.ndarray]) -> np.ndarray:
    """Bring component features (docs/METHOD.md; each (n, ...)) to comparable units and join them to vectors (n, D).

    Of shape_hu the first two moments count, the others are noise in small components: the first tells a disc from a
    ring or a rod, and the second one relative to it is the elongation, 0..1. cnn_image is scaled to length 1 before its
    principal components are taken.
    """
    columns = {
        "lab": lambda values: values / (LIGHTNESS_UNIT, CHROMA_UNIT, CHROMA_UNIT),
        "area": lambda values: np.log(values) / LOG_AREA_UNIT,
        "color": lambda values: np.log(np.maximum(values, 1e-3)) / LOG_COLOR_UNIT,
        "position": lambda values: values / POSITION_UNIT,
        "shape_hu": lambda values: np.stack([values[:, 0] / HU_UNIT, _elongation(values) / ELONGATION_UNIT], 1),
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
    return reduced * (DEEP_SPREAD / np.sqrt(max((reduced ** 2).sum(1).mean(), 1e-12)))


def number_clusters(found: np.ndarray, least: float) -> np.ndarray:
    """Clusters (n,) in any numbering -> (n,) 1..K, the largest first; 0 for those under ``least`` members."""
    members = np.bincount(found)
    order = np.argsort(-members, kind="stable")
    numbers = np.zeros(len(members), np.int64)
    large = order[members[order] >= least]
    numbers[large] = np.arange(1, len(large) + 1)
    return numbers[found]


def without_sporadic(clusters: np.ndarray, image_of: np.ndarray, images: int) -> np.ndarray:
    """Clusters that good images have by rule, renumbered 1..; the others become 0. Where none is left, all stay.

    By rule means: in 80 % of the images, or in 80 % together with clusters that it hardly ever meets, which take its
    place there (the juices of a bottle). A tray's compartment that is proposed now and then, and anything else that comes
    and goes without a substitute, says more about the proposer than about the product.
    """
    present = np.zeros((images, clusters.max(initial=0) + 1), bool)
    present[image_of, clusters] = True
    present = present[:, 1:]
    share = present.mean(0)
    together = (present.T.astype(float) @ present) / images
    exclusive = together < EXCLUSIVE * np.minimum(share[:, None], share)
    np.fill_diagonal(exclusive, True)  # a part stands in for itself
    regular = np.array([present[:, row].any(1).mean() >= ALWAYS for row in exclusive], bool)
    if not regular.any():
        return clusters
    return np.concatenate([[0], np.where(regular, np.cumsum(regular), 0)])[clusters]


def split_lookalikes(features: np.ndarray, found: np.ndarray, image_of: np.ndarray, least: float) -> np.ndarray:
    """Split clusters that hold two parts which differ sharply in one feature, while lighting blurs all the others.

    One bandwidth for all features cannot see that. A cluster is split where, along one feature, it falls into two groups
    that lie four times their spread apart, each large enough for a label, and where four of five images show both in the
    same numbers. Both figures lie amid ranges (3.5..4.5, 0.7..0.9) that give the same labels on the built-in data set.

    Args:
        features: (n, D).
        found: (n,) clusters 0..
        image_of: (n,) index of each component's image.
        least: members of a group.

    Returns:
        (n,) clusters 0.., in another numbering.
    """
    found, pending = found.copy(), list(range(found.max() + 1))
    while pending:
        cluster = pending.pop()
        members = np.flatnonzero(found == cluster)
        if len(members) < 2 * least:
            continue
        splits = [(apart, upper) for upper, apart in map(_two_groups, features[members].T)
                  if apart > LOOKALIKES_APART and min(upper.sum(), (~upper).sum()) >= least
                  and _side_by_side(image_of[members[upper]], image_of[members[~upper]]) > LOOKALIKES_TOGETHER]
        if splits:
            _, upper = max(splits, key=lambda split: split[0])
            found[members[upper]] = found.max() + 1
            pending += [cluster, int(found.max())]
    return found


def _side_by_side(ones: np.ndarray, others: np.ndarray) -> float:
    """How regularly two groups, lists of image numbers, appear together, 0..1.

    Of the images that show the usual number of both together (proposals failed in the others), the share in which each
    group has its usual number, at least one.
    """
    counts = np.stack([np.bincount(group, minlength=max(ones.max(), others.max()) + 1) for group in (ones, others)], 1)
    totals = counts.sum(1)
    usual = np.bincount(totals[totals > 0]).argmax()
    pairs, often = np.unique(counts[totals == usual], axis=0, return_counts=True)
    return float(often.max() / often.sum()) if pairs[often.argmax()].all() else 0.0


def _two_groups(values: np.ndarray) -> tuple[np.ndarray, float]:
    """Cut values (n,) in two where that leaves the least variance: which are in the upper group, and how far apart they are.

    The distance of the groups' medians is in units of their mean spread (1.48 MAD, a standard deviation without outliers).
    """
    ordered = np.sort(values)
    tail = int(TAIL * len(ordered))
    ordered = ordered[tail:len(ordered) - tail]
    below = np.arange(1, len(ordered))
    sums = np.cumsum(ordered)[:-1]
    gain = (sums / below - (ordered.sum() - sums) / (len(ordered) - below)) ** 2 * below * (len(ordered) - below)
    cut = gain.argmax()
    upper = values > (ordered[cut] + ordered[cut + 1]) / 2
    if not upper.any() or upper.all():
        return upper, 0.0
    medians = [np.median(values[side]) for side in (upper, ~upper)]
    spreads = [1.48 * np.median(np.abs(values[side] - median)) for side, median in zip((upper, ~upper), medians)]
    return upper, float((medians[0] - medians[1]) / max(np.mean(spreads), 1e-9))


def estimate_bandwidth(features: np.ndarray, images: int) -> float:
    """A MeanShift bandwidth for components (n, D) of so many images.

    scikit-learn's estimate, the mean distance to the k-th nearest neighbour, with k = the members of the smallest cluster
    that counts as a label instead of 30 % of everything, which joins parts as soon as an image has more than three.
    """
    share = min(max(LEAST_MEMBERS * images / len(features), 1 / min(len(features), NEIGHBOURS_OF)), 1)
    found = sklearn_estimate(features, quantile=share, n_samples=NEIGHBOURS_OF, random_state=0)
    return float(max(found, np.finfo(np.float32).eps))


def mean_shift(features: np.ndarray, bandwidth: float) -> np.ndarray:
    """MeanShift with a flat kernel, as scikit-learn does it, (n, D) -> (n,) clusters 0.. in order of density.

    scikit-learn climbs from one seed after the other and takes minutes for what all seeds together climb in seconds;
    with up to 1500 points, which then are all seeds, the result is the same.
    """
    features = np.asarray(features, np.float64)
    features = features - features.mean(0)  # short vectors lose little in the differences of squares below
    lengths = (features ** 2).sum(1)
    # Not every n-th: components come in a regular order in each image, a stride can miss the same part in all of them.
    drawn = np.random.default_rng(0).permutation(len(features))[:MOST_SEEDS]
    centres = features[np.sort(drawn)]
    climbing, members = np.arange(len(centres)), np.zeros(len(centres))
    for _ in range(MOST_STEPS):
        # As matrix products, which for wide features take a tenth of the time of cdist and of a product with booleans.
        squares = (centres[climbing] ** 2).sum(1)[:, None] + lengths - 2 * centres[climbing] @ features.T
        near = (squares <= bandwidth ** 2).astype(features.dtype)
        members[climbing] = near.sum(1)
        means = near @ features / np.maximum(members[climbing], 1)[:, None]
        steps = np.linalg.norm(means - centres[climbing], axis=1)
        centres[climbing] = means
        climbing = climbing[steps > CLOSE_ENOUGH * bandwidth]
        if not len(climbing):
            break
    # Of centres within one bandwidth of each other, the one with most members stays; draws go by coordinates.
    order = np.lexsort((*centres.T[::-1], members))[::-1]
    modes: list[np.ndarray] = []
    for centre in centres[order]:
        if not modes or cdist(centre[None], np.array(modes)).min() > bandwidth:
            modes.append(centre)
    return cdist(features, np.array(modes)).argmin(1)


def label_histograms(labels: np.ndarray, areas: np.ndarray, image_of: np.ndarray, images: int) -> np.ndarray:
    """Share of each image that each label takes, (images, K); column k belongs to label k + 1."""
    histograms = np.zeros((images, int(labels.max(initial=0)) + 1))
    np.add.at(histograms, (image_of, labels), areas)
    return histograms[:, 1:]


def kinds_of_images(histograms: np.ndarray) -> np.ndarray:
    """Group images by their histograms (images, K) -> (images,) kinds, the most frequent one is 0; -1 belongs to none.

    HDBSCAN asks for 10 % of the images in a kind, and for fewer until a kind appears; where none ever does, all images
    are of one kind.
    """
    images = len(histograms)
    for least in range(max(round(LEAST_KIND * images), 2), 1, -1):
        if images < least or not histograms.shape[1]:
            break
        found = HDBSCAN(min_cluster_size=least, copy=True).fit_predict(histograms)
        if found.max() >= 0:
            order = np.argsort(-np.bincount(found[found >= 0]), kind="stable")
            return np.where(found >= 0, np.argsort(order)[found], -1)
    return np.zeros(images, np.int64)


def with_nearest_kind(histograms: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Give images of no kind (-1) that whose mean histogram is nearest, by the largest absolute difference; (images,)."""
    means = np.array([histograms[kinds == kind].mean(0) for kind in range(kinds.max() + 1)])
    nearest = np.abs(histograms[:, None] - means).max(2, initial=0).argmin(1)
    return np.where(kinds < 0, nearest, kinds)


def trusted_images(histograms: np.ndarray, kinds: np.ndarray, largest_kind_only: bool) -> np.ndarray:
    """In each kind, the half nearest to its mean histogram by the largest absolute difference; indices, ascending."""
    trusted: list[int] = []
    for kind in range(1 if largest_kind_only else kinds.max() + 1):
        members = np.flatnonzero(kinds == kind)
        apart = np.abs(histograms[members] - histograms[members].mean(0)).max(1, initial=0)
        nearest = np.argsort(apart, kind="stable")[:int(np.ceil(TRUSTED * len(members)))]
        trusted += members[nearest].tolist()
    return np.array(sorted(trusted), np.int64)


def labels_of_size(histograms: np.ndarray, kinds: np.ndarray, every_kind: bool) -> np.ndarray:
    """New number of each label, (K + 1,): 1..L for those with more than 0.1 % mean area, else 0.

    Args:
        every_kind: it is enough to be so large in any kind of images; otherwise it has to be in the largest kind.
    """
    means = np.array([histograms[kinds == kind].mean(0) for kind in range(kinds.max() + 1 if every_kind else 1)])
    large = means.max(0) > LEAST_AREA
    return np.concatenate([[0], np.where(large, np.cumsum(large), 0)]).astype(np.int64)


def usual_numbers(labels: np.ndarray, image_of: np.ndarray, trusted: np.ndarray, images: int, count: int) -> np.ndarray:
    """How many components of each label 1..count most trusted images have, (count,); the smaller number in a draw."""
    numbers = np.zeros((images, count + 1), np.int64)
    np.add.at(numbers, (image_of, labels), 1)
    return np.array([np.bincount(column).argmax() for column in numbers[trusted, 1:].T], np.int64)
