"""From component features to labels and trusted images, on small made-up categories."""

import time

import numpy as np
import pytest
from sklearn.cluster import MeanShift

from pseudo_labels import clustering


def made_up(images=20, seed=0, crumbs=3):
    """Every image has a large and a small part, and one of two variants of a third; a few have crumbs as well."""
    rng = np.random.default_rng(seed)
    centres, sizes = np.array([[0, 0], [5, 0], [0, 5], [5, 5], [20, 20]], float), (0.2, 0.05, 0.1, 0.1, 0.01)
    parts = [(image, part) for image in range(images)
             for part in (0, 1, 2 + image % 2, *([4] if image < crumbs else []))]
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
    np.testing.assert_array_equal(clustering.mean_shift(points, 0.9), MeanShift(bandwidth=0.9).fit_predict(points))


def test_mean_shift_finds_the_same_groups_from_fewer_seeds(monkeypatch):
    features, _, _, part_of = made_up()
    monkeypatch.setattr(clustering, "MOST_SEEDS", 40)
    assert same_grouping(clustering.mean_shift(features, 1.0), part_of)


def wide(components, images, spread=0.02):
    """As many components in eight parts, 512 values each, as a projected cnn_image has."""
    rng = np.random.default_rng(0)
    part_of = rng.integers(0, 8, components)
    centres = rng.normal(0, 0.2, (8, 512))
    return centres[part_of] + rng.normal(0, spread, (components, 512)), part_of


def test_an_estimated_bandwidth_keeps_parts_apart():
    features, part_of = wide(800, 100)
    found = clustering.mean_shift(features, clustering.estimate_bandwidth(features, 100))
    assert same_grouping(found, part_of)
    assert clustering.estimate_bandwidth(np.zeros((3, 2)), 2) > 0
    assert clustering.estimate_bandwidth(np.zeros((1, 2)), 5) > 0


def test_thousands_of_wide_components_take_seconds():
    features, part_of = wide(5000, 500)
    start = time.process_time()
    assert same_grouping(clustering.mean_shift(features, 1.0), part_of)
    assert time.process_time() - start < 60  # a few seconds on an idle machine


def test_small_clusters_are_no_label():
    features, _, _, part_of = made_up()
    published = clustering.number_clusters(clustering.mean_shift(features, 1.0), least=0.5 * 20)
    assert set(published[part_of == 4]) == {0} and published.max() == 4
    assert set(clustering.number_clusters(clustering.mean_shift(features, 1.0), least=11)[np.isin(part_of, (2, 3, 4))]) == {0}


def test_histograms_add_up_areas():
    histograms = clustering.label_histograms(np.array([1, 1, 2, 0]), np.array([0.1, 0.2, 0.3, 0.4]), np.array([0, 0, 2, 2]), 3)
    np.testing.assert_allclose(histograms, [[0.3, 0], [0, 0], [0, 0.3]])


def test_kinds_are_numbered_by_frequency_and_asked_for_until_one_appears():
    rng = np.random.default_rng(0)
    histograms = np.concatenate([rng.normal(0.1, 0.002, (10, 2)), rng.normal(0.4, 0.002, (20, 2))])
    kinds = clustering.kinds_of_images(histograms)
    assert set(kinds[10:]) <= {0, -1} and set(kinds[:10]) <= {1, -1}
    assert (kinds >= 0).mean() > 0.8
    assert (clustering.kinds_of_images(np.zeros((1, 2))) == 0).all()
    assert (clustering.kinds_of_images(np.zeros((5, 0))) == 0).all()


def test_images_of_no_kind_join_the_nearest():
    histograms, kinds = np.array([[0.1, 0], [0.12, 0], [0.5, 0], [0.17, 0], [0.4, 0]]), np.array([0, 0, 1, -1, -1])
    np.testing.assert_array_equal(clustering.with_nearest_kind(histograms, kinds), [0, 0, 1, 0, 1])


def test_the_half_nearest_the_mean_is_trusted():
    histograms = np.array([[0.1], [0.2], [0.35], [0.9], [0.5], [0.7]])
    kinds = np.array([0, 0, 0, 1, -1, 1])
    np.testing.assert_array_equal(clustering.trusted_images(histograms, kinds, largest_kind_only=False), [0, 1, 3])
    np.testing.assert_array_equal(clustering.trusted_images(histograms, kinds, largest_kind_only=True), [0, 1])


def test_labels_too_small_in_the_largest_kind_are_dropped_and_the_rest_renumbered():
    histograms = np.array([[0.0, 0.2, 0.0005, 0.1], [0.0, 0.2, 0.0005, 0.1], [0.3, 0.1, 0.0005, 0.1]])
    kinds = np.array([0, 0, 1])
    np.testing.assert_array_equal(clustering.labels_of_size(histograms, kinds, every_kind=False), [0, 0, 1, 0, 2])
    np.testing.assert_array_equal(clustering.labels_of_size(histograms, kinds, every_kind=True), [0, 1, 2, 0, 3])


@pytest.mark.parametrize("variants, parts", [(True, (0, 1, 2, 3)), (False, (0, 1))])
def test_variants_of_a_part_get_labels_only_on_request(variants, parts):
    features, areas, image_of, part_of = made_up(images=30)
    # A third variant leaves each of them in a third of the images.
    third = np.isin(part_of, (2, 3)) & (image_of % 3 == 2)
    features[third] = (10, 0)
    found = clustering.semantic_labels(features, areas, image_of, 30, 1.0, largest_kind_only=False, variants=variants)
    for part in range(4):
        numbers = set(found.labels[(part_of == part) & ~third].tolist())
        assert (numbers != {0}) == (part in parts)
    assert found.filtered_histogram.shape == (30, found.labels.max())
    np.testing.assert_allclose(found.filtered_histogram, clustering.label_histograms(found.labels, areas, image_of, 30))
    assert len(found.trusted) and (np.diff(found.trusted) > 0).all()


def test_parts_that_come_and_go_without_a_substitute_get_no_label():
    image_of = np.repeat(np.arange(10), 3)
    always, juices, now_and_then = np.full(10, 1), 2 + np.arange(10) % 3, np.where(np.arange(10) < 5, 5, 0)
    clusters = np.stack([always, juices, now_and_then], 1).ravel()
    kept = clustering.without_sporadic(clusters, image_of, 10)
    np.testing.assert_array_equal(kept, np.where(clusters == 5, 0, clusters))
    # Without the juices' substitute in every third image, they come and go, too.
    kept = clustering.without_sporadic(np.where(clusters == 4, 0, clusters), image_of, 10)
    np.testing.assert_array_equal(kept, clusters == 1)
    # Nothing by rule: better all labels than none.
    some = np.array([1, 2, 0, 0])
    np.testing.assert_array_equal(clustering.without_sporadic(some, np.array([0, 0, 2, 3]), 4), some)


def bolts(long_in=lambda image: True, images=30, apart=0.4, seed=0):
    """In each image a long and a short bolt, alike but for their length (feature 1); light varies (feature 0)."""
    rng = np.random.default_rng(seed)
    parts = [(image, length) for image in range(images) for length in (0, 1) if length == 0 or long_in(image)]
    image_of, is_long = np.array(parts).T
    features = np.stack([rng.normal(0, 0.3, len(parts)), apart * is_long + rng.normal(0, 0.03, len(parts))], 1)
    features[::20, 1] += rng.normal(0, 1, len(features[::20]))  # some are cut badly
    return features, image_of, is_long


def test_lookalikes_side_by_side_are_told_apart():
    features, image_of, is_long = bolts()
    together = np.zeros(len(features), np.int64)
    found = clustering.split_lookalikes(features, together, image_of, least=10)
    assert found.max() == 1
    assert max(np.mean(found == is_long), np.mean(found != is_long)) > 0.9
    areas = np.full(len(features), 0.1)
    for lookalikes, labels in ((False, 1), (True, 2)):
        assert clustering.semantic_labels(features, areas, image_of, 30, 2.0, False, True, lookalikes).labels.max() == labels


@pytest.mark.parametrize("changes", [{"apart": 0.08}, {"long_in": lambda image: image % 2}, {"long_in": lambda image: image < 5}])
def test_no_lookalikes_are_seen_where_there_are_none(changes):
    features, image_of, _ = bolts(**changes)
    assert not clustering.split_lookalikes(features, np.zeros(len(features), np.int64), image_of, least=10).any()


def test_usual_numbers():
    labels, image_of = np.array([1, 1, 2, 1, 1, 2, 1, 0]), np.array([0, 0, 0, 1, 1, 1, 2, 2])
    np.testing.assert_array_equal(clustering.usual_numbers(labels, image_of, np.array([0, 1, 2]), 4, 2), [2, 1])


def test_comparable_features():
    rng = np.random.default_rng(0)
    rod, disc = [[0.17, 0.35, 0, 0, 0, 0, 0]], [[0.8, 0, 0, 0, 0, 0, 0]]
    vectors = clustering.comparable({
        "lab": np.array([[40.0, 0, 0], [80, 16, 0]]), "area": np.array([[0.01], [0.01 * np.e ** 2]]),
        "shape_hu": np.concatenate([rod, disc]).astype(float)})
    np.testing.assert_allclose(vectors[1, :4] - vectors[0, :4], (1, 1, 0, 1))
    assert vectors[0, 5] > 1.8 and vectors[1, 5] == 0
    deep = clustering.comparable({"cnn_image": rng.random((30, 64), np.float32)})
    assert deep.shape == (30, 10)
    np.testing.assert_allclose((deep ** 2).sum(1).mean(), clustering.DEEP_SPREAD ** 2)
