"""Images read and judged by an exported model, for predict.py and the station. Needs no PyTorch."""

from __future__ import annotations

import io
import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from csad.data import images
from csad.data.image_files import STORED, Wording
from csad.data.images import ASPECT_TOLERANCE, is_grey
from csad.errors import UserError
from csad.evaluation.deviations import deviations
from csad.inference.engines import Engine
from csad.inference.overlays import explaining_map, heat_overlay, label_overlay, ring, shrink, side_by_side
from csad.inference.verdicts import ANOMALOUS, NORMAL, UNDECIDED, UNREADABLE, Verdict, legend_of, names_of

import numpy as np

from models.constants import MAP_SIZE
from models.prediction import Prediction

READERS = min(4, os.cpu_count() or 1)
AHEAD = 2  # batches being decoded while one is scored


class InMemory(io.BytesIO):
    """An image file in memory; sentences call it by its name, in words for whoever it came from."""

    def __init__(self, content: bytes, name: Path | str, wording: Wording = STORED):
        super().__init__(content)
        self.name, self.wording = name, wording

    def __str__(self) -> str:
        return str(self.name)


@dataclass(frozen=True)
class Picture:
    """An image as a model and as people see it, or why there is none."""

    name: Path | str  # the file's, or whatever the image is called; of an object store's, its URL
    view: np.ndarray | None = None  # (3, size, size) uint8 as the model takes it
    shown: np.ndarray | None = None  # (H, W, 3) uint8, made smaller, where something is to be drawn
    size: tuple[int, int] = (0, 0)  # width and height of the image in pixels
    problem: str = ""  # why there is no view
    note: str = ""  # see `csad.inference.verdicts.Verdict`


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
            problem=f"{problem.finding} and the model does not know it either; store the picture with "
            "8 bits, or train and export the model with images.white_level",
        )
    except UserError as problem:
        return Picture(name, problem=str(problem))
    view = images.resize(image, engine.size).transpose(2, 0, 1)
    size = image.shape[1::-1]
    note = unlike_training(size, is_grey(image), engine.metadata.get("training_pictures"), engine.size)
    return Picture(name, view, None if shown_side is None else shrink(image, shown_side), size, note=note)


def unlike_training(
    size: tuple[int, int], grey: bool, training: dict[str, Any] | None, view_side: int
) -> str:
    """What is different about a picture, where that raises its score; "" where nothing is.

    Args:
        size: width and height.
        grey: whether it has no colours.
        training: the same of most training pictures, as the model's metadata says; None: a model that does not know.
        view_side: width and height in pixels of what the model sees; of larger pictures it sees no more.
    """
    if training is None:
        return ""
    differences = []
    width, height = training["size"]
    if abs(size[0] * height / (size[1] * width) - 1) > ASPECT_TOLERANCE:
        differences.append(
            f"its shape is not that of the training pictures ({size[0]} x {size[1]} pixels, not like "
            f"{width} x {height}), so that it is stretched"
        )
    elif min(size) < min(height, width, view_side):
        differences.append(
            f"it is smaller than the training pictures ({size[0]} x {size[1]} pixels, not {width} x {height}) "
            "and so less sharp"
        )
    if grey != training["grey"]:
        differences.append(
            "it is grey and the training pictures are in colour"
            if grey
            else "it is in colour and the training pictures are grey"
        )
    if not differences:
        return ""
    return f"{', and '.join(differences)}: the score may be too high"


def judge(pictures: Sequence[Picture], engine: Engine, threshold: float) -> list[Verdict]:
    """Verdicts on pictures, in order; unreadable ones get theirs without the model."""
    views = [picture.view for picture in pictures if picture.view is not None]
    predictions: Iterator[Sequence[Any]] = iter(())
    if views and engine.has_maps:
        predictions = zip(*engine.predict(np.stack(views)))
    elif views:
        predictions = ((score, None, None, None, None) for score in engine.score(np.stack(views)))
    return [
        Verdict(picture.name, UNREADABLE, threshold, problem=picture.problem)
        if picture.view is None
        else replace(_verdict(picture, Prediction(*next(predictions)), engine, threshold), note=picture.note)
        for picture in pictures
    ]


def _verdict(picture: Picture, prediction: Prediction, engine: Engine, threshold: float) -> Verdict:
    """The verdict on one picture, by its own part of a batch's prediction; all but its score may be None."""
    score, has_maps = float(prediction.score), prediction.anomaly_map is not None
    # Of the single maps, too: the fused one takes what lies below 0 as 0, in OpenVINO also what is no number.
    drawn = (prediction.anomaly_map, prediction.branch_maps) if has_maps else ()
    if not math.isfinite(score) or not all(np.isfinite(maps).all() for maps in drawn):
        what = "an anomaly map" if math.isfinite(score) else f"a score ({score})"
        problem = f"the model gives {what} that is not finite; export it again"
        return Verdict(picture.name, UNDECIDED, threshold, score, problem=problem)
    verdict = ANOMALOUS if score > threshold else NORMAL
    if not has_maps:
        return Verdict(picture.name, verdict, threshold, score)
    contributions = dict(zip(engine.branches, map(float, prediction.branch_scores)))
    maps, histogram = dict(zip(engine.branches, prediction.branch_maps)), engine.metadata.get("histogram")
    alarm = max(contributions, key=contributions.__getitem__)
    unusual = maximum_of(maps[alarm] if maps[alarm].any() else prediction.anomaly_map, picture.size)
    drawing = None
    if (image := picture.shown) is not None:
        parts = label_overlay(image, prediction.label_map)
        heat = heat_overlay(image, explaining_map(maps, contributions), anomalous=verdict == ANOMALOUS)
        if verdict == ANOMALOUS and unusual is not None:
            image, heat = (ring(shown, unusual, picture.size) for shown in (image, heat))
        drawing = side_by_side(image, parts, heat)
    components = deviations(prediction.label_map, histogram, names_of(engine.metadata)) if histogram else ()
    return Verdict(
        picture.name,
        verdict,
        threshold,
        score,
        contributions,
        alarm if verdict == ANOMALOUS else None,
        unusual,
        components,
        picture.size,
        legend_of(engine.metadata),
        drawing,
    )


def maximum_of(anomaly_map: np.ndarray, size: tuple[int, int]) -> tuple[int, int] | None:
    """x and y of a map's maximum, (64, 64), in the pixels of an image of that width and height; None if the map is empty."""
    if not anomaly_map.any():
        return None
    row, column = np.unravel_index(anomaly_map.argmax(), anomaly_map.shape)
    return int((column + 0.5) * size[0] / MAP_SIZE), int((row + 0.5) * size[1] / MAP_SIZE)
