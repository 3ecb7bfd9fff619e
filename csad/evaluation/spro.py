"""Saturated per-region overlap (sPRO) and pixel metrics (docs/method.md section 5).

Bergmann et al., "Beyond Dents and Scratches", IJCV 2022. Thresholds are swept without sorting the pixels of all images:
every map is counted into one histogram of values, so memory does not grow with the number of images, and each region adds
what its pixels contribute to a second one. `by_definition` says the same without speed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

FPR_LIMITS = (0.01, 0.05, 0.1, 0.3, 1.0)
_DROPPED_BITS = (
    11  # of float32's 32: values that agree in sign, exponent and 12 bits of mantissa are one threshold
)
_BINS = 1 << (32 - _DROPPED_BITS)


class Region(NamedTuple):
    """One annotated region of a defect."""

    mask: np.ndarray  # (H, W) bool, at least one pixel
    saturation: float  # pixels that are enough, in (0, mask.sum()]


class Localisation(NamedTuple):
    """In percent; sPRO is the area under the curve up to each of `FPR_LIMITS`, divided by that limit."""

    spro: dict[float, float]
    pixel_auroc: float
    pixel_f1_max: float


class SproCurve:
    """The curves over all thresholds, filled image by image.

    A pixel is marked where its value is at or over the threshold.
    """

    def __init__(self) -> None:
        self._normal = np.zeros(_BINS, np.int64)  # pixels outside every region
        self._anomalous = np.zeros(_BINS, np.int64)  # pixels inside a region
        self._overlap = np.zeros(_BINS)  # saturated fraction, summed over regions
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
            contributions = np.full(len(highest), 1 / saturation)
            contributions[-1] = 1 - (len(highest) - 1) / saturation
            np.add.at(self._overlap, highest, contributions)
            self._regions += 1
        # Added in place: bincount would make a whole histogram, of millions of bins, for every small image.
        np.add.at(self._normal, bins[~inside if inspected is None else ~inside & inspected], 1)
        np.add.at(self._anomalous, bins[inside], 1)

    def result(self) -> Localisation:
        """The areas under the curves; NaN where there is no region, or no pixel outside one."""
        occurring = np.flatnonzero(self._normal + self._anomalous)[::-1]  # thresholds, falling
        counts = (self._normal, self._anomalous, self._overlap)
        normal, anomalous, overlap = (np.r_[0, np.cumsum(count[occurring])] for count in counts)
        if not self._regions or not normal[-1]:
            return Localisation({limit: float("nan") for limit in FPR_LIMITS}, float("nan"), float("nan"))
        false_positives = normal / normal[-1]
        f1 = 2 * anomalous[1:] / (anomalous[1:] + normal[1:] + anomalous[-1])
        mean_overlap = overlap / self._regions
        return Localisation(
            {limit: 100 * area_up_to(false_positives, mean_overlap, limit) / limit for limit in FPR_LIMITS},
            100 * area_up_to(false_positives, anomalous / anomalous[-1], 1.0),
            100 * float(f1.max()),
        )


def by_definition(measured: Sequence[tuple[np.ndarray, Sequence[Region]]]) -> Localisation:
    """What `SproCurve` measures, as the paper defines it: one threshold after another, one region after another.

    Every value is a threshold here; `SproCurve` counts values that agree in 12 bits of their mantissa as one.

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
    from sklearn.metrics import auc

    inside = x <= limit
    return float(auc(np.r_[x[inside], limit], np.r_[y[inside], np.interp(limit, x, y)]))


def _bins(values: np.ndarray) -> np.ndarray:
    """Number the values (H, W) by size, 0.._BINS-1: float32's bits are in order once those of negative numbers are turned."""
    bits = (np.ascontiguousarray(values, np.float32) + np.float32(0)).view(np.int32)  # -0.0 becomes 0.0
    ordered = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
    return (ordered >> _DROPPED_BITS).astype(np.int64) + _BINS // 2
