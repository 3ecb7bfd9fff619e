"""The mask algebra against the published implementation's results, and what must hold for any masks."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pseudo_labels import masks as algebra

SIDE = 24


@st.composite
def rectangles(draw):
    """Up to six rectangles and a speckled one, (N, 24, 24) uint8."""
    drawn = []
    for _ in range(draw(st.integers(1, 6))):
        top, left = draw(st.integers(0, SIDE - 2)), draw(st.integers(0, SIDE - 2))
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[top:top + draw(st.integers(1, SIDE)), left:left + draw(st.integers(1, SIDE))] = 255
        drawn.append(mask)
    drawn.append(draw(arrays(np.uint8, (SIDE, SIDE), elements=st.sampled_from([0, 255]))))
    return np.array(drawn)


@pytest.fixture
def published(reference):
    return reference("mask_operations")


@pytest.mark.parametrize("result, operation", [
    ("intersect_ratio", lambda p: algebra.intersect_ratios(p["masks"], p["masks"])),
    ("split_components", lambda p: algebra.split_components(p["masks"])),
    ("filtered_small", lambda p: algebra.without_small(p["masks"])),
    ("filtered_by_combine", lambda p: algebra.combine(p["masks"])),
    ("background_removed", lambda p: algebra.without_background(p["masks"], p["background"])),
    ("inside_grounding", lambda p: algebra.inside_grounding(p["split_components"], p["grounding"])),
    ("merged", lambda p: algebra.merge(p["masks"])),
])
def test_matches_the_published_implementation(published, result, operation):
    np.testing.assert_array_equal(operation(published), published[result])


def test_boolean_masks_mean_the_same(published):
    inside = published["masks"] != 0
    np.testing.assert_array_equal(algebra.merge(inside), published["merged"])
    np.testing.assert_array_equal(algebra.split_components(inside), published["split_components"])
    np.testing.assert_array_equal(algebra.combine(inside), published["filtered_by_combine"] != 0)


@settings(deadline=None)
@given(rectangles())
def test_intersect_ratio_is_symmetric_and_one_with_itself(masks):
    ratios = algebra.intersect_ratios(masks, masks)
    np.testing.assert_array_equal(ratios, ratios.T)
    assert ((ratios >= 0) & (ratios <= 1)).all()
    np.testing.assert_array_equal(np.diag(ratios), algebra.areas(masks) > 0)
    assert algebra.intersect_ratio(masks[0], masks[-1]) == ratios[0, -1]


@settings(deadline=None)
@given(rectangles())
def test_components_are_disjoint_inside_their_mask_and_stay_as_they_are(masks):
    components = algebra.split_components(masks)
    for mask in masks:
        parts = algebra.split_components(mask[None])
        assert (np.sum(parts != 0, axis=0) <= (mask != 0)).all()
    assert (algebra.areas(components) > algebra.LEAST_COMPONENT).all()
    np.testing.assert_array_equal(algebra.split_components(components), components)


@settings(deadline=None)
@given(rectangles())
def test_combine_keeps_only_masks_that_add_something(masks):
    kept = algebra.combine(masks) != 0
    for index in range(1, len(kept)):
        union = kept[:index].any(0)
        shared = np.count_nonzero(kept[index] & union)
        # Accepted either for a small intersect ratio, or for a small covered share, which is never larger.
        assert shared / np.count_nonzero(kept[index]) < algebra.COVERED
    assert len(kept) == 0 or len(kept) >= 1 and kept[0].any()


@settings(deadline=None)
@given(rectangles())
def test_merge_covers_the_union_with_small_masks_on_top(masks):
    labels = algebra.merge(masks)
    large = algebra.without_small(masks) != 0
    np.testing.assert_array_equal(labels != 0, large.any(0))
    smallest = large[algebra.areas(large).argmin()] if len(large) else None
    if smallest is not None and (algebra.areas(large) == smallest.sum()).sum() == 1:
        assert (labels[smallest] == len(large)).all()
    for mask in algebra.label_masks(labels):
        assert len(np.unique(labels[mask])) == 1


def test_at_most_the_largest_masks_in_their_order():
    masks = np.zeros((4, 8, 8), np.uint8)
    for mask, pixels in zip(masks, (3, 9, 3, 20)):
        mask.flat[:pixels] = 255
    np.testing.assert_array_equal(algebra.areas(algebra.largest(masks, 3)), [3, 9, 20])
    np.testing.assert_array_equal(algebra.largest(masks, 3)[0], masks[0])


def test_no_masks_give_empty_results():
    none = np.zeros((0, 16, 16), np.uint8)
    for operation in (algebra.split_components, algebra.combine, algebra.without_small, algebra.largest):
        assert operation(none).shape == (0, 16, 16)
    assert not algebra.merge(none).any()
    assert algebra.label_masks(np.zeros((16, 16), np.uint8)).shape == (0, 16, 16)
    assert algebra.intersect_ratios(none, none).shape == (0, 0)


def test_more_than_255_labels_do_not_fit():
    with pytest.raises(ValueError, match="256 masks"):
        algebra.merge(np.ones((256, 8, 8), np.uint8))


def test_a_full_set_of_masks_takes_well_under_a_second():
    masks = (np.random.default_rng(0).random((255, 256, 256)) > 0.5).astype(np.uint8)
    start = time.process_time()
    algebra.intersect_ratios(masks, masks)
    algebra.merge(algebra.combine(masks))
    assert time.process_time() - start < 5  # 0.2 s on an idle machine
