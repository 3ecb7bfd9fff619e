"""The classical proposer on small drawings with shading, noise, glare, holes and a tray."""

from csad.standins.classical import ClassicalProposer, merge_alike

import cv2
import numpy as np
import pytest
from conftest import draw_parts

SIDE = 192


def noisy(image, seed=0, strength=4):
    image = image + np.random.default_rng(seed).normal(0, strength, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def backdrop(colour=(120, 125, 130)):
    return np.full((SIDE, SIDE, 3), colour, np.float64)


def disc(centre, radius):
    return cv2.circle(np.zeros((SIDE, SIDE), np.uint8), centre, radius, 1, -1) != 0


def best_iou(proposals, true):
    return max(
        (np.count_nonzero(mask & true) / np.count_nonzero(mask | true) for mask in proposals.masks), default=0
    )


def test_whole_parts_are_found_and_nothing_else():
    image, labels = draw_parts(np.random.default_rng(0), 4, SIDE)
    proposals = ClassicalProposer().propose(image)
    assert proposals.masks.shape == proposals.background.shape == (SIDE, SIDE)
    assert all(best_iou(proposals, labels == part) > 0.9 for part in range(1, 5))
    assert len(proposals.masks) == 4
    assert np.mean(proposals.background == (labels == 0)) > 0.97
    assert proposals.grounding is None and proposals.grounding_background is None


def test_shading_and_glare_do_not_break_a_part():
    image, part, glare = backdrop(), disc((96, 96), 50), disc((80, 80), 8)
    image[part] = (210, 60, 40)
    image *= np.linspace(0.9, 1.1, SIDE)[None, :, None]
    image[glare] = (225, 110, 90)
    proposals = ClassicalProposer().propose(noisy(image))
    assert best_iou(proposals, part) > 0.9 and len(proposals.masks) <= 2


def test_nested_parts_are_masks_of_their_own_and_fill_each_other():
    image = backdrop()
    bottle, label, icon = disc((96, 96), 70), disc((96, 96), 40), disc((96, 96), 15)
    for part, colour in ((bottle, (230, 140, 20)), (label, (240, 240, 235)), (icon, (170, 20, 40))):
        image[part] = colour
    proposals = ClassicalProposer().propose(noisy(image))
    assert all(best_iou(proposals, part) > 0.9 for part in (bottle, label, icon))


def test_background_shows_through_a_ring():
    image = backdrop()
    ring = disc((96, 96), 50) & ~disc((96, 96), 25)
    image[ring] = (200, 180, 40)
    proposals = ClassicalProposer().propose(noisy(image))
    assert best_iou(proposals, ring) > 0.85
    assert proposals.background[96, 96]


@pytest.mark.parametrize("container, found", [(True, False), (False, True)])
def test_a_container_is_background_on_request(container, found):
    image, part = backdrop((60, 62, 65)), disc((100, 90), 20)
    tray = np.zeros((SIDE, SIDE), bool)
    tray[20:-20, 20:-20] = True
    image[tray] = (190, 190, 195)
    image[part] = (230, 140, 20)
    proposals = ClassicalProposer(container).propose(noisy(image))
    assert (best_iou(proposals, tray) > 0.8) == found
    assert best_iou(proposals, part) > 0.85


def test_a_uniform_image_holds_no_parts():
    proposals = ClassicalProposer().propose(np.full((64, 64, 3), 90, np.uint8))
    assert len(proposals.masks) == 0 and proposals.background.all()


def test_the_same_image_gives_the_same_masks():
    image, _ = draw_parts(np.random.default_rng(3), 4, SIDE)
    np.testing.assert_array_equal(*(ClassicalProposer().propose(image).masks.bits for _ in range(2)))


def test_merging_stops_where_colours_differ():
    regions = np.repeat(np.arange(4), 100)[None].repeat(20, 0)
    lab = np.array([50.0, 55, 80, 84])[regions][..., None].repeat(3, -1).astype(np.float32)
    assert len(np.unique(merge_alike(regions, lab, 1))) == 4
    np.testing.assert_array_equal(
        np.unique(merge_alike(regions, lab, 15)[0], return_counts=True)[1], [200, 200]
    )
    assert len(np.unique(merge_alike(regions, lab, 100))) == 1
