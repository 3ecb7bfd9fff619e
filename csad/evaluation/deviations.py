"""Which components an image has too much or too little of, and where, in plain words.

What a patch histogram (docs/method.md section 2) knows of an image, compared with the training images component by component:
the score says that something is off, this says what.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from models.constants import QUARTERS

# docs/method.md's order.
PLACES = ("top-left quarter", "bottom-left quarter", "top-right quarter", "bottom-right quarter")
WHOLE = "image"
LIMIT = 3.0  # standard deviations of the training images
MANY = 10.0  # times the normal area; from there on a number says less than that it hardly ever is there
SMALL = (
    0.001  # areas of a thousandth of the image count as nothing (docs/method.md section 1); no std is smaller
)


class Deviation(NamedTuple):
    """An unusual amount of one component."""

    component: int
    place: str  # the whole image, or one of PLACES
    area: float  # share of the place's area
    normal_area: float  # the training images' mean
    deviation: float  # in their standard deviations, negative = too little
    above_all: str = (
        ""  # for the whole image: the quarter that shows it most, if one is unusual in the same direction
    )
    name: str = ""  # what people call the component; empty: by its number

    @property
    def title(self) -> str:
        return title_of(self.component, self.name)

    @property
    def is_missing(self) -> bool:
        """Whether the place has none of what it normally has."""
        return self.area < SMALL <= self.normal_area

    @property
    def words(self) -> str:
        """For example: component 3: 2.1 times the normal area in the top-left quarter."""
        if self.is_missing:
            return f"{self.title} is missing" + ("" if self.place == WHOLE else f" from the {self.place}")
        if few := self._normally_few:
            return f"{self.title}{self._there}, where there is normally {few}{self._mostly}"
        return f"{self.title}: {self.amount}"

    @property
    def amount(self) -> str:
        """The same in a sentence about the component, for example: 2.1 times the normal area in the top-left quarter."""
        if self.is_missing:
            return f"none{self._there}"
        if few := self._normally_few:
            return f"normally {few}{self._there}{self._mostly}"
        ratio = self.area / self.normal_area
        times = f"{ratio:.1f} times" if ratio >= 1.05 else f"{100 * ratio:.0f} % of"
        return f"{times} the normal area{self._there}{self._mostly}"

    @property
    def _there(self) -> str:
        return "" if self.place == WHOLE else f" in the {self.place}"

    @property
    def _mostly(self) -> str:
        return self.above_all and f", above all in the {self.above_all}"

    @property
    def _normally_few(self) -> str:
        if self.normal_area < SMALL:
            return "none"
        return "hardly any" if self.area / self.normal_area >= MANY else ""


def area_fractions(label_map: np.ndarray, classes: int) -> np.ndarray:
    """`models.patch_histogram.label_histograms` of one map, background included, without PyTorch.

    Args:
        label_map: (H, W) uint8, values below ``classes``; H and W even.

    Returns:
        (5, C) float64: of the whole map and of its quarters, as in `PLACES`.
    """
    rows, columns = (side // 2 for side in label_map.shape)
    quarters = [
        np.bincount(label_map[top : top + rows, left : left + columns].ravel(), minlength=classes)[:classes]
        / (rows * columns)
        for left in (0, columns)
        for top in (0, rows)
    ]
    return np.vstack([np.mean(quarters, axis=0), quarters])


def title_of(component: int, name: str = "") -> str:
    """What sentences and legends call a component."""
    return name or f"component {component}"


class Summary(NamedTuple):
    """What several deviations come to: a sentence, "" where they explain nothing, and the deviations that it says, some of them
    by its details."""

    sentence: str
    said: Sequence[Deviation] = ()
    details: str = ""  # to be put after the sentence


def summarise(unusual: Sequence[Deviation], spot: str = "") -> Summary:
    """What deviations come to, in one sentence, for example: component 5 is missing.

    Args:
        unusual: of one image, the farthest off first.
        spot: the quarter whose surface looks most unusual, where that is what raised the alarm; only deviations that show
            there, or a component that is missing altogether, then explain it.
    """
    missing = [deviation for deviation in unusual if deviation.place == WHOLE and deviation.is_missing]
    if missing:
        substitute = _counterpart(missing[0], unusual)
        if substitute is not None:
            return _exchange(substitute, missing[0])
        *others, last = (deviation.title for deviation in missing)
        return Summary(f"{', '.join(others)} and {last} are missing" if others else missing[0].words, missing)
    explaining = [
        deviation for deviation in unusual if not spot or spot in (deviation.place, deviation.above_all)
    ]
    if not explaining:
        return Summary("")
    first = explaining[0]
    same = [deviation for deviation in unusual if deviation.component == first.component]
    amounts = f" ({_amounts(same)})"
    if first.place != WHOLE and any(
        other.place != first.place and other.deviation * first.deviation < 0 for other in same
    ):
        return Summary(f"{first.title} is not where it should be", same, amounts)
    counterpart = _counterpart(first, unusual)
    if counterpart is not None:
        return _exchange(first, counterpart) if first.deviation > 0 else _exchange(counterpart, first)
    if first.deviation < 0:
        if spot:
            return Summary(f"something lies where {first.title} should be", same, f" ({words_of(same)})")
        if first.is_missing:
            return Summary(words_of(same), same)
        return Summary(f"there is too little of {first.title}", same, amounts)
    if first.normal_area < SMALL:
        return Summary(f"{first.title} is where it should not be", same, amounts)
    return Summary(f"there is too much of {first.title}", same, amounts)


def words_of(same: Sequence[Deviation]) -> str:
    """One sentence of all deviations of one component."""
    if len(same) == 1:
        return same[0].words
    return f"{same[0].title}: {_amounts(same)}"


def _amounts(same: Sequence[Deviation]) -> str:
    *others, last = (deviation.amount for deviation in same)
    return f"{', '.join(others)}, and {last}" if others else last


def _exchange(excess: Deviation, lack: Deviation) -> Summary:
    quarter = lack.above_all if lack.place == WHOLE else lack.place
    return Summary(f"{excess.title} lies where {lack.title} should be", [excess, lack], f", in the {quarter}")


def _counterpart(deviation: Deviation, unusual: Sequence[Deviation]) -> Deviation | None:
    """Another component that gains about the area that this one loses in the same place, or the other way round."""
    change = deviation.area - deviation.normal_area
    quarter = deviation.above_all if deviation.place == WHOLE else deviation.place
    for other in unusual if quarter else ():
        same_place = (other.place, other.above_all) == (deviation.place, deviation.above_all)
        if same_place and other.component != deviation.component:
            if 0.5 <= (other.normal_area - other.area) / change <= 2:
                return other
    return None


def deviations(
    label_map: np.ndarray, histogram: Mapping[str, Any], names: Mapping[int, str] | None = None
) -> list[Deviation]:
    """Compare an image's components with those of the training images.

    Args:
        label_map: (256, 256) uint8, values below the number of classes, 0 = background.
        histogram: area fractions on training images, by class: mean and std [C], quarter_mean and quarter_std [4][C].
        names: what people call components, of those that have a name.

    Returns:
        What is more than `LIMIT` standard deviations off, the farthest first: a component in the whole image, and in the
        quarters where that does not say it already.
    """
    classes = len(histogram["mean"])
    areas = area_fractions(label_map, classes)
    normal = np.vstack([histogram["mean"], histogram["quarter_mean"]])
    spread = np.vstack([histogram["std"], histogram["quarter_std"]])
    off = (areas - normal) / np.maximum(spread, SMALL)
    unusual = []

    def note(component: int, place: int, above_all: str = "") -> None:
        unusual.append(
            Deviation(
                component,
                (WHOLE, *PLACES)[place],
                float(areas[place, component]),
                float(normal[place, component]),
                float(off[place, component]),
                above_all,
                (names or {}).get(component, ""),
            )
        )

    for component in range(1, classes):
        whole_off, quarters_off = off[0, component], off[1:, component]
        is_covered = np.zeros(QUARTERS, bool)
        if abs(whole_off) >= LIMIT:
            is_covered = quarters_off * whole_off > 0
            most = int(np.argmax(quarters_off * np.sign(whole_off)))
            note(component, 0, PLACES[most] if is_covered[most] and abs(quarters_off[most]) >= LIMIT else "")
        for quarter in np.flatnonzero((abs(quarters_off) >= LIMIT) & ~is_covered):
            note(component, int(quarter) + 1)
    return sorted(unusual, key=lambda deviation: -abs(deviation.deviation))
