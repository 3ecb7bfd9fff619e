"""From component features to labels and trusted images, on small made-up categories."""

import time

from csad.pseudo_labels import clustering

import numpy as np
import pytest
from sklearn.cluster import MeanShift


def made_up(images=20, seed=0, crumbs=3):
    """Every image has a large and a small part, and one of two variants of a third; a few have crumbs as well."""
    rng = np.random.default_rng(seed)
    centres, sizes = np.array([[0, 0], [5, 0], [0, 5], [5, 5], [20, 20]], float), (0.2, 0.05, 0.1, 0.1, 0.01)
    parts = [
        (image, part)
        for image in range(images)
        for part in (0, 1, 2 + image % 2, *([4] if image < crumbs else []))
    ]
    image_of, part_of = np.array(parts).T
    features = centres[part_of] + rng.normal(0, 0.2, (len(parts), 2))
    areas = np.array(sizes)[part_of] * rng.uniform(0.95, 1.05, len(parts))
    return features, areas, image_of, part_of


def same_grouping(one, other):
    pairs = set(zip(one.tolist(), other.tolist()))
    return len(pairs) == len(set(one.tolist())) == len(set(other.tolist()))


@pytest.mark.parametrize("seed", range(2))
def test_mean_shift_is_that_of_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    points = np.concatenate([rng.normal(centre, 0.3, (12, 3)) for centre in range(4)])
    np.testing.assert_array_equal(
        clustering.mean_shift(points, 0.9), MeanShift(bandwidth=0.9).fit_predict(points)
    )


def wide(components, images, spread=0.02):
    """As many components in eight parts, 512 values each, as a projected cnn_image has."""
    rng = np.random.default_rng(0)
    part_of = rng.integers(0, 8, components)
    centres = rng.normal(0, 0.2, (8, 512))
    return centres[part_of] + rng.normal(0, spread, (components, 512)), part_of


def test_thousands_of_wide_components_take_seconds():
    features, part_of = wide(5000, 500)
    start = time.process_time()
    assert same_grouping(clustering.mean_shift(features, 1.0), part_of)
    assert time.process_time() - start < 60  # a few seconds on an idle machine


def test_histograms_add_up_areas():
    histograms = clustering.label_histograms(
        np.array([1, 1, 2, 0]), np.array([0.1, 0.2, 0.3, 0.4]), np.array([0, 0, 2, 2]), 3
    )
    np.testing.assert_allclose(histograms, [[0.3, 0], [0, 0], [0, 0.3]])


def test_kinds_are_numbered_by_frequency_and_asked_for_until_one_appears():
    rng = np.random.default_rng(0)
    histograms = np.concatenate([rng.normal(0.1, 0.002, (10, 2)), rng.normal(0.4, 0.002, (20, 2))])
    kinds = clustering.group_images(histograms)
    assert set(kinds[10:]) <= {0, -1} and set(kinds[:10]) <= {1, -1}
    assert (kinds >= 0).mean() > 0.8
    assert (clustering.group_images(np.zeros((1, 2))) == 0).all()
    assert (clustering.group_images(np.zeros((5, 0))) == 0).all()


def test_thousands_of_components_climb_from_every_one_of_them():
    features, part_of = wide(1300, 200)
    assert same_grouping(clustering.mean_shift(features, 1.0), part_of)
    rng = np.random.default_rng(0)
    points = rng.normal(0, 1, (1100, 2))
    np.testing.assert_array_equal(
        clustering.mean_shift(points, 1.2), MeanShift(bandwidth=1.2).fit_predict(points)
    )


def test_rare_clusters_are_no_label_and_the_others_keep_their_numbers():
    found = np.repeat([0, 1, 2, 3], [9, 3, 10, 4])
    np.testing.assert_array_equal(
        clustering.drop_rare_clusters(found, 4), np.repeat([1, 0, 3, 4], [9, 3, 10, 4])
    )
    features, areas, image_of, part_of = made_up(images=21)
    labels = clustering.semantic_labels(features, areas, image_of, 21, 1.0, largest_group_only=False)
    assert {part for part in range(5) if labels.clusters[part_of == part].any()} == {
        0,
        1,
        2,
        3,
    }  # 11 and 10 of int(10.5)
    assert labels.number_of_clusters == 4


def test_half_as_many_images_as_a_kind_has_are_trusted_nearest_to_its_mean_among_all():
    histograms = np.array([[0.10], [0.20], [0.36], [0.9], [0.5], [0.7], [0.23]])
    kinds = np.array([0, 0, 0, 1, -1, 1, -1])
    # The mean of kind 0 is 0.22: nearest is image 6, which belongs to no kind.
    np.testing.assert_array_equal(clustering.trusted_images(histograms, kinds, largest_group_only=True), [6])
    np.testing.assert_array_equal(
        clustering.trusted_images(histograms, kinds, largest_group_only=False), [3, 6]
    )
    np.testing.assert_array_equal(clustering.trusted_images(np.zeros((1, 2)), np.array([0]), True), [0])


def test_labels_too_small_in_the_largest_kind_are_dropped_and_the_rest_renumbered():
    image_of, clusters = np.repeat(np.arange(12), 3), np.tile([1, 2, 4], 12)
    areas = np.tile([0.2, 0.0009, 0.1], 12)
    found = clustering.labels_and_trusted(clusters, areas, image_of, 12, largest_group_only=False)
    np.testing.assert_array_equal(found.labels, np.tile([1, 0, 2], 12))
    assert found.raw_histogram.shape == (12, 4) and not found.raw_histogram[:, 2].any()
    np.testing.assert_allclose(found.filtered_histogram, [[0.2, 0.1]] * 12)
