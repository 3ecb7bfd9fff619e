"""Logical synthesis: what is pasted, where, and with which labels (docs/method.md section 2)."""

from csad.training import logical_synthesis as lsa

import cv2
import numpy as np
import pytest
from conftest import REFERENCE
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

SIDE = 128
COLOURS = np.array([[90, 90, 90], [200, 30, 30], [30, 30, 200], [30, 200, 30]], np.uint8)
NOWHERE = np.zeros((SIDE, SIDE), bool)
STAGE_1 = REFERENCE / "stage1"


@pytest.fixture
def picture():
    """A scene in plain colours, so that an image tells its labels: a square, a ring, and a crumb."""
    labels = np.zeros((SIDE, SIDE), np.uint8)
    labels[20:40, 20:50] = 1
    cv2.circle(labels, (90, 90), 16, 2, 5)
    labels[5:10, 100:105] = 3
    return COLOURS[labels], labels


def synthesise(picture, background=NOWHERE, seed=0, distance=0.2, instances=None):
    image, labels = picture
    instances = lsa.label_parts(labels) if instances is None else instances
    return lsa.synthesise(image, labels, instances, background, np.random.default_rng(seed), distance)


def centre(mask):
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    return np.array([x + (width - 1) / 2, y + (height - 1) / 2])


def new_centre(mask, placement):
    rows, columns = placement.window
    return placement.movement @ (*centre(mask), 1) + (columns.start, rows.start)


def test_parts_are_connected_and_no_crumbs(picture):
    _, labels = picture
    labels[60:75, 20:30] = 1
    parts = lsa.label_parts(labels)
    assert np.unique(parts).tolist() == [0, 1, 2, 3]
    assert [np.unique(labels[parts == part]).tolist() for part in (1, 2, 3)] == [[1], [1], [2]]
    assert centre(parts == 1).tolist() == [34.5, 29.5]
    assert not parts[5:10, 100:105].any()


def test_an_8_bit_map_may_have_more_parts_than_it_can_count():
    labels = np.kron(np.indices((20, 20)).sum(0) % 2, np.ones((8, 8))).astype(np.uint8)
    assert lsa.label_parts(labels).max() == 200


@pytest.mark.parametrize("unlabelled, wanted", [(0, True), (100, True), (101, False)])
def test_components_with_unlabelled_pixels_are_passed_over(unlabelled, wanted):
    labels, instances = np.zeros((2, 100, 100), np.uint8)
    instances[:50, :50] = 7  # of 2,500 pixels 10 % are more than 100
    labels[instances > 0] = 1
    labels.ravel()[np.flatnonzero(instances)[:unlabelled]] = 0
    assert lsa.labelled_instances(instances, labels).tolist() == [7] * wanted


@pytest.mark.parametrize("unlabelled, wanted", [(40, True), (41, False)])
def test_components_that_lie_a_tenth_outside_labels_are_passed_over(unlabelled, wanted):
    labels, instances = np.zeros((2, 100, 100), np.uint8)
    instances[30:50, 30:50] = 3
    labels[instances > 0] = 2
    labels.ravel()[np.flatnonzero(instances)[:unlabelled]] = 0
    assert lsa.labelled_instances(instances, labels).tolist() == [3] * wanted


def test_instances_are_pasted_not_labels(picture):
    """An instance is a part of a label here: the other half of the square never moves."""
    image, labels = picture
    instances = np.zeros((SIDE, SIDE), np.uint8)
    instances[20:40, 20:35] = 200
    for seed in range(20):
        synthesis = synthesise(picture, seed=seed, instances=instances)
        assert synthesis.pasted == 1  # there is no other one
        assert (synthesis.labels == 1).sum() - (labels == 1).sum() <= 15 * 20 + 20
        assert (synthesis.labels != labels).sum() > 100


def test_labels_move_with_their_pixels_and_no_label_is_invented(picture):
    image, labels = picture
    for seed in range(30):
        synthesis = synthesise(picture, seed=seed)
        assert synthesis.image.dtype == synthesis.labels.dtype == np.uint8
        assert set(np.unique(synthesis.labels)) <= set(np.unique(labels))
        distances = np.abs(synthesis.image[..., None, :].astype(int) - COLOURS).sum(-1)
        # The rims of pasted pixels are blended, everything else is in the colour of its label.
        assert (distances.argmin(-1) == synthesis.labels).mean() > 0.98
        assert (synthesis.labels > 0).sum() >= (labels > 0).sum() - 3000
        assert synthesis.pasted == 2 and (synthesis.labels != labels).any()


def test_arguments_are_left_alone(picture):
    image, labels = picture
    before = image.copy(), labels.copy()
    synthesise(picture)
    assert (image == before[0]).all() and (labels == before[1]).all()


def test_same_generator_same_result(picture):
    first, second = (synthesise(picture, seed=5) for _ in range(2))
    assert (first.image == second.image).all() and (first.labels == second.labels).all()


def test_components_go_far_from_where_they_were_and_stay_off_the_border(picture):
    mask = lsa.label_parts(picture[1]) == 1
    for seed in range(50):
        placement = lsa.find_placement(mask, NOWHERE, np.random.default_rng(seed), 0.4, 0.5)
        moved = new_centre(mask, placement)
        assert np.hypot(*(moved - centre(mask))) >= 0.4 * SIDE - 1e-6
        assert (moved >= 0.1 * SIDE - 1e-6).all() and (moved <= 0.9 * SIDE + 1e-6).all()
        rows, columns = placement.window
        whole = placement.movement + [[0, 0, columns.start], [0, 0, rows.start]]
        everywhere = cv2.warpAffine(mask.astype(np.uint8), whole, mask.shape[::-1], flags=cv2.INTER_NEAREST)
        assert everywhere.sum() == pytest.approx(placement.mask.sum(), abs=5)  # the window cuts nothing off
        assert everywhere[placement.window].sum() == everywhere.sum()


@pytest.mark.parametrize("limit", lsa.MAX_BACKGROUND)
def test_less_than_the_limit_lies_on_background(picture, limit):
    background = np.ones((SIDE, SIDE), bool)
    background[:, 100:] = False
    mask = lsa.label_parts(picture[1]) == 1
    shares = []
    for seed in range(40):
        placement = lsa.find_placement(mask, background, np.random.default_rng(seed), 0.2, limit)
        shares.append(background[placement.window][placement.mask].mean())
    assert max(shares) < limit and max(shares) > limit - 0.15


def test_a_component_is_tried_as_often_as_asked_for(picture):
    """Where one position in 50 or so would do, ten trials find it seldom, and 500 nearly always."""
    background = np.ones((SIDE, SIDE), bool)
    background[60:80, 60:80] = False
    mask = lsa.label_parts(picture[1]) == 1
    placed = {
        trials: sum(
            lsa.find_placement(mask, background, np.random.default_rng(seed), 0.2, 0.7, trials) is not None
            for seed in range(30)
        )
        for trials in (1, 10, 500)
    }
    assert placed[1] <= 3 and placed[1] < placed[10] < placed[500] and placed[500] >= 25


def test_without_room_nothing_is_pasted_and_that_is_said(picture):
    image, labels = picture
    everywhere = np.ones((SIDE, SIDE), bool)
    for seed in range(3):
        too_far = synthesise(picture, seed=seed, distance=1.0)
        for synthesis in (synthesise(picture, everywhere, seed), too_far):
            assert synthesis.pasted == 0
            assert (synthesis.image == image).all() and (synthesis.labels == labels).all()


def test_an_image_without_components_comes_back_as_it_is(picture):
    image, _ = picture
    synthesis = synthesise((image, np.zeros((SIDE, SIDE), np.uint8)))
    assert synthesis.pasted == 0 and (synthesis.image == image).all() and not synthesis.labels.any()


def to_side(picture):
    return np.array(Image.fromarray(picture).resize((256, 256), Image.Resampling.NEAREST))


def reference_pictures(category, targets):
    """Labels, instances and backgrounds (n, 256, 256) of trusted pictures, as published."""
    made, drawn = np.load(STAGE_1 / "stage1_targets.npz"), np.load(STAGE_1 / f"stage1_{category}.npz")
    trusted = made[f"{category}_trusted"]
    instances = np.stack([to_side(drawn["refined_masks"][index]) for index in trusted])
    if category == "screw_bag":
        assert (instances == made["screw_bag_synthesis_masks"]).all()
        backgrounds = made["screw_bag_synthesis_backgrounds"]
    else:
        native = np.load(STAGE_1 / "stage1_native.npz")
        width = native["images"].shape[2]
        masks = np.unpackbits(native["sam_background"][trusted], axis=-1, count=width) * 255
        stored = [cv2.imdecode(cv2.imencode(".jpg", mask)[1], cv2.IMREAD_GRAYSCALE) for mask in masks]
        backgrounds = np.stack([to_side(picture) for picture in stored])
    return made[f"{category}_{targets}"][trusted], instances, backgrounds > 0


@pytest.mark.parametrize(
    "run, category, targets, distance, changed_within",
    [
        ("screw_bag_01", "screw_bag", "plain", 0.1, 0.09),
        ("screw_bag_02", "screw_bag", "plain", 0.2, 0.09),
        ("pushpins_02", "pushpins", "plain", 0.2, 0.09),
        ("juice_bottle_02_filled", "juice_bottle", "filled", 0.2, 0.25),
    ],
)  # one of 15 components is half a picture
def test_the_statistics_are_the_published_ones(run, category, targets, distance, changed_within, monkeypatch):
    """But for changed labels, of which there are 4 to 8 % more: the published masks lose their rims when turned."""
    published = np.load(STAGE_1 / "logical_synthesis.npz")
    labels, instances, backgrounds = reference_pictures(category, targets)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)
    placements = []

    def watched(mask, background, *rest, original=lsa.find_placement):
        placement = original(mask, background, *rest)
        moved = np.hypot(*(new_centre(mask, placement) - centre(mask))) / 256
        placements.append((moved, background[placement.window][placement.mask].mean()))
        return placement

    monkeypatch.setattr(lsa, "find_placement", watched)
    changed = []
    for call in range(len(published[f"{run}_pastes"])):
        index = call % len(labels)
        synthesis = lsa.synthesise(noise, labels[index], instances[index], backgrounds[index], rng, distance)
        assert synthesis.pasted == 2
        changed.append((synthesis.labels != labels[index]).mean())
    moves, on_background = np.array(placements).T
    expected = published[f"{run}_paste_distance"]
    assert distance <= moves.min() < distance + 0.05
    assert moves.mean() == pytest.approx(expected.mean(), rel=0.04)
    for quantile in (0.1, 0.5, 0.9):
        assert np.quantile(moves, quantile) == pytest.approx(np.quantile(expected, quantile), rel=0.08)
    for turn, limit in enumerate(lsa.MAX_BACKGROUND, start=1):
        expected = published[f"{run}_paste_background_ratio"][published[f"{run}_paste_order"] == turn]
        ours = on_background[turn - 1 :: 2]
        assert ours.max() < limit and ours.mean() == pytest.approx(expected.mean(), abs=0.03)
    assert np.mean(changed) == pytest.approx(published[f"{run}_changed_labels"].mean(), rel=changed_within)


def test_without_room_fewer_are_pasted_than_published():
    """The published synthesis gives up after 500 trials and pastes all the same, six times in ten."""
    labels, instances, _ = reference_pictures("screw_bag", "plain")
    background = np.ones((256, 256), bool)
    background[118:138, 118:138] = False
    for call in range(4):
        synthesis = lsa.synthesise(
            COLOURS[labels[call] % 4],
            labels[call],
            instances[call],
            background,
            np.random.default_rng(call),
            0.2,
        )
        changed = synthesis.labels != labels[call]
        assert changed.sum() <= 2 * (instances[call] > 0).sum()
        if synthesis.pasted == 1:
            assert background[changed].mean() < 0.5
        assert synthesis.pasted <= 2 and changed.any() == (synthesis.pasted > 0)


@given(st.integers(0, 2**32 - 1))
@hypothesis_settings(max_examples=20, deadline=None)
def test_a_label_map_without_a_part_lacks_one_part_and_nothing_else(seed):
    rng = np.random.default_rng(seed)
    labels = np.zeros((128, 128), np.uint8)
    for label in range(1, rng.integers(1, 5)):
        y, x = rng.integers(0, 100, 2)
        labels[y : y + 20, x : x + 20] = label
    without = lsa.without_a_part(labels, rng)
    changed = without != labels
    assert (without[changed] == 0).all()
    before, after = lsa.label_parts(labels), lsa.label_parts(without)
    assert after.max() == before.max() - bool(before.any())
    assert len(np.unique(before[changed])) == bool(before.any())
