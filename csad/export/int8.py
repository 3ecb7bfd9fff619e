"""An int8 export of a category: by which images it is quantised, and by which it is judged (`csad.export.quantisation`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from csad.data import images, layouts
from csad.data.listing import count as counted
from csad.errors import UserError
from csad.export import quantisation
from csad.export.exported_thresholds import require_finite
from csad.inference.engines import Engine, as_input, read_for
from csad.training.logical_synthesis import label_parts, synthesise

import numpy as np

CALIBRATION_IMAGES = 64


def calibration_images(category: layouts.Category, metadata: dict[str, Any]) -> np.ndarray:
    """Training images, evenly spread over the sorted list, as the model takes them."""
    paths = category.train
    spread = paths[:: math.ceil(len(paths) / CALIBRATION_IMAGES)]
    view = images.View(metadata["input_size"], metadata.get("white_level"))
    return as_input(view.read(spread, f"{category.name}: read training images"), metadata)


def choose_int8(
    build: Callable[[tuple[str, ...]], tuple[Any, Engine]],
    category: layouts.Category,
    fp32: Engine,
    paste_distance: float,
    seed: int,
) -> tuple[Any, dict[str, Any]]:
    """Quantise as much as agrees with fp32; returns the model and what its metadata should say.

    Args:
        build: quantises all but the nodes whose names begin in one of the ways it is given.

    Raises:
        UserError: no quantised model agrees, or good images give nothing to measure agreement by.
    """
    check, count = make_check(category, fp32, paste_distance, seed), len(category.validation)
    if check.spread < quantisation.MIN_SPREAD:
        alike = "a single image has" if count == 1 else f"{count} images with the same score have"
        raise UserError(
            f"{category.name}: what int8 does to the scores is measured in standard deviations of the "
            f"validation images' scores, and {alike} none; add validation images, or take another --precision"
        )
    model, kept, moved = quantisation.quantise(build, check, lambda line: print(f"{category.name}: {line}"))
    if not moved.suffices:
        raise UserError(
            f"{category.name}: int8 changes the scores more than it should ({moved}, on "
            f"{counted(count, 'validation image')}), so the model is not exported and an earlier one stays "
            "as it is; take another --precision"
        )
    return model, {"precision": "int8", "kept_in_higher_precision": kept, "agreement": moved._asdict()}


def make_check(
    category: layouts.Category, fp32: Engine, paste_distance: float, seed: int
) -> quantisation.Check:
    """Validation images, and one anomaly made from each by logical synthesis, with their fp32 scores."""
    good = read_for(fp32, category.validation, f"{category.name}: read validation images")
    rng = np.random.default_rng(seed)
    anomalies, scores = [], []
    for image in good:
        prediction = fp32.predict(image[None])
        scores.append(prediction.score)
        anomaly = paste_component(image, prediction.label_map[0], rng, paste_distance)
        if anomaly is not None:
            anomalies.append(anomaly)
    if count := len(good) - len(anomalies):
        print(
            f"{category.name}: in {count} of {counted(len(good), 'picture')} no component could be pasted elsewhere, so no "
            "synthetic defect is made of them"
        )
    scores += [fp32.score(image[None]) for image in anomalies]
    require_finite(np.concatenate(scores), category.name, "int8 cannot be measured")
    pictures = np.concatenate([good, *(image[None] for image in anomalies)])
    return quantisation.Check(pictures, np.concatenate(scores), np.arange(len(pictures)) < len(good))


def paste_component(
    image: np.ndarray, label_map: np.ndarray, rng: np.random.Generator, paste_distance: float
) -> np.ndarray | None:
    """A logical anomaly made from a good image (3, S, S) by logical synthesis, or two; None where nothing could be pasted.

    Args:
        label_map: of the image, (256, 256).
    """
    factor = image.shape[-1] // images.SIZE
    label_map = np.kron(label_map, np.ones((factor, factor), np.uint8))
    # Anywhere in the image will do: here a component that hangs in the air is an anomaly like any other.
    picture, anywhere = image.transpose(1, 2, 0), np.zeros(label_map.shape, dtype=bool)
    synthesis = synthesise(picture, label_map, label_parts(label_map), anywhere, rng, paste_distance)
    return synthesis.image.transpose(2, 0, 1) if synthesis.pasted else None
