"""What stage 1's clustering adds to the published method, on small made-up categories."""

from csad.pseudo_labels import beyond_clustering as beyond
from csad.pseudo_labels import clustering

import numpy as np
import pytest
from test_clustering import made_up, same_grouping, wide


def test_mean_shift_finds_the_same_groups_from_fewer_seeds():
    features, _, _, part_of = made_up()
    assert same_grouping(clustering.mean_shift(features, 1.0, max_seeds=40), part_of)


def test_an_estimated_bandwidth_keeps_parts_apart():
    features, part_of = wide(800, 100)
    found = clustering.mean_shift(features, beyond.estimate_bandwidth(features, 100))
    assert same_grouping(found, part_of)
    assert beyond.estimate_bandwidth(np.zeros((3, 2)), 2) > 0
    assert beyond.estimate_bandwidth(np.zeros((1, 2)), 5) > 0


def test_images_of_no_kind_join_the_nearest():
    histograms, kinds = (
        np.array([[0.1, 0], [0.12, 0], [0.5, 0], [0.17, 0], [0.4, 0]]),
        np.array([0, 0, 1, -1, -1]),
    )
    np.testing.assert_array_equal(beyond.with_nearest_group(histograms, kinds), [0, 0, 1, 0, 1])


@pytest.mark.parametrize("variants, parts", [(True, (0, 1, 2, 3)), (False, (0, 1))])
def test_variants_of_a_part_get_labels_only_on_request(variants, parts):
    features, areas, image_of, part_of = made_up(images=30)
    # A third variant leaves each of them in a third of the images.
    third = np.isin(part_of, (2, 3)) & (image_of % 3 == 2)
    features[third] = (10, 0)
    found = beyond.semantic_labels(
        features, areas, image_of, 30, 1.0, largest_group_only=False, variants=variants, lookalikes=False
    )
    for part in range(4):
        numbers = set(found.labels[(part_of == part) & ~third].tolist())
        assert (numbers != {0}) == (part in parts)
    assert found.filtered_histogram.shape == (30, found.labels.max())
    np.testing.assert_allclose(
        found.filtered_histogram, clustering.label_histograms(found.labels, areas, image_of, 30)
    )
    assert len(found.trusted) and (np.diff(found.trusted) > 0).all()


def test_parts_that_come_and_go_without_a_substitute_get_no_label():
    image_of = np.repeat(np.arange(10), 3)
    always, juices, now_and_then = np.full(10, 1), 2 + np.arange(10) % 3, np.where(np.arange(10) < 5, 5, 0)
    clusters = np.stack([always, juices, now_and_then], 1).ravel()
    kept = beyond.drop_irregular_clusters(clusters, image_of, 10)
    np.testing.assert_array_equal(kept, np.where(clusters == 5, 0, clusters))
    # Without the juices' substitute in every third image, they come and go, too.
    kept = beyond.drop_irregular_clusters(np.where(clusters == 4, 0, clusters), image_of, 10)
    np.testing.assert_array_equal(kept, clusters == 1)
    # Nothing by rule: better all labels than none.
    some = np.array([1, 2, 0, 0])
    np.testing.assert_array_equal(beyond.drop_irregular_clusters(some, np.array([0, 0, 2, 3]), 4), some)


def bolts(long_in=lambda image: True, images=30, apart=0.4, seed=0):
    """In each image a long and a short bolt, alike but for their length (feature 1); light varies (feature 0)."""
    rng = np.random.default_rng(seed)
    parts = [(image, length) for image in range(images) for length in (0, 1) if length == 0 or long_in(image)]
    image_of, is_long = np.array(parts).T
    features = np.stack(
        [rng.normal(0, 0.3, len(parts)), apart * is_long + rng.normal(0, 0.03, len(parts))], 1
    )
    features[::20, 1] += rng.normal(0, 1, len(features[::20]))  # some are cut badly
    return features, image_of, is_long


def test_lookalikes_side_by_side_are_told_apart():
    features, image_of, is_long = bolts()
    together = np.zeros(len(features), np.int64)
    found = beyond.split_similar_parts(features, together, image_of, min_members=10)
    assert found.max() == 1
    assert max(np.mean(found == is_long), np.mean(found != is_long)) > 0.9
    areas = np.full(len(features), 0.1)
    for lookalikes, labels in ((False, 1), (True, 2)):
        assert (
            beyond.semantic_labels(features, areas, image_of, 30, 2.0, False, True, lookalikes).labels.max()
            == labels
        )


@pytest.mark.parametrize(
    "changes", [{"apart": 0.08}, {"long_in": lambda image: image % 2}, {"long_in": lambda image: image < 5}]
)
def test_no_lookalikes_are_seen_where_there_are_none(changes):
    features, image_of, _ = bolts(**changes)
    assert not beyond.split_similar_parts(
        features, np.zeros(len(features), np.int64), image_of, min_members=10
    ).any()


def test_comparable_features():
    rng = np.random.default_rng(0)
    rod, disc = [[0.17, 0.35, 0, 0, 0, 0, 0]], [[0.8, 0, 0, 0, 0, 0, 0]]
    vectors = beyond.comparable(
        {
            "lab": np.array([[40.0, 0, 0], [80, 16, 0]]),
            "area": np.array([[0.01], [0.01 * np.e**2]]),
            "shape_hu": np.concatenate([rod, disc]).astype(float),
        }
    )
    np.testing.assert_allclose(vectors[1, :4] - vectors[0, :4], (1, 1, 0, 1))
    assert vectors[0, 5] > 1.8 and vectors[1, 5] == 0
    deep = beyond.comparable({"cnn_image": rng.random((30, 64), np.float32)})
    assert deep.shape == (30, 10)
    np.testing.assert_allclose((deep**2).sum(1).mean(), beyond.DEEP_SPREAD**2)


def test_of_each_kind_the_own_half_nearest_its_mean_is_trusted():
    histograms = np.array([[0.1], [0.2], [0.35], [0.9], [0.5], [0.7]])
    np.testing.assert_array_equal(
        beyond.trusted_members(histograms, np.array([0, 0, 0, 1, -1, 1])), [0, 1, 3]
    )


def test_a_label_has_to_be_large_enough_in_any_kind():
    histograms = np.array([[0.0, 0.2, 0.0005, 0.1], [0.0, 0.2, 0.0005, 0.1], [0.3, 0.1, 0.0005, 0.1]])
    np.testing.assert_array_equal(
        beyond.labels_of_any_group(histograms, np.array([0, 0, 1])), [0, 1, 2, 0, 3]
    )


def test_clusters_are_numbered_from_the_largest_on():
    np.testing.assert_array_equal(
        beyond.number_clusters(np.repeat([0, 1, 2], [4, 1, 7]), 2), np.repeat([2, 0, 1], [4, 1, 7])
    )
