"""The verdict on an image that a model has scored: contributions, and findings in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csad.branches import BRANCHES
from csad.evaluation.deviations import PLACES, Deviation, summarise, title_of, words_of
from csad.inference.overlays import ARRANGEMENT, captioned

import numpy as np

NORMAL, ANOMALOUS, UNDECIDED, UNREADABLE = "normal", "anomalous", "undecided", "unreadable"
VERDICTS = (NORMAL, ANOMALOUS, UNDECIDED, UNREADABLE)
MAX_DETAILS = 3  # findings after the first


@dataclass(frozen=True)
class Verdict:
    """What is known about one image; fields are None where the model or the file does not tell."""

    name: Path | str
    verdict: str  # one of `VERDICTS`
    threshold: float
    score: float | None = None  # higher = more anomalous; the sum of contributions
    contributions: dict[str, float] | None = None  # what each branch adds to the score, by its name
    alarm: str | None = None  # the branch that adds most, where the image is anomalous
    # X and y, in the image's own pixels, of the maximum of that branch's map; None where no map has any.
    unusual: tuple[int, int] | None = None
    components: Sequence[Deviation] = ()  # unusual amounts of components, the most unusual first
    size: tuple[int, int] = (0, 0)  # width and height of the image in pixels
    # Index and what people call it, of each component that the model knows.
    legend: Sequence[tuple[int, str]] = ()
    # (H, W, 3) uint8: image, components, anomaly map; a ring where an anomalous image is most unusual.
    drawing: np.ndarray | None = None
    problem: str = ""  # why there is no verdict
    note: str = ""  # why the score may be too high though nothing is wrong with the part

    @property
    def findings(self) -> list[str]:
        """What is wrong, in words: one sentence about what explains the alarm, then at most `MAX_DETAILS` details."""
        if self.problem:
            return [self.problem]
        if self.verdict != ANOMALOUS:
            return []
        arrangement = "unusual arrangement of components"
        if self.unusual is None:
            return findings_of(self.components, arrangement if self.alarm == ARRANGEMENT else "", "")
        spot = f"at x {self.unusual[0]}, y {self.unusual[1]}"
        if self.alarm == ARRANGEMENT:
            return findings_of(self.components, f"{arrangement}, most of all {spot}", f"most unusual {spot}")
        right, low = (2 * position >= side for position, side in zip(self.unusual, self.size))
        return findings_of(self.components, "unusual surface " + spot, quarter=PLACES[2 * right + low])

    @property
    def captioned_drawing(self) -> np.ndarray | None:
        """The drawing with verdict, score, findings, note and the components' legend under it."""
        if self.drawing is None or self.score is None:
            return self.drawing
        over = "is over" if self.score > self.threshold else "is not over"
        lines = [
            f"Score {self.score:.2f} {over} the threshold {self.threshold:.2f}",
            *(text[:1].upper() + text[1:] for text in (*self.findings, self.note) if text),
            "Left: the picture"
            + (", a ring where it is most unusual" if self.findings and self.unusual else "")
            + "; middle: its components; right: how unusual each place is",
        ]
        title = f"{self.verdict.capitalize()}: {printable(Path(str(self.name)).name)}"
        return captioned(self.drawing, title, lines, self.legend, red=self.verdict == ANOMALOUS)

    def as_json(self) -> dict[str, Any]:
        """Plain values, without numbers that JSON does not know."""
        return {
            "image": str(self.name),
            "verdict": self.verdict,
            "score": _finite(self.score),
            "threshold": self.threshold,
            "contributions": self.contributions
            and {branch: _finite(value) for branch, value in self.contributions.items()},
            "alarm": self.alarm,
            "unusual": self.unusual,
            "findings": self.findings,
            "components": [deviation._asdict() | {"words": deviation.words} for deviation in self.components],
            "problem": self.problem or None,
            "note": self.note or None,
        }

    def __str__(self) -> str:
        name = printable(str(self.name))
        if self.score is None or self.verdict == UNDECIDED:
            return f"{self.verdict:10} {name}\n           {printable(self.problem)}"
        score = f"{self.score:.2f}"
        if self.contributions:
            score += " = " + " + ".join(
                f"{BRANCHES[branch].title} {value:.2f}" for branch, value in self.contributions.items()
            )
        text = f"{self.verdict:10} {name}  score {score}, threshold {self.threshold:.2f}"
        return text + "".join(f"\n           {line}" for line in (*self.findings, self.note) if line)


def findings_of(
    components: Sequence[Deviation], otherwise: str = "", spot: str | None = None, quarter: str = ""
) -> list[str]:
    """One sentence that sums up, then at most `MAX_DETAILS` details, one of each component.

    Args:
        components: deviations of one image, the farthest off first.
        otherwise: the summary if the deviations give none; else the first detail.
        spot: the first detail instead, "" for none.
        quarter: see `csad.evaluation.deviations.summarise`.
    """
    summary = summarise(components, quarter)
    by_component: dict[int, list[Deviation]] = {}
    for deviation in components:
        if deviation not in summary.said:
            by_component.setdefault(deviation.component, []).append(deviation)
    details = [words_of(same) for same in by_component.values()]
    if not summary.sentence:
        return [text for text in (otherwise, *details[:MAX_DETAILS]) if text]
    details.insert(0, otherwise if spot is None else spot)
    return [summary.sentence + summary.details, *[text for text in details if text][:MAX_DETAILS]]


def names_of(metadata: dict[str, Any]) -> dict[int, str]:
    """What people call components, of those that have a name in a model's metadata."""
    return {int(component): name for component, name in metadata.get("names", {}).items()}


def legend_of(metadata: dict[str, Any]) -> list[tuple[int, str]]:
    """Index and what people call it, of each component in a model's metadata."""
    names = names_of(metadata)
    return [
        (component, title_of(component, names.get(component, "")))
        for component in range(1, len(metadata.get("histogram", {}).get("mean", ())))
    ]


def printable(text: str) -> str:
    """A text as one line without a terminal's commands; names of files may hold both."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
