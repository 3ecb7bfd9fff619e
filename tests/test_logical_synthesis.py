"""Logical synthesis: what is pasted, where, and with which labels (docs/METHOD.md section 2)."""

import cv2
import numpy as np
import pytest

from training import logical_synthesis as lsa

SIDE = 128
COLOURS = np.array([[90, 90, 90], [200, 30, 30], [30, 30, 200], [30, 200, 30]], np.uint8)


@pytest.fixture
def picture():
    """A scene in plain colours, so that an image tells its labels: a square, a ring, and a crumb."""
    labels = np.zeros((SIDE, SIDE), np.uint8)
    labels[20:40, 20:50] = 1
    cv2.circle(labels, (90, 90), 16, 2, 5)
    labels[5:10, 100:105] = 3
    return COLOURS[labels], labels


NOWHERE = np.zeros((SIDE, SIDE), bool)


def test_components_are_connected_parts_without_crumbs(picture):
    _, labels = picture
    labels[60:75, 20:30] = 1
    found = lsa.find_components(labels, fill_holes=False)
    assert [np.unique(component.labels[component.mask]).tolist() for component in found] == [[1], [1], [2]]
    assert found[0].centre == (34.5, 29.5)


def test_holes_are_filled_on_request_and_other_components_in_them_keep_their_labels(picture):
    _, labels = picture
    labels[88:93, 88:93] = 3
    ring = lsa.find_components(labels, fill_holes=False)[-1]
    assert not ring.mask[90, 90]
    filled = lsa.find_components(labels, fill_holes=True)[-1]
    assert filled.mask[90, 90] and filled.labels[90, 90] == 3
    assert filled.labels[82, 90] == 2 and labels[82, 90] == 0
    assert (filled.labels[filled.mask] > 0).all()


def test_labels_move_with_their_pixels_and_no_label_is_invented(picture):
    image, labels = picture
    changed = 0
    for seed in range(30):
        new_image, new_labels = lsa.synthesise(image, labels, NOWHERE, np.random.default_rng(seed), 0.2, False)
        assert new_image.dtype == new_labels.dtype == np.uint8
        assert set(np.unique(new_labels)) <= set(np.unique(labels))
        distances = np.abs(new_image[..., None, :].astype(int) - COLOURS).sum(-1)
        # The rims of pasted pixels are blended, everything else is in the colour of its label.
        assert (distances.argmin(-1) == new_labels).mean() > 0.98
        assert (new_labels > 0).sum() >= (labels > 0).sum() - 3000
        changed += (new_labels != labels).any()
    assert changed >= 25


def test_arguments_are_left_alone(picture):
    image, labels = picture
    before = image.copy(), labels.copy()
    lsa.synthesise(image, labels, NOWHERE, np.random.default_rng(1), 0.2, True)
    assert (image == before[0]).all() and (labels == before[1]).all()


def test_same_generator_same_result(picture):
    first, second = (lsa.synthesise(*picture, NOWHERE, np.random.default_rng(5), 0.2, False) for _ in range(2))
    assert (first[0] == second[0]).all() and (first[1] == second[1]).all()


def test_places_are_far_from_the_original_and_from_the_border(picture):
    component = lsa.find_components(picture[1], fill_holes=False)[0]
    for seed in range(50):
        movement = lsa.find_place(component, NOWHERE, np.random.default_rng(seed), distance=0.4)
        assert movement is not None
        centre = movement @ (*component.centre, 1)
        assert np.hypot(*(centre - component.centre)) >= 0.4 * SIDE - 1e-6
        assert (centre >= 0.1 * SIDE - 1e-6).all() and (centre <= 0.9 * SIDE + 1e-6).all()


def test_nothing_is_placed_mostly_on_background(picture):
    image, labels = picture
    background = np.ones((SIDE, SIDE), bool)
    background[:, 70:] = False
    component = lsa.find_components(labels, fill_holes=False)[0]
    places = [lsa.find_place(component, background, np.random.default_rng(seed), 0.2) for seed in range(40)]
    for movement in places:
        if movement is not None:
            mask = lsa.warp(component.mask.astype(np.uint8), movement, cv2.INTER_NEAREST) > 0
            assert background[mask].mean() <= 0.5
    assert any(movement is not None for movement in places)


def test_a_failed_placement_is_skipped(picture):
    image, labels = picture
    everywhere = np.ones((SIDE, SIDE), bool)
    for seed in range(5):
        new_image, new_labels = lsa.synthesise(image, labels, everywhere, np.random.default_rng(seed), 0.2, False)
        assert (new_image == image).all() and (new_labels == labels).all()
        too_far = lsa.synthesise(image, labels, NOWHERE, np.random.default_rng(seed), 1.0, False)
        assert (too_far[1] == labels).all()


def test_an_image_without_components_comes_back_as_it_is(picture):
    image, _ = picture
    empty = np.zeros((SIDE, SIDE), np.uint8)
    new_image, new_labels = lsa.synthesise(image, empty, NOWHERE, np.random.default_rng(0), 0.2, True)
    assert (new_image == image).all() and not new_labels.any()
