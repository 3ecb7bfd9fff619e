"""The mask algebra against the published implementation's results, and what must hold for any masks."""

import tracemalloc

from csad.pseudo_labels import masks as algebra
from csad.pseudo_labels.masks import PackedMasks

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

SIDE = 24


def packed(masks):
    return PackedMasks.pack(masks, masks.shape[1:])


def unpacked(masks):
    """(N, H, W) bool."""
    return np.array(list(masks)).reshape(-1, *masks.shape)


@st.composite
def rectangles(draw):
    """Up to six rectangles and a speckled one, (N, 24, 24) uint8."""
    drawn = []
    for _ in range(draw(st.integers(1, 6))):
        top, left = draw(st.integers(0, SIDE - 2)), draw(st.integers(0, SIDE - 2))
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[top : top + draw(st.integers(1, SIDE)), left : left + draw(st.integers(1, SIDE))] = 255
        drawn.append(mask)
    drawn.append(draw(arrays(np.uint8, (SIDE, SIDE), elements=st.sampled_from([0, 255]))))
    return packed(np.array(drawn))


@pytest.fixture
def published(reference):
    return reference("mask_operations")


@pytest.mark.parametrize(
    "result, operation",
    [
        ("split_components", lambda p: algebra.split_components(packed(p["masks"]))),
        ("filtered_small", lambda p: algebra.without_small(packed(p["masks"]))),
        ("filtered_by_combine", lambda p: algebra.combine(packed(p["masks"]))),
        ("background_removed", lambda p: algebra.without_background(packed(p["masks"]), p["background"])),
        (
            "inside_grounding",
            lambda p: algebra.inside_grounding(packed(p["split_components"]), p["grounding"]),
        ),
    ],
)
def test_matches_the_published_implementation(published, result, operation):
    np.testing.assert_array_equal(unpacked(operation(published)), published[result] != 0)


def test_ratios_and_label_map_match_the_published_implementation(published):
    masks = packed(published["masks"])
    ratios = np.array([algebra.intersect_ratios(masks, mask) for mask in published["masks"]])
    np.testing.assert_array_equal(ratios, published["intersect_ratio"])
    np.testing.assert_array_equal(algebra.merge(masks), published["merged"])


def test_packed_masks_hold_what_was_packed():
    masks = np.random.default_rng(0).random((5, 7, 9)) > 0.5  # 63 pixels: no whole number of bytes
    held = packed(masks)
    np.testing.assert_array_equal(unpacked(held), masks)
    np.testing.assert_array_equal(unpacked(packed(masks * np.uint8(255))), masks)
    np.testing.assert_array_equal(unpacked(held[np.array([3, 1])]), masks[[3, 1]])
    np.testing.assert_array_equal(unpacked(held[np.array([True, False, False, True, False])]), masks[[0, 3]])
    np.testing.assert_array_equal(held.union(), masks.any(0))
    np.testing.assert_array_equal(algebra.areas(held), masks.sum((1, 2)))
    assert not packed(masks[:0]).union().any()


@settings(deadline=None)
@given(rectangles())
def test_intersect_ratio_is_symmetric_and_one_with_itself(masks):
    ratios = np.array([algebra.intersect_ratios(masks, mask) for mask in masks])
    np.testing.assert_array_equal(ratios, ratios.T)
    assert ((ratios >= 0) & (ratios <= 1)).all()
    np.testing.assert_array_equal(np.diag(ratios), algebra.areas(masks) > 0)


@settings(deadline=None)
@given(rectangles())
def test_components_are_disjoint_and_either_inside_their_mask_or_its_whole_outside(masks):
    assert (algebra.areas(algebra.split_components(masks)) > algebra.MIN_COMPONENT).all()
    for mask in masks:
        parts = unpacked(algebra.split_components(packed(mask[None])))
        assert (parts.sum(axis=0) <= 1).all()
        outside = [part for part in parts if not (part & mask).any()]
        assert len(outside) <= 1 and all((part == ~mask).all() for part in outside)
        assert all((part <= mask).all() for part in parts if (part & mask).any())


def test_the_outside_of_a_mask_is_one_component_where_its_box_is_small_enough():
    mask = np.ones((1, 40, 40), bool)
    mask[0, 5:15, 5:15] = mask[0, 25:30, 25:35] = False
    outside, inside = (
        unpacked(algebra.split_components(packed(mask)))[[0]],
        algebra.split_components(packed(~mask)),
    )
    np.testing.assert_array_equal(outside[0], ~mask[0])  # two pieces, one component
    assert len(algebra.split_components(packed(mask))) == 1  # the frame's own box is the whole picture
    assert len(inside) == 1  # of its two pieces one is of 50 pixels, and what lies outside fills the picture


@settings(deadline=None)
@given(rectangles())
def test_combine_keeps_only_masks_that_add_something(masks):
    kept = unpacked(algebra.combine(masks))
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
    large = algebra.without_small(masks)
    np.testing.assert_array_equal(labels != 0, large.union())
    smallest = unpacked(large)[algebra.areas(large).argmin()] if len(large) else None
    if smallest is not None and (algebra.areas(large) == smallest.sum()).sum() == 1:
        assert (labels[smallest] == len(large)).all()
    for mask in algebra.label_masks(labels):
        assert len(np.unique(labels[mask])) == 1


def test_at_most_the_largest_masks_in_their_order():
    masks = np.zeros((4, 8, 8), np.uint8)
    for mask, pixels in zip(masks, (3, 9, 3, 20)):
        mask.flat[:pixels] = 255
    masks = packed(masks)
    np.testing.assert_array_equal(algebra.areas(algebra.largest(masks, 3)), [3, 9, 20])
    np.testing.assert_array_equal(unpacked(algebra.largest(masks, 3))[0], unpacked(masks)[0])


def test_no_masks_give_empty_results():
    none = packed(np.zeros((0, 16, 16), np.uint8))
    for operation in (algebra.split_components, algebra.combine, algebra.without_small, algebra.largest):
        assert len(operation(none)) == 0 and operation(none).shape == (16, 16)
    assert not algebra.merge(none).any()
    assert len(algebra.label_masks(np.zeros((16, 16), np.uint8))) == 0
    assert algebra.intersect_ratios(none, np.ones((16, 16), bool)).shape == (0,)


def test_components_are_indices_with_over_a_thousandth_in_sight():
    labels = np.zeros((100, 100), np.uint8)
    labels[0, :10], labels[1, :11], labels[50:, :] = 7, 3, 255
    np.testing.assert_array_equal(algebra.components_in_sight(labels), [3, 255])
    np.testing.assert_array_equal(
        algebra.areas(algebra.label_masks(labels, algebra.components_in_sight(labels))), [11, 5000]
    )


def test_255_masks_of_a_native_picture_take_little_memory():
    size = (1280, 1600)

    def blobs(count):
        for number in range(count):
            mask = np.zeros(size, bool)
            row, column = divmod(number, 16)
            mask[row * 76 : row * 76 + 90, column * 96 : column * 96 + 110] = True
            yield mask

    tracemalloc.start()
    masks = algebra.without_background(
        algebra.split_components(PackedMasks.pack(blobs(255), size)), next(blobs(1))
    )
    algebra.merge(algebra.combine(algebra.largest(masks)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (
        len(masks) == 254 and peak < 400e6
    )  # bytes; unpacked they are 520e6, and everything was several times that
