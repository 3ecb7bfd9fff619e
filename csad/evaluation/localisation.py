"""How well anomaly maps localise what the ground truth marks, measured at the images' own resolution."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from csad.data import files, image_files, layouts
from csad.data.defects import read_region_mask, read_saturations
from csad.data.listing import count
from csad.errors import UserError
from csad.evaluation.spro import Localisation, Region, SproCurve
from csad.progress import ProgressBar

import cv2
import numpy as np

from models.constants import MAP_SIZE
from models.fusion import fused_map

_said_lossy: set[Path] = set()  # categories whose lossy masks were named


def read_maps(path: Path) -> dict[str, np.ndarray]:
    """A branch's anomaly maps, (N, 64, 64) of every split and of the validation images ("val"), scaled
    (models.prediction); UserError if the file is damaged, or holds something else."""
    maps = files.read_arrays(path)
    for split, values in maps.items():
        if values.ndim != 3 or values.shape[1:] != (MAP_SIZE, MAP_SIZE) or values.dtype.kind != "f":
            raise UserError(
                f"{path} should hold maps of {MAP_SIZE}x{MAP_SIZE} numbers, found {split} {values.shape}; "
                f"{files.MAKE_AGAIN}"
            )
    return maps


def fused_maps(
    category: layouts.Category,
    maps: Mapping[str, Mapping[str, np.ndarray]],
    contributions: Mapping[str, Mapping[str, np.ndarray]],
    rule: str,
    splits: Iterable[str],
) -> dict[str, np.ndarray]:
    """The fused maps (N, h, w) of each split's test images, as in the exported model (`models.fusion.fused_map`).

    Args:
        maps: by branch, then by split, (N, h, w).
        contributions: to the scores, by branch, then by split, (N,).

    Raises:
        UserError: maps and images differ in number.
    """
    fused = {}
    for split in splits:
        for of_branch in maps.values():
            _require_maps(category, split, of_branch)
        stacked = np.stack([of_branch[split] for of_branch in maps.values()], 1)
        fused[split] = fused_map(
            stacked, np.stack([contributions[branch][split] for branch in maps], 1), rule
        )
    return fused


def _require_maps(category: layouts.Category, split: str, maps: Mapping[str, np.ndarray]) -> None:
    images, drawn = len(category.test(split)), len(maps.get(split, ()))
    if drawn != images:
        raise UserError(
            f"{category.name}: there are {count(drawn, 'anomaly map')} of {split} test images, "
            f"but {count(images, 'image')}; run the stages that drew them with --overwrite"
        )


def measure(
    category: layouts.Category, maps: dict[str, np.ndarray], split: str, roi: np.ndarray | None = None
) -> Localisation:
    """Localisation of one split's anomalies, over the good test images and its own, but for `without_masks`.

    Args:
        maps: by split the anomaly maps (N, h, w) of the category's test images, in sorted file order; enlarged here.
        split: `layouts.LOGICAL` or `layouts.STRUCTURAL`.
        roi: (s, s) bool, the region of interest.

    Raises:
        UserError: maps and images differ in number, or the ground truth is missing or does not fit.
    """
    curve = SproCurve()
    saturations, left_out = read_saturations(category), without_masks(category, split)
    for measured in (layouts.GOOD, split):
        _require_maps(category, measured, maps)
        for path, small in zip(category.test(measured), maps[measured]):
            if _test_folder(category, path) in left_out:
                continue
            size = image_files.displayed_size(path)
            is_good = measured == layouts.GOOD
            regions = [] if is_good else read_regions(category, split, path, saturations, size)
            inspected = None if roi is None else enlarge(roi.astype(np.float32), size) >= 0.5
            curve.add(enlarge(small, size), regions, inspected)
    return curve.result()


def without_masks(category: layouts.Category, split: str) -> set[str]:
    """In layouts with a folder for each defect, the defects of a split that have no masks at all, while others have."""
    masks: Counter[str] = Counter()
    for path in category.test(split):
        masks[_test_folder(category, path)] += len(category.region_masks(split, path))
    return {defect for defect, count in masks.items() if not count} if masks.total() else set()


def _test_folder(category: layouts.Category, image: Path) -> str:
    return image.relative_to(category.root / "test").parts[0]


def enlarge(small: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w) -> (H, W) float32, bilinear with align_corners False; ``size`` is (W, H)."""
    return cv2.resize(small.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)


def read_regions(
    category: layouts.Category,
    split: str,
    image: Path,
    saturations: dict[int, tuple[float, bool]] | None,
    size: tuple[int, int],
) -> list[Region]:
    """The annotated regions of one test image; ``size`` is the image's (W, H).

    Without saturations, one mask holds all regions: its connected parts, each of which has to be found whole.

    Raises:
        UserError: there is no mask, a mask is empty, of another size, or names no defect of defects_config.json;
            or its format is lossy and several defects are defined.
    """
    paths = category.region_masks(split, image)
    if not paths:
        raise UserError(f"{category.name}: {image.relative_to(category.root)} has no ground-truth mask")
    regions = []
    for path in paths:
        values, value = read_region_mask(category, path, size, saturations)
        if image_files.is_lossy(path):
            _say_lossy(category, path)
        if saturations is None:
            count, parts = cv2.connectedComponents((values > 0).astype(np.uint8))
            regions += [Region(parts == part, float((parts == part).sum())) for part in range(1, count)]
            continue
        mask = values > 0
        threshold, relative = saturations[value]
        area = int(mask.sum())
        regions.append(Region(mask, min(threshold * area if relative else threshold, area)))
    return regions


def _say_lossy(category: layouts.Category, mask: Path) -> None:
    if category.root not in _said_lossy:
        _said_lossy.add(category.root)
        ProgressBar.write(
            f"{category.name}: masks in a lossy format ({mask} is the first): what is brighter than half "
            "of the brightest pixel counts as defect; masks stored as PNG are exact",
            file=sys.stderr,
        )
