"""sPRO and pixel metrics against a slow, plain definition and cases worked out by hand; the ground-truth files."""

from __future__ import annotations

import json
import time

from csad.data import layouts
from csad.data.defects import read_saturations
from csad.errors import UserError
from csad.evaluation import metrics
from csad.evaluation.localisation import enlarge, measure, read_regions
from csad.evaluation.spro import FPR_LIMITS, Region, SproCurve, area_up_to, by_definition

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def region(rows, columns, shape, saturation=None) -> Region:
    mask = np.zeros(shape, bool)
    mask[rows, columns] = True
    return Region(mask, mask.sum() if saturation is None else saturation)


def sweep(*images):
    filled = SproCurve()
    for anomaly_map, regions in images:
        filled.add(np.asarray(anomaly_map, np.float32), regions)
    return filled.result()


def test_worked_out_by_hand():
    # Ten pixels, the first two a region saturated by one of them. Falling values: region, normal, region, 7 normal.
    row = np.array([[9, 6, 7, 5, 4, 3, 2, 1, 0.5, 0.25]])
    found = sweep((row, [region(0, slice(0, 2), (1, 10), saturation=1)]))
    assert found == by_definition([(row, [region(0, slice(0, 2), (1, 10), saturation=1)])])
    assert found.spro == {limit: pytest.approx(100) for limit in FPR_LIMITS}
    # Saturated by both: half before the first of 8 false positives, everything from an eighth on (the step up at x = 1/8).
    found = sweep((row, [region(0, slice(0, 2), (1, 10))]))
    assert found.spro[0.01] == found.spro[0.05] == found.spro[0.1] == pytest.approx(50)
    assert found.spro[1.0] == pytest.approx(100 * (1 / 8 * 0.5 + 7 / 8))
    assert found.spro[0.3] == pytest.approx(100 * (0.125 * 0.5 + 0.175) / 0.3)
    assert found.pixel_auroc == pytest.approx(100 * (1 - 1 / 16))  # one of 16 pairs in the wrong order
    assert found.pixel_f1_max == pytest.approx(100 * 2 * 2 / (2 + 1 + 2))


def test_a_ceiling_of_the_share_that_is_enough():
    # Three pixels, of which 1.5 are enough: the first gives 2/3, the second the rest, the third nothing.
    row = np.array([[9, 7, 5, 8, 6, 4]])
    found = sweep((row, [region(0, slice(0, 3), (1, 6), saturation=1.5)]))
    assert found.spro[1.0] == pytest.approx(100 * (2 / 3 * 1 / 3 + 2 / 3))


def test_regions_count_alike_whatever_their_size():
    large, small = np.zeros((4, 4)), np.zeros((4, 4))
    large[:2] = 1
    found = sweep((large, [region(slice(0, 2), slice(None), (4, 4))]), (small, [region(3, 3, (4, 4))]))
    # Nothing tells the small one from the ground: on the way from (0, 1/2) to (1, 1).
    assert found.spro[1.0] == pytest.approx(75)
    assert found.spro[0.1] == pytest.approx(100 * (0.5 + 0.05 / 2))


def test_constant_maps_are_chance_and_perfect_ones_perfect():
    truth = region(slice(0, 3), slice(0, 3), (8, 8))
    constant = sweep((np.zeros((8, 8)), [truth]), (np.zeros((8, 8)), []))
    assert constant.spro[1.0] == pytest.approx(50)
    assert constant.pixel_auroc == pytest.approx(50)
    perfect = sweep((truth.mask.astype(float), [truth]), (np.zeros((8, 8)), []))
    assert perfect.spro == {limit: pytest.approx(100) for limit in FPR_LIMITS}
    assert perfect.pixel_f1_max == pytest.approx(100)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), levels=st.sampled_from([3, 20, 100_000]))
def test_agrees_with_the_plain_definition(seed, levels):
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(rng.integers(1, 4)):
        # Values on a grid that float32's leading bits tell apart, ties among them; negative ones, too.
        anomaly_map = (rng.integers(0, min(levels, 2000), (9, 7)) - 500) / 256
        regions = []
        for _ in range(rng.integers(0, 3)):
            mask = rng.random((9, 7)) < rng.uniform(0.05, 0.6)
            if mask.any():
                regions.append(Region(mask, float(rng.uniform(0.3, 1) * mask.sum())))
        images.append((anomaly_map, regions))
    if not any(regions for _, regions in images):
        images.append((images[0][0], [region(slice(0, 2), slice(0, 2), (9, 7))]))
    found = sweep(*images)
    plain = by_definition(images)
    assert found.spro == pytest.approx(plain.spro, abs=1e-9)
    assert found.pixel_auroc == pytest.approx(plain.pixel_auroc, abs=1e-9)
    assert found.pixel_f1_max == pytest.approx(plain.pixel_f1_max, abs=1e-9)


def test_smooth_maps_lose_nothing_to_the_bins():
    rng = np.random.default_rng(0)
    small = rng.normal(0, 0.05, (2, 16, 16)) + np.array([0, 0.03])[:, None, None]
    images = [
        (enlarge(small[0], (48, 40)), []),
        (enlarge(small[1], (48, 40)), [region(slice(5, 15), slice(8, 30), (40, 48))]),
    ]
    found, plain = sweep(*images), by_definition(images)
    for limit in (0.01, 0.05, 1.0):
        assert found.spro[limit] == pytest.approx(plain.spro[limit], abs=0.02)


def test_nothing_to_measure_is_not_a_number():
    for found in (
        sweep((np.ones((3, 3)), [])),
        sweep((np.ones((3, 3)), [region(slice(None), slice(None), (3, 3))])),
    ):
        assert all(np.isnan(value) for value in found.spro.values())


def test_misfits_are_refused():
    with pytest.raises(ValueError, match="finite"):
        SproCurve().add(np.array([[1.0, np.nan]]))
    with pytest.raises(ValueError, match="mask"):
        SproCurve().add(np.zeros((3, 3)), [region(0, 0, (2, 2))])


def test_area_is_cut_inside_a_piece():
    assert area_up_to(np.array([0, 0, 1.0]), np.array([0, 0.5, 1.0]), 0.1) == pytest.approx(
        0.1 * (0.5 + 0.025)
    )


@pytest.fixture
def category(tmp_path):
    """One good and one anomalous image, 40x30, the latter with two regions of different defects."""
    root = tmp_path / "discs"
    masks = root / "ground_truth/logical_anomalies/000"
    masks.mkdir(parents=True)
    for kind in (layouts.GOOD, layouts.LOGICAL):
        (root / "test" / kind).mkdir(parents=True)
        cv2.imwrite(str(root / "test" / kind / "000.png"), np.zeros((30, 40, 3), np.uint8))
    for name, value, rows in (("000.png", 255, slice(0, 10)), ("001.png", 254, slice(20, 30))):
        mask = np.zeros((30, 40), np.uint8)
        mask[rows, :10] = value
        cv2.imwrite(str(masks / name), mask)
    write_config(root, [(255, 50, False), (254, 0.5, True)])
    return layouts.Category(root)


def write_config(root, entries) -> None:
    keys = ("pixel_value", "saturation_threshold", "relative_saturation")
    (root / "defects_config.json").write_text(json.dumps([dict(zip(keys, entry)) for entry in entries]))


def test_saturation_is_pixels_or_a_share_and_never_more_than_the_region(category):
    def areas():
        path = category.test(layouts.LOGICAL)[0]
        return [
            found.saturation
            for found in read_regions(category, layouts.LOGICAL, path, read_saturations(category), (40, 30))
        ]

    assert areas() == [50, 50]
    write_config(category.root, [(255, 1000, False), (254, 0.25, True)])
    assert areas() == [100, 25]


def test_measured_from_files(category):
    maps = {layouts.GOOD: np.zeros((1, 3, 4), np.float32), layouts.LOGICAL: np.zeros((1, 3, 4), np.float32)}
    maps[layouts.LOGICAL][0, 0, 0] = maps[layouts.LOGICAL][0, 2, 0] = 1
    found = measure(category, maps, layouts.LOGICAL)
    assert found.spro[0.05] == pytest.approx(100, abs=1)
    assert found.pixel_auroc > 95
    maps[layouts.LOGICAL] = 1 - maps[layouts.LOGICAL]
    assert measure(category, maps, layouts.LOGICAL).spro[0.05] < 20


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda root: (root / "defects_config.json").unlink(), "defects_config.json is missing"),
        (lambda root: (root / "defects_config.json").write_text("{}"), None),
        (
            lambda root: (root / "defects_config.json").write_text('[{"pixel_value": 255}]'),
            "should be a list",
        ),
        (lambda root: write_config(root, [(255, 0, False), (254, 1, True)]), "more than 0"),
        (lambda root: write_config(root, [(255, 1, True)]), "254"),
        (
            lambda root: [path.unlink() for path in root.glob("ground_truth/*/*/*.png")],
            "no ground-truth mask",
        ),
        (
            lambda root: cv2.imwrite(
                str(root / "ground_truth/logical_anomalies/000/000.png"), np.zeros((30, 40), np.uint8)
            ),
            "empty",
        ),
        (
            lambda root: cv2.imwrite(
                str(root / "ground_truth/logical_anomalies/000/000.png"), np.ones((3, 4), np.uint8)
            ),
            "4x3",
        ),
    ],
)
def test_ground_truth_that_does_not_fit_gets_a_sentence(category, spoil, said):
    spoil(category.root)
    maps = {kind: np.zeros((1, 3, 4), np.float32) for kind in (layouts.GOOD, layouts.LOGICAL)}
    with pytest.raises(UserError, match=said):
        measure(category, maps, layouts.LOGICAL)


def test_maps_of_other_images_are_refused(category):
    maps = {kind: np.zeros((2, 3, 4), np.float32) for kind in (layouts.GOOD, layouts.LOGICAL)}
    with pytest.raises(UserError, match="2 anomaly maps"):
        measure(category, maps, layouts.LOGICAL)


def test_one_image_of_a_megapixel_takes_a_fraction_of_a_second():
    """300 of them should take less than two minutes."""
    anomaly_map = enlarge(np.random.default_rng(0).normal(size=(64, 64)), (1024, 1024))
    truth = region(slice(100, 400), slice(100, 400), (1024, 1024))
    filled = SproCurve()
    start = time.process_time()  # other programs are none of its business
    for _ in range(3):
        filled.add(anomaly_map, [truth])
    assert (time.process_time() - start) / 3 < 0.4


def test_image_metrics_by_hand():
    good, anomalous = np.array([0.1, 0.2, 0.6]), np.array([0.5, 0.9])
    assert metrics.auroc(good, anomalous) == pytest.approx(100 * 5 / 6)
    assert metrics.average_precision(good, anomalous) == pytest.approx(100 * (0.5 * 1 + 0.5 * 2 / 3))
    assert metrics.f1_max(good, anomalous) == pytest.approx(100 * 2 * 2 / (2 + 3))
    for metric in (metrics.auroc, metrics.average_precision, metrics.f1_max):
        assert np.isnan(metric(good, np.zeros(0)))
        assert np.isnan(metric(np.zeros(0), anomalous))


def test_pixel_values_that_stand_there_twice(category):
    write_config(category.root, [(255, 50, False), (254, 1, True), (255, 51, False)])
    with pytest.raises(UserError, match="pixel_value 255 occurs twice"):
        read_saturations(category)
    write_config(category.root, [(255, 50, False), (254, 1, True), (255, 50, False)])
    assert read_saturations(category) == {255: (50.0, False), 254: (1.0, True)}


def test_lossy_masks_are_measured_by_what_was_drawn_and_named_once(category, capsys):
    """JPEG instead of PNG: the same regions; of several pixel_values none can be told."""
    maps = {
        kind: np.random.default_rng(0).random((1, 30, 40)).astype(np.float32)
        for kind in (layouts.GOOD, layouts.LOGICAL)
    }
    folder = category.root / "ground_truth/logical_anomalies/000"
    (folder / "001.png").unlink()
    expected = measure(category, maps, layouts.LOGICAL)
    assert "lossy" not in capsys.readouterr().err
    mask = cv2.imread(str(folder / "000.png"), cv2.IMREAD_GRAYSCALE)
    (folder / "000.png").unlink()
    cv2.imwrite(str(folder / "000.jpg"), mask, [cv2.IMWRITE_JPEG_QUALITY, 80])
    with pytest.raises(UserError, match=r"000.jpg is stored in a lossy format.*several pixel_values"):
        measure(layouts.Category(category.root), maps, layouts.LOGICAL)
    write_config(category.root, [(255, 50, False)])
    for _ in range(2):
        assert measure(layouts.Category(category.root), maps, layouts.LOGICAL) == expected
    assert capsys.readouterr().err.count("lossy format") == 1
