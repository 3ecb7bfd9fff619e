"""Which components an image has too much or too little of, and where, in plain words.

What a patch histogram (METHOD.md section 2) knows of an image, compared with the training images component by component:
the score says that something is off, this says what.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from models.patch_histogram import QUARTERS, label_histograms

PLACES = ("top-left quarter", "bottom-left quarter", "top-right quarter", "bottom-right quarter")  # METHOD.md's order
WHOLE = "image"
LIMIT = 3.0  # standard deviations of the training images
SMALL = 0.001  # areas of a thousandth of the image count as nothing (METHOD.md section 1); no std is smaller


class Deviation(NamedTuple):
    """An unusual amount of one component."""

    component: int
    place: str  # the whole image, or one of PLACES
    area: float  # share of the place's area
    normal_area: float  # the training images' mean
    deviation: float  # in their standard deviations, negative = too little

    @property
    def words(self) -> str:
        """For example: component 3: 2.1 times the normal area in the top-left quarter."""
        there = "" if self.place == WHOLE else f" in the {self.place}"
        if self.normal_area < SMALL:
            return f"component {self.component}{there or ' somewhere'}, where there is normally none"
        if self.area < SMALL:
            return f"component {self.component} is missing" + ("" if self.place == WHOLE else f" from the {self.place}")
        ratio = self.area / self.normal_area
        times = f"{ratio:.1f} times the normal area" if ratio >= 1.05 else f"{100 * ratio:.0f} % of the normal area"
        return f"component {self.component}: {times}{there}"


def deviations(label_map: np.ndarray, histogram: Mapping[str, Any]) -> list[Deviation]:
    """Compare an image's components with those of the training images.

    Args:
        label_map: (256, 256) uint8, values below the number of classes, 0 = background.
        histogram: area fractions on training images, by class: mean and std [C], quarter_mean and quarter_std [4][C].

    Returns:
        What is more than `LIMIT` standard deviations off, the farthest first; a quarter is left out where the whole
        image says the same and no less.
    """
    classes = len(histogram["mean"])
    whole, quarters = (part[0].numpy() for part in label_histograms(torch.from_numpy(label_map)[None], classes))
    areas = np.vstack([whole, quarters.reshape(QUARTERS, classes)])
    normal = np.vstack([histogram["mean"], histogram["quarter_mean"]])
    spread = np.vstack([histogram["std"], histogram["quarter_std"]])
    off = (areas - normal) / np.maximum(spread, SMALL)
    found = []
    for component in range(1, classes):
        for place, name in enumerate((WHOLE, *PLACES)):
            if abs(off[place, component]) < LIMIT:
                continue
            if place and off[0, component] / off[place, component] >= 1:
                continue
            found.append(Deviation(component, name, float(areas[place, component]), float(normal[place, component]),
                                   float(off[place, component])))
    return sorted(found, key=lambda one: -abs(one.deviation))
