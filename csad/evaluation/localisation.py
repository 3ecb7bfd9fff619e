"""How well anomaly maps say where: saturated per-region overlap and pixel metrics (docs/method.md section 5).

Bergmann et al., "Beyond Dents and Scratches", IJCV 2022. Everything is measured at the images' own resolution. Thresholds
are swept without sorting the pixels of all images: every map is counted into one histogram of values, so memory does not
grow with the number of images, and each region adds its pixels' shares to a second one. `by_definition` says the same
without speed.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from csad.data import defects, files, image_files, images, layouts
from csad.errors import UserError
from csad.progress import ProgressBar

import cv2
import numpy as np
from sklearn.metrics import auc

from models.constants import MAP_SIZE

FPR_LIMITS = (0.01, 0.05, 0.1, 0.3, 1.0)
_DROPPED_BITS = (
    11  # of float32's 32: values that agree in sign, exponent and 12 bits of mantissa are one threshold
)
_BINS = 1 << (32 - _DROPPED_BITS)

_said_lossy: set[Path] = set()  # categories whose lossy masks were named


class Region(NamedTuple):
    """One annotated region of a defect."""

    mask: np.ndarray  # (H, W) bool, at least one pixel
    saturation: float  # pixels that are enough, in (0, mask.sum()]


class Localisation(NamedTuple):
    """In percent; sPRO is the area under the curve up to each of `FPR_LIMITS`, divided by that limit."""

    spro: dict[float, float]
    pixel_auroc: float
    pixel_f1_max: float


class Sweep:
    """The curves over all thresholds, filled image by image.

    A pixel is marked where its value is at or over the threshold.
    """

    def __init__(self) -> None:
        self._normal = np.zeros(_BINS, np.int64)  # pixels outside every region
        self._anomalous = np.zeros(_BINS, np.int64)  # pixels inside a region
        self._overlap = np.zeros(_BINS)  # saturated share, summed over regions
        self._regions = 0

    def add(
        self, anomaly_map: np.ndarray, regions: Iterable[Region] = (), inspected: np.ndarray | None = None
    ) -> None:
        """Count one image.

        Args:
            anomaly_map: (H, W) float, finite, higher = more anomalous.
            regions: its annotated regions, masks (H, W); none for a good image.
            inspected: (H, W) bool, the region of interest: other pixels do not count, nor regions that have none in it.

        Raises:
            ValueError: a value is not finite, or a mask has another shape.
        """
        if not np.isfinite(anomaly_map).all():
            raise ValueError("an anomaly map holds values that are not finite")
        bins = _bins(anomaly_map)
        inside = np.zeros(anomaly_map.shape, bool)
        for mask, saturation in regions:
            if mask.shape != anomaly_map.shape:
                raise ValueError(f"a region's mask is {mask.shape}, the anomaly map {anomaly_map.shape}")
            if inspected is not None:
                mask = mask & inspected
                if not mask.any():
                    continue
                saturation = min(saturation, int(np.count_nonzero(mask)))
            inside |= mask
            # The region's j-th highest pixel adds 1/s to its overlap until s pixels are marked.
            highest = np.sort(bins[mask])[::-1][: int(np.ceil(saturation))]
            shares = np.full(len(highest), 1 / saturation)
            shares[-1] = 1 - (len(highest) - 1) / saturation
            np.add.at(self._overlap, highest, shares)
            self._regions += 1
        # Added in place: bincount would make a whole histogram, of millions of bins, for every small image.
        np.add.at(self._normal, bins[~inside if inspected is None else ~inside & inspected], 1)
        np.add.at(self._anomalous, bins[inside], 1)

    def result(self) -> Localisation:
        """The areas under the curves; NaN where there is no region, or no pixel outside one."""
        used = np.flatnonzero(self._normal + self._anomalous)[::-1]  # thresholds, falling
        normal, anomalous = (np.r_[0, np.cumsum(counts[used])] for counts in (self._normal, self._anomalous))
        overlap = np.r_[0, np.cumsum(self._overlap[used])]
        if not self._regions or not normal[-1]:
            return Localisation({limit: float("nan") for limit in FPR_LIMITS}, float("nan"), float("nan"))
        false_positives = normal / normal[-1]
        f1 = 2 * anomalous[1:] / (anomalous[1:] + normal[1:] + anomalous[-1])
        return Localisation(
            {
                limit: 100 * area_up_to(false_positives, overlap / self._regions, limit) / limit
                for limit in FPR_LIMITS
            },
            100 * area_up_to(false_positives, anomalous / anomalous[-1], 1.0),
            100 * float(f1.max()),
        )


def by_definition(measured: Sequence[tuple[np.ndarray, Sequence[Region]]]) -> Localisation:
    """What `Sweep` measures, as the paper defines it: one threshold after another, one region after another.

    Every value is a threshold here; `Sweep` counts values that agree in 12 bits of their mantissa as one.

    Args:
        measured: of each image its anomaly map (H, W) and its regions; at least one region, and one pixel outside all.
    """
    thresholds = np.unique(np.concatenate([anomaly_map.ravel() for anomaly_map, _ in measured]))[::-1]
    false_positive_rates, mean_overlaps, true_positive_rates, f1 = [0.0], [0.0], [0.0], []
    for threshold in thresholds:
        overlaps, false_positives, normal, true_positives, anomalous = [], 0, 0, 0, 0
        for anomaly_map, regions in measured:
            marked = anomaly_map >= threshold
            inside = np.zeros(marked.shape, bool)
            for mask, saturation in regions:
                overlaps.append(min(np.count_nonzero(mask & marked) / saturation, 1.0))
                inside |= mask
            false_positives += int(np.count_nonzero(marked & ~inside))
            normal += int(np.count_nonzero(~inside))
            true_positives += int(np.count_nonzero(marked & inside))
            anomalous += int(np.count_nonzero(inside))
        false_positive_rates.append(false_positives / normal)
        mean_overlaps.append(float(np.mean(overlaps)))
        true_positive_rates.append(true_positives / anomalous)
        f1.append(2 * true_positives / (true_positives + false_positives + anomalous))
    rates = np.array(false_positive_rates)
    return Localisation(
        {limit: 100 * area_up_to(rates, np.array(mean_overlaps), limit) / limit for limit in FPR_LIMITS},
        100 * area_up_to(rates, np.array(true_positive_rates), 1.0),
        100 * max(f1),
    )


def area_up_to(x: np.ndarray, y: np.ndarray, limit: float) -> float:
    """Area under a curve of straight pieces through (x, y), x rising from 0 to 1, between 0 and ``limit``."""
    inside = x <= limit
    return float(auc(np.r_[x[inside], limit], np.r_[y[inside], np.interp(limit, x, y)]))


def read_maps(path: Path) -> dict[str, np.ndarray]:
    """A branch's anomaly maps, (N, 64, 64) of every split and of the validation images ("val"), scaled (models.prediction).

    Raises:
        UserError: the file is damaged, or holds something else.
    """
    maps = files.read_arrays(path)
    for split, values in maps.items():
        if values.ndim != 3 or values.shape[1:] != (MAP_SIZE, MAP_SIZE) or values.dtype.kind != "f":
            raise UserError(
                f"{path} should hold maps of {MAP_SIZE}x{MAP_SIZE} numbers, found {split} {values.shape}; "
                f"{files.MAKE_AGAIN}"
            )
    return maps


def fused_maps(maps: dict[str, dict[str, np.ndarray]], weights: Mapping[str, float]) -> dict[str, np.ndarray]:
    """The largest of the branches' maps at each place, each times its branch's weight, by split, as in the exported model.

    Args:
        maps: by branch, then by split, (N, h, w).
    """
    splits = set.intersection(*(set(by_split) for by_split in maps.values()))
    return {
        split: np.max([weights[branch] * by_split[split] for branch, by_split in maps.items()], axis=0)
        for split in next(iter(maps.values()))
        if split in splits
    }


def measure(
    category: layouts.Category, maps: dict[str, np.ndarray], split: str, roi: np.ndarray | None = None
) -> Localisation:
    """Localisation of one kind of anomaly, over the good test images and those of its split, but for `without_masks`.

    Args:
        maps: by split the anomaly maps (N, h, w) of the category's test images, in sorted file order; enlarged here.
        split: `layouts.LOGICAL` or `layouts.STRUCTURAL`.
        roi: (s, s) bool, the region of interest.

    Raises:
        UserError: maps and images differ in number, or the ground truth is missing or does not fit.
    """
    sweep = Sweep()
    saturations, left_out = read_saturations(category), without_masks(category, split)
    for shown in (layouts.GOOD, split):
        paths = category.test(shown)
        if len(maps.get(shown, ())) != len(paths):
            raise UserError(
                f"{category.name}: there are {len(maps.get(shown, ()))} anomaly maps of {shown} test images, "
                f"but {len(paths)} images; run the stages that drew them with --overwrite"
            )
        for path, small in zip(paths, maps[shown]):
            if _test_folder(category, path) in left_out:
                continue
            size = category.displayed_size(path)
            regions = read_regions(category, shown, path, saturations, size) if shown != layouts.GOOD else []
            inspected = None if roi is None else enlarge(roi.astype(np.float32), size) >= 0.5
            sweep.add(enlarge(small, size), regions, inspected)
    return sweep.result()


def without_masks(category: layouts.Category, split: str) -> set[str]:
    """Where there is a folder for each defect, the defects of one kind that have no masks at all, while others of it have."""
    masks: Counter[str] = Counter()
    for path in category.test(split):
        masks[_test_folder(category, path)] += len(category.region_masks(split, path))
    return {defect for defect, count in masks.items() if not count} if masks.total() else set()


def _test_folder(category: layouts.Category, image: Path) -> str:
    return image.relative_to(category.root / "test").parts[0]


def enlarge(small: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w) -> (H, W) float32, bilinear with align_corners False; ``size`` is (W, H)."""
    return cv2.resize(small.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)


def read_saturations(category: layouts.Category) -> dict[int, tuple[float, bool]] | None:
    """pixel_value -> (saturation_threshold, relative_saturation), from defects_config.json; None in layouts that have none.

    Raises:
        UserError: the file is missing or says something else.
    """
    path = category.defects_config
    if not path.exists() and category.layout != layouts.Loco.name:
        return None
    if not path.exists():
        raise UserError(f"{path} is missing; MVTec LOCO AD's layout has it")
    try:
        entries = [
            (
                int(entry["pixel_value"]),
                (float(entry["saturation_threshold"]), bool(entry["relative_saturation"])),
            )
            for entry in files.read_json(path, files.MEND)
        ]
    except (TypeError, KeyError, ValueError) as problem:
        raise UserError(
            f"{path} should be a list of entries with pixel_value, saturation_threshold and "
            "relative_saturation"
        ) from problem
    found = dict(entries)
    for value, (threshold, relative) in entries:
        if found[value] != (threshold, relative):
            raise UserError(
                f"{path}: pixel_value {value} stands there twice with different saturations; keep one of them"
            )
        if not threshold > 0:
            raise UserError(
                f"{path}: the saturation_threshold of pixel_value {value} is {threshold}, expected more than 0"
            )
    return found


def read_regions(
    category: layouts.Category,
    kind: str,
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
    paths = category.region_masks(kind, image)
    if not paths:
        raise UserError(f"{category.name}: {image.relative_to(category.root)} has no ground-truth mask")
    regions = []
    for path in paths:
        values = images.read_mask(path)
        if image_files.is_lossy(path):
            _say_lossy(category, path)
        if values.shape != size[::-1]:
            raise UserError(
                f"{path} is {values.shape[1]}x{values.shape[0]}, but its image {size[0]}x{size[1]}"
            )
        if saturations is None:
            if not values.any():
                raise UserError(f"{path} is empty: it marks no region")
            count, parts = cv2.connectedComponents((values > 0).astype(np.uint8))
            regions += [Region(parts == part, float((parts == part).sum())) for part in range(1, count)]
            continue
        value = defects.pixel_value(path, values, saturations)
        if value not in saturations:
            raise UserError(
                f"{path} "
                + (
                    f"has value {value}, which is not in {category.defects_config}"
                    if value
                    else "is empty: it marks no region"
                )
            )
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


def _bins(values: np.ndarray) -> np.ndarray:
    """Number the values (H, W) by size, 0.._BINS-1: float32's bits are in order once those of negative numbers are turned."""
    bits = (np.ascontiguousarray(values, np.float32) + np.float32(0)).view(np.int32)  # -0.0 becomes 0.0
    ordered = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
    return (ordered >> _DROPPED_BITS).astype(np.int64) + _BINS // 2
