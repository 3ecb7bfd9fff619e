"""Which components an image has too much or too little of, and where, in plain words.

What a patch histogram (docs/METHOD.md section 2) knows of an image, compared with the training images component by component:
the score says that something is off, this says what.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from models.constants import QUARTERS

PLACES = ("top-left quarter", "bottom-left quarter", "top-right quarter", "bottom-right quarter")  # docs/METHOD.md's order
WHOLE = "image"
LIMIT = 3.0  # standard deviations of the training images
MANY = 10.0  # times the normal area; from there on a number says less than that it hardly ever is there
SMALL = 0.001  # areas of a thousandth of the image count as nothing (docs/METHOD.md section 1); no std is smaller


class Deviation(NamedTuple):
    """An unusual amount of one component."""

    component: int
    place: str  # the whole image, or one of PLACES
    area: float  # share of the place's area
    normal_area: float  # the training images' mean
    deviation: float  # in their standard deviations, negative = too little
    above_all: str = ""  # for the whole image: the quarter that shows it most, where one is unusual in the same direction

    @property
    def words(self) -> str:
        """For example: component 3: 2.1 times the normal area in the top-left quarter."""
        there = "" if self.place == WHOLE else f" in the {self.place}"
        mostly = self.above_all and f", above all in the {self.above_all}"
        if self.normal_area < SMALL:
            return f"component {self.component}{there}, where there is normally none{mostly}"
        if self.area < SMALL:
            return f"component {self.component} is missing" + ("" if self.place == WHOLE else f" from the {self.place}")
        ratio = self.area / self.normal_area
        if ratio >= MANY:
            return f"component {self.component}{there}, where there is normally hardly any{mostly}"
        times = f"{ratio:.1f} times the normal area" if ratio >= 1.05 else f"{100 * ratio:.0f} % of the normal area"
        return f"component {self.component}: {times}{there}{mostly}"


def area_fractions(label_map: np.ndarray, classes: int) -> np.ndarray:
    """`models.patch_histogram.label_histograms` of one map, background included, without PyTorch.

    Args:
        label_map: (H, W) uint8, values below ``classes``; H and W even.

    Returns:
        (5, C) float64: of the whole map and of its quarters, as in `PLACES`.
    """
    rows, columns = (side // 2 for side in label_map.shape)
    quarters = [np.bincount(label_map[top:top + rows, left:left + columns].ravel(), minlength=classes)[:classes]
                / (rows * columns) for left in (0, columns) for top in (0, rows)]
    return np.vstack([np.mean(quarters, axis=0), quarters])


def deviations(label_map: np.ndarray, histogram: Mapping[str, Any]) -> list[Deviation]:
    """Compare an image's components with those of the training images.

    Args:
        label_map: (256, 256) uint8, values below the number of classes, 0 = background.
        histogram: area fractions on training images, by class: mean and std [C], quarter_mean and quarter_std [4][C].

    Returns:
        What is more than `LIMIT` standard deviations off, the farthest first: a component in the whole image, and in the
        quarters where that does not say it already.
    """
    classes = len(histogram["mean"])
    areas = area_fractions(label_map, classes)
    normal = np.vstack([histogram["mean"], histogram["quarter_mean"]])
    spread = np.vstack([histogram["std"], histogram["quarter_std"]])
    off = (areas - normal) / np.maximum(spread, SMALL)
    found = []

    def note(component: int, place: int, above_all: str = "") -> None:
        found.append(Deviation(component, (WHOLE, *PLACES)[place], float(areas[place, component]),
                               float(normal[place, component]), float(off[place, component]), above_all))

    for component in range(1, classes):
        whole_off, quarters_off = off[0, component], off[1:, component]
        said = np.zeros(QUARTERS, bool)
        if abs(whole_off) >= LIMIT:
            said = quarters_off * whole_off > 0
            most = int(np.argmax(quarters_off * np.sign(whole_off)))
            note(component, 0, PLACES[most] if said[most] and abs(quarters_off[most]) >= LIMIT else "")
        for quarter in np.flatnonzero((abs(quarters_off) >= LIMIT) & ~said):
            note(component, quarter + 1)
    return sorted(found, key=lambda one: -abs(one.deviation))
