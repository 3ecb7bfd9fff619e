"""Synthetic defects: each kind changes a picture where it says, the more the stronger."""

from csad.training.synthetic_defects import LOGICAL, STRUCTURAL, synthesise_defect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

KINDS = [*STRUCTURAL, *LOGICAL]


def picture(side=256):
    """A noisy table with two discs of other textures, and their label map (64, 64)."""
    rng = np.random.default_rng(1)
    image, labels = rng.normal(120, 6, (side, side, 3)), np.zeros((64, 64), np.uint8)
    y, x = np.mgrid[:64, :64]
    for label, (row, column, colour) in enumerate([(20, 16, (200, 60, 40)), (44, 46, (40, 80, 200))], 1):
        labels[(y - row) ** 2 + (x - column) ** 2 < 60] = label
        inside = np.kron(labels == label, np.ones((side // 64,) * 2)) > 0
        image[inside] = colour + rng.normal(0, 20, (int(inside.sum()), 1))
    return np.clip(image, 0, 255).astype(np.uint8), labels


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS), strength=st.floats(0, 1), seed=st.integers(0, 10_000), labelled=st.booleans()
)
def test_a_defect_is_small_and_the_same_for_the_same_seed(kind, strength, seed, labelled):
    image, labels = picture(128)
    labels = labels if labelled else np.zeros_like(labels)
    before = image.copy()
    made = synthesise_defect(image, labels, kind, strength, np.random.default_rng(seed))
    assert made.shape == image.shape and made.dtype == np.uint8 and np.array_equal(image, before)
    assert np.array_equal(made, synthesise_defect(image, labels, kind, strength, np.random.default_rng(seed)))
    assert (made != image).any(2).mean() < 0.35


@pytest.mark.parametrize("kind", KINDS)
def test_stronger_ones_change_more(kind):
    image, labels = picture()

    def changed(strength, seed):
        made = synthesise_defect(image, labels, kind, strength, np.random.default_rng(seed))
        return np.abs(made.astype(int) - image).sum()

    change = [np.mean([changed(strength, seed) for seed in range(12)]) for strength in (0.0, 0.4, 1.0)]
    assert 0 < change[0] < change[1]
    assert (
        change[1] < change[2] or kind == "turned"
    )  # half a turn of a disc changes no more than a quarter of one


def test_logical_ones_concern_whole_parts():
    image, labels = picture()

    def coloured(picture):  # pixels of the red disc, and of the blue one
        red, blue = picture[..., 0].astype(int), picture[..., 2].astype(int)
        return np.array([(red - blue > 60).sum(), (blue - red > 60).sum()])

    for seed in range(6):
        areas = {
            kind: coloured(synthesise_defect(image, labels, kind, 1.0, np.random.default_rng(seed)))
            / coloured(image)
            for kind in LOGICAL
        }
        assert areas["removed"].min() < 0.2 and areas["removed"].max() > 0.9  # one of the two
        assert 1.4 < areas["doubled"].max() < 2.2
        assert areas["turned"].min() > 0.8  # about its own centre a disc stays where it is
