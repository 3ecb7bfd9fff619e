"""The built-in data set: its layout, its truth, its reproducibility, and that no shortcut solves it."""

import json
import subprocess
import sys
from pathlib import Path

from csad.data import layouts
from csad.data.data_sets import Dataset
from csad.data.layouts import GOOD, LOGICAL, SPLITS, STRUCTURAL
from csad.errors import UserError
from csad.synthetic import CATEGORIES
from csad.synthetic.kit import render
from csad.synthetic.writer import Settings, anomaly_of, components_root, picture_rng, write_dataset

import cv2
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

REPOSITORY = Path(__file__).resolve().parents[1]
SMALL = Settings(image_size=64, train=2, validation=1, test_good=1, test_logical=2, test_structural=2)
MOST_REGIONS = 2


def read(path: Path) -> np.ndarray:
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


def bytes_below(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def small_set(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("synthetic") / "loco"
    assert write_dataset(root, CATEGORIES, SMALL) == 8 * len(CATEGORIES)
    return root


# ------------------------------------------------------------------------------------------------- files and truth


def test_layout_is_locos(small_set, monkeypatch):
    monkeypatch.setattr(layouts, "MIN_WITH_VALIDATION", 1)
    categories = Dataset(small_set).select(None)
    assert [category.name for category in categories] == sorted(CATEGORIES)
    for category in categories:
        assert [path.name for path in category.train] == ["000.png", "001.png"]
        assert len(category.validation) == 1
        assert [len(category.test(kind)) for kind in SPLITS] == [1, 2, 2]
        assert read(category.train[0]).shape == (64, 64, 3)


def test_masks_hold_the_configured_values(small_set):
    for name in CATEGORIES:
        config = {
            entry["pixel_value"]: entry
            for entry in json.loads((small_set / name / "defects_config.json").read_text())
        }
        assert len(config) == len(CATEGORIES[name].defects)
        anomalies = json.loads((components_root(small_set) / name / "classes.json").read_text())["anomalies"]
        assert not (small_set / name / "ground_truth" / GOOD).exists()
        for kind in (LOGICAL, STRUCTURAL):
            for path in sorted((small_set / name / "test" / kind).iterdir()):
                masks = sorted((small_set / name / "ground_truth" / kind / path.stem).iterdir())
                assert 1 <= len(masks) <= MOST_REGIONS and masks[0].name == "000.png"
                for mask in map(read, masks):
                    assert mask.shape == (64, 64) and mask.dtype == np.uint8
                    value = int(mask.max())
                    assert set(np.unique(mask)) == {0, value}
                    assert config[value]["defect_name"] == anomalies[kind][path.stem]


def test_label_maps_fit_their_pictures(small_set):
    for name, category in CATEGORIES.items():
        described = json.loads((components_root(small_set) / name / "classes.json").read_text())
        assert tuple(described["classes"]) == category.classes
        images = sorted(
            path.relative_to(small_set)
            for split in ("train", "validation", "test")
            for path in (small_set / name / split).rglob("*.png")
        )
        assert len(images) == 8
        for image in images:
            labels = read(components_root(small_set) / image)
            assert labels.shape == (64, 64) and labels.dtype == np.uint8
            assert 0 < labels.max() < len(category.classes)


@pytest.mark.parametrize("name", CATEGORIES)
def test_every_anomaly_is_marked_where_it_is(name):
    category = CATEGORIES[name]
    assert len(category.defects_of(LOGICAL)) >= 6 and len(category.defects_of(STRUCTURAL)) >= 4
    for index, defect in enumerate(category.defects):
        picture = render(category, 128, np.random.default_rng(index), defect.name)
        assert 1 <= len(picture.regions) <= MOST_REGIONS
        for marked, region in picture.regions:
            assert marked == defect.name
            assert region.sum() >= 10
    assert render(category, 128, np.random.default_rng(0)).regions == []


def test_every_class_appears_and_is_not_tiny():
    for category in CATEGORIES.values():
        pictures = [render(category, 128, np.random.default_rng(seed)) for seed in range(16)]
        for label in range(1, len(category.classes)):
            assert max((picture.labels == label).mean() for picture in pictures) >= 0.003, category.classes[
                label
            ]


# ------------------------------------------------------------------------------------------------ reproducibility


def test_same_seed_same_bytes_for_any_number_of_workers(small_set, tmp_path):
    write_dataset(tmp_path / "loco", ["pushpins", "screw_bag"], SMALL, workers=2)
    for name in ("pushpins", "screw_bag"):
        assert bytes_below(tmp_path / "loco" / name) == bytes_below(small_set / name)
        assert bytes_below(components_root(tmp_path / "loco") / name) == bytes_below(
            components_root(small_set) / name
        )


def test_another_seed_gives_another_picture():
    pictures = [
        render(CATEGORIES["pushpins"], 64, picture_rng(seed, "pushpins", "train", GOOD, 0)).image
        for seed in (0, 1)
    ]
    assert (pictures[0] != pictures[1]).any()


def test_an_interrupted_run_is_continued(tmp_path):
    root = tmp_path / "loco"
    write_dataset(root, ["pushpins"], SMALL)
    before = bytes_below(root)
    lost = [
        root / "pushpins" / "train" / "good" / "001.png",
        root / "pushpins" / "test" / LOGICAL / "000.png",
    ]
    for path in lost:
        path.unlink()
    assert write_dataset(root, ["pushpins"], SMALL) == len(lost)
    assert bytes_below(root) == before
    assert write_dataset(root, ["screw_bag"], SMALL) == 8
    assert json.loads((components_root(root) / "dataset.json").read_text())["categories"] == [
        "pushpins",
        "screw_bag",
    ]


def test_other_settings_need_overwrite(tmp_path):
    root = tmp_path / "loco"
    write_dataset(root, ["pushpins", "screw_bag"], SMALL)
    before = bytes_below(root)
    fewer = Settings(image_size=80, train=1, validation=0, test_good=0, test_logical=0, test_structural=0)
    with pytest.raises(UserError, match="other settings.*image_size 64 there, 80 asked for.*--overwrite"):
        write_dataset(root, ["pushpins"], fewer)
    assert bytes_below(root) == before
    assert write_dataset(root, ["pushpins"], fewer, overwrite=True) == 1
    assert sorted(path.name for path in root.iterdir()) == ["pushpins"]
    assert len(list(root.rglob("train/good/*.png"))) == 1 and not list(root.rglob("test/*"))


# ------------------------------------------------------------------------------------------------------- mistakes


def test_other_peoples_data_is_left_alone(tmp_path):
    precious = tmp_path / "loco" / "pushpins" / "train" / "good" / "000.png"
    precious.parent.mkdir(parents=True)
    precious.write_bytes(b"precious")
    with pytest.raises(UserError, match="was not made by this script"):
        write_dataset(tmp_path / "loco", ["pushpins"], SMALL, overwrite=True)
    assert precious.read_bytes() == b"precious"


@pytest.mark.parametrize("values", [{"image_size": 32}, {"train": -1}, {"seed": -1}])
def test_silly_settings_are_refused(values):
    with pytest.raises(UserError, match=f"--{next(iter(values))} is"):
        Settings(**values)


def test_a_mistake_on_the_command_line_gets_a_sentence(tmp_path):
    command = [
        sys.executable,
        "make_synthetic_loco.py",
        "--dataset_root",
        str(tmp_path / "loco"),
        "--categories",
        "cable",
    ]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "'cable'" in result.stderr and all(name in result.stderr for name in CATEGORIES)
    assert not (tmp_path / "loco").exists()


# ------------------------------------------------------------------------------------------------- no easy answers


def mahalanobis(train: np.ndarray, test: np.ndarray, shrinkage: float) -> np.ndarray:
    """Squared distances (N,) of rows of test (N, D) from train's mean, its covariance shrunk towards a sphere."""
    centered = train - train.mean(axis=0)
    covariance = centered.T @ centered / len(train)
    sphere = np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    offset = test - train.mean(axis=0)
    solved = np.linalg.solve(
        (1 - shrinkage) * covariance + shrinkage * sphere + 1e-12 * np.eye(len(covariance)), offset.T
    )
    return (offset * solved.T).sum(axis=1)


def pixel_gaussian_scores(train: np.ndarray, test: np.ndarray) -> dict[str, np.ndarray]:
    """Mean and maximum of |z| of every test image (N, S, S, 3) under a Gaussian per pixel and channel, at two sizes."""
    scores = {}
    for side in (64, 128):
        small_train, small_test = (
            np.stack(
                [cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA) for image in images]
            ).astype(np.float32)
            for images in (train, test)
        )
        z = abs(small_test - small_train.mean(axis=0)) / (small_train.std(axis=0) + 1e-3)
        scores[f"mean {side}"], scores[f"max {side}"] = z.mean(axis=(1, 2, 3)), z.max(axis=(1, 2, 3))
    return scores


def color_histogram_scores(train: np.ndarray, test: np.ndarray) -> dict[str, np.ndarray]:
    """Nearest neighbour (L1) and Mahalanobis distance of every test image's joint and per-channel colour histogram."""

    def joint(image: np.ndarray) -> np.ndarray:
        cells = (image // 32).reshape(-1, 3).astype(int) @ [64, 8, 1]
        return np.bincount(cells, minlength=512) / len(cells)

    def single(image: np.ndarray) -> np.ndarray:
        return (
            np.concatenate(
                [np.bincount(image[..., channel].ravel() // 8, minlength=32) for channel in range(3)]
            )
            / image[..., 0].size
        )

    scores = {}
    for name, histogram in (("joint", joint), ("single", single)):
        known, seen = (np.stack([histogram(image) for image in images]) for images in (train, test))
        scores[f"{name} nearest"] = np.array([abs(known - one).sum(axis=1).min() for one in seen])
        for shrinkage in (0.01, 0.1):
            scores[f"{name} mahalanobis {shrinkage}"] = mahalanobis(known, seen, shrinkage)
    return scores


def rendered_images(name: str, split: str, kind: str, count: int, size: int) -> np.ndarray:
    """Images (count, size, size, 3) uint8 as `write_dataset` would render them."""
    category = CATEGORIES[name]
    defects = [anomaly_of(category, kind, index) for index in range(count)]
    return np.stack(
        [
            render(
                category, size, picture_rng(0, name, split, kind, index), defect.name if defect else None
            ).image
            for index, defect in enumerate(defects)
        ]
    )


def test_neither_pixels_nor_colours_solve_it():
    """Both baselines, each with its best variant chosen in hindsight, stay below 75 % logical AUROC on average."""
    aurocs = {"pixel": [], "color": []}
    for name in CATEGORIES:
        train = rendered_images(name, "train", GOOD, 60, 128)
        test = np.concatenate(
            [rendered_images(name, "test", GOOD, 15, 128), rendered_images(name, "test", LOGICAL, 18, 128)]
        )
        truth = np.repeat([0, 1], [15, 18])
        for baseline, scores in (
            ("pixel", pixel_gaussian_scores(train, test)),
            ("color", color_histogram_scores(train, test)),
        ):
            aurocs[baseline].append(
                {variant: roc_auc_score(truth, score) for variant, score in scores.items()}
            )
    for baseline, found in aurocs.items():
        average = {variant: np.mean([category[variant] for category in found]) for variant in found[0]}
        assert max(average.values()) < 0.75, (baseline, average)
