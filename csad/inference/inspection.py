"""Verdicts on single images, by an exported model: what predict.py writes and what a server answers. Needs no PyTorch."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csad.branches import BRANCHES
from csad.data import images
from csad.errors import UserError
from csad.evaluation.deviations import PLACES, Deviation, deviations, summarise, title_of
from csad.inference.engines import Engine
from csad.inference.overlays import (
    ARRANGEMENT,
    captioned,
    explaining_map,
    heat_overlay,
    label_overlay,
    ring,
    shrink,
    side_by_side,
)

import numpy as np

from models.constants import MAP_SIZE

NORMAL, ANOMALOUS, UNDECIDED, UNREADABLE = "normal", "anomalous", "undecided", "unreadable"
VERDICTS = (NORMAL, ANOMALOUS, UNDECIDED, UNREADABLE)
READERS = min(4, os.cpu_count() or 1)
AHEAD = 2  # batches being decoded while one is scored
DETAILS = 3  # findings after the first at most


class InMemory(io.BytesIO):
    """An image file in memory that is called in sentences by its name."""

    def __init__(self, content: bytes, name: Path | str):
        super().__init__(content)
        self.name = name

    def __str__(self) -> str:
        return str(self.name)


@dataclass(frozen=True)
class Picture:
    """An image as a model and as people see it, or why there is none.

    Attributes:
        name: the file's, or whatever the image is called; of an object store's, its URL.
        view: (3, size, size) uint8 as the model takes it.
        shown: (H, W, 3) uint8, made smaller, where something is to be drawn.
        size: width and height of the image in pixels.
        problem: why there is no view.
    """

    name: Path | str
    view: np.ndarray | None = None
    shown: np.ndarray | None = None
    size: tuple[int, int] = (0, 0)
    problem: str = ""


@dataclass(frozen=True)
class Verdict:
    """What is known about one image; fields are None where the model or the file does not tell.

    Attributes:
        verdict: one of `VERDICTS`.
        score: higher = more anomalous; the sum of contributions.
        contributions: what each branch adds to the score, by its name.
        alarm: the branch that adds most, where the image is anomalous.
        unusual: x and y, in the image's own pixels, of the maximum of that branch's map; None where no map has any.
        components: unusual amounts of components, the most unusual first.
        size: width and height of the image in pixels.
        legend: index and what people call it, of each component that the model knows.
        drawing: (H, W, 3) uint8: image, components, anomaly map; a ring where an anomalous image is most unusual.
        problem: why there is no verdict.
    """

    name: Path | str
    verdict: str
    threshold: float
    score: float | None = None
    contributions: dict[str, float] | None = None
    alarm: str | None = None
    unusual: tuple[int, int] | None = None
    components: Sequence[Deviation] = ()
    size: tuple[int, int] = (0, 0)
    legend: Sequence[tuple[int, str]] = ()
    drawing: np.ndarray | None = None
    problem: str = ""

    @property
    def findings(self) -> list[str]:
        """What is wrong, in words: one sentence about what explains the alarm, then at most `DETAILS` details."""
        if self.problem:
            return [self.problem]
        if self.verdict != ANOMALOUS:
            return []
        if self.unusual is None:
            return findings_of(
                self.components, "unusual arrangement of components" if self.alarm == ARRANGEMENT else "", ""
            )
        spot = f"at x {self.unusual[0]}, y {self.unusual[1]}"
        if self.alarm == ARRANGEMENT:
            return findings_of(
                self.components,
                "unusual arrangement of components, most of all " + spot,
                "most unusual " + spot,
            )
        right, low = (2 * place >= side for place, side in zip(self.unusual, self.size))
        return findings_of(self.components, "unusual surface " + spot, quarter=PLACES[2 * right + low])

    @property
    def captioned_drawing(self) -> np.ndarray | None:
        """The drawing with verdict, score, findings and the components' legend under it."""
        if self.drawing is None or self.score is None:
            return self.drawing
        over = "is over" if self.score > self.threshold else "is not over"
        lines = [
            f"Score {self.score:.2f} {over} the threshold {self.threshold:.2f}",
            *(sentence[:1].upper() + sentence[1:] for sentence in self.findings),
            "Left: the picture"
            + (", a ring where it is most unusual" if self.findings and self.unusual else "")
            + "; middle: its components; right: how unusual each place is",
        ]
        return captioned(
            self.drawing,
            f"{self.verdict.capitalize()}: {printable(Path(str(self.name)).name)}",
            lines,
            self.legend,
            red=self.verdict == ANOMALOUS,
        )

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
            "components": [one._asdict() | {"words": one.words} for one in self.components],
            "problem": self.problem or None,
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
        return text + "".join(f"\n           {one}" for one in self.findings)


def findings_of(
    components: Sequence[Deviation], otherwise: str = "", spot: str | None = None, quarter: str = ""
) -> list[str]:
    """One sentence that sums up, then at most `DETAILS` details.

    Args:
        components: deviations of one image, the farthest off first.
        otherwise: what sums up where the deviations do not; where they do, it is said next.
        spot: what is said next instead, "" for nothing.
        quarter: see `csad.evaluation.deviations.summarise`.
    """
    summary = summarise(components, quarter)
    details = [deviation.words for deviation in components if deviation not in summary.said]
    if not summary.sentence:
        return [text for text in (otherwise, *details[:DETAILS]) if text]
    return [
        summary.sentence,
        *[text for text in (otherwise if spot is None else spot, *details) if text][:DETAILS],
    ]


def names_of(known: dict[str, Any]) -> dict[int, str]:
    """What people call components, of those that have a name in a model's metadata."""
    return {int(component): name for component, name in known.get("names", {}).items()}


def legend_of(known: dict[str, Any]) -> list[tuple[int, str]]:
    """Index and what people call it, of each component in a model's metadata."""
    names = names_of(known)
    return [
        (component, title_of(component, names.get(component, "")))
        for component in range(1, len(known.get("histogram", {}).get("mean", ())))
    ]


def printable(text: str) -> str:
    """A text as one line without a terminal's commands; names of files may hold both."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def verdicts_on(
    names: Iterable[Path | str],
    engine: Engine,
    threshold: float,
    batch_size: int,
    read: Callable[[Path | str], Picture],
) -> Iterator[Verdict]:
    """Score images in order. A few are decoded ahead by threads, so memory does not depend on how many there are."""
    names = iter(names)
    with ThreadPoolExecutor(READERS) as readers:
        decoding = deque(readers.submit(read, name) for name in itertools.islice(names, AHEAD * batch_size))
        while decoding:
            batch = [decoding.popleft().result() for _ in range(min(batch_size, len(decoding)))]
            decoding.extend(readers.submit(read, name) for name in itertools.islice(names, batch_size))
            yield from judge(batch, engine, threshold)


def state_of(path: Path) -> dict[str, int | None]:
    """What tells whether a file is still the one that was scored: its length and time of change, None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return {"bytes": None, "changed_ns": None}
    return {"bytes": status.st_size, "changed_ns": status.st_mtime_ns}


def as_line(verdict: Verdict, state: dict[str, int | None]) -> str:
    """A line of predictions.jsonl."""
    return json.dumps(verdict.as_json() | state, ensure_ascii=False, allow_nan=False) + "\n"


def read_picture(source: Any, name: Path | str, engine: Engine, shown_side: int | None) -> Picture:
    """Decode an image.

    Args:
        source: a path or an open binary file.
        shown_side: longer side of what is drawn, or None.
    """
    if isinstance(source, Path) and source.is_dir():
        return Picture(name, problem=f"folder {name} cannot be listed, so what lies in it is not judged")
    try:
        image = images.read_rgb(source, white_level=engine.metadata.get("white_level"))
    except images.UnknownWhiteLevel as problem:
        return Picture(
            name,
            problem=f"{problem.finding}, nor does the model know it; store the picture with "
            "8 bits, or train and export the model with images.white_level",
        )
    except UserError as problem:
        return Picture(name, problem=str(problem))
    view = images.resize(image, engine.size).transpose(2, 0, 1)
    return Picture(name, view, None if shown_side is None else shrink(image, shown_side), image.shape[1::-1])


def judge(pictures: Sequence[Picture], engine: Engine, threshold: float) -> list[Verdict]:
    """Verdicts on pictures, in order; unreadable ones get theirs without the model."""
    readable = [picture for picture in pictures if picture.view is not None]
    found = iter(_judge_readable(readable, engine, threshold) if readable else [])
    return [
        next(found)
        if picture.view is not None
        else Verdict(picture.name, UNREADABLE, threshold, problem=picture.problem)
        for picture in pictures
    ]


def _judge_readable(pictures: Sequence[Picture], engine: Engine, threshold: float) -> list[Verdict]:
    batch = np.stack([picture.view for picture in pictures])
    if not engine.has_maps:
        return [
            _undecided(picture, score, threshold)
            if not math.isfinite(score)
            else Verdict(picture.name, ANOMALOUS if score > threshold else NORMAL, threshold, score)
            for picture, score in zip(pictures, map(float, engine.score(batch)))
        ]
    found = engine.predict(batch)
    histogram, names, legend = (
        engine.metadata.get("histogram"),
        names_of(engine.metadata),
        legend_of(engine.metadata),
    )
    verdicts = []
    for index, picture in enumerate(pictures):
        score = float(found.score[index])
        contributions = dict(zip(engine.branches, map(float, found.branch_scores[index])))
        if not (math.isfinite(score) and np.isfinite(found.anomaly_map[index]).all()):
            verdicts.append(_undecided(picture, score, threshold))
            continue
        verdict = ANOMALOUS if score > threshold else NORMAL
        alarm = max(contributions, key=contributions.get)
        shown_map = found.branch_maps[index, engine.branches.index(alarm)]
        if not shown_map.any():
            shown_map = found.anomaly_map[index]
        unusual = maximum_of(shown_map, picture.size)
        spot = unusual if verdict == ANOMALOUS else None
        drawing = (
            None
            if picture.shown is None
            else _drawing(
                picture,
                found.label_map[index],
                dict(zip(engine.branches, found.branch_maps[index])),
                contributions,
                verdict,
                spot,
            )
        )
        verdicts.append(
            Verdict(
                picture.name,
                verdict,
                threshold,
                score,
                contributions,
                alarm if verdict == ANOMALOUS else None,
                unusual,
                deviations(found.label_map[index], histogram, names) if histogram else (),
                picture.size,
                legend,
                drawing,
            )
        )
    return verdicts


def _drawing(
    picture: Picture,
    label_map: np.ndarray,
    maps: dict[str, np.ndarray],
    contributions: dict[str, float],
    verdict: str,
    spot: tuple[int, int] | None,
) -> np.ndarray:
    """Image, components and map of what explains the score, a ring around the ``spot`` that is pointed at."""
    image = picture.shown
    parts = [
        image,
        label_overlay(image, label_map),
        heat_overlay(image, explaining_map(maps, contributions), anomalous=verdict == ANOMALOUS),
    ]
    if spot is not None:
        parts[0], parts[2] = (ring(part, spot, picture.size) for part in (parts[0], parts[2]))
    return side_by_side(*parts)


def maximum_of(anomaly_map: np.ndarray, size: tuple[int, int]) -> tuple[int, int] | None:
    """Where a map (64, 64) is highest: x and y in the pixels of an image of that width and height; None of an empty map."""
    if not anomaly_map.any():
        return None
    row, column = np.unravel_index(anomaly_map.argmax(), anomaly_map.shape)
    return int((column + 0.5) * size[0] / MAP_SIZE), int((row + 0.5) * size[1] / MAP_SIZE)


def _undecided(picture: Picture, score: float, threshold: float) -> Verdict:
    return Verdict(
        picture.name,
        UNDECIDED,
        threshold,
        score,
        problem=f"the model gives a score that is not finite ({score}); export it again",
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
