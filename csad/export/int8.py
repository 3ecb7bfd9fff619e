"""An int8 export of a category: as much of it as possible while the scores stay those of fp32.

Quantising everything moves borders of the label map, and the patch histogram weighs single pixels. So parts are taken back
into higher precision one after another, those first that cost least, until the scores agree with fp32's on good images and
on anomalies made from them. Test images decide nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from csad.data import images, layouts
from csad.data.listing import count as counted
from csad.errors import UserError
from csad.evaluation.metrics import auroc
from csad.evaluation.thresholds import choose_threshold
from csad.export.exported_thresholds import require_finite
from csad.inference.engines import Engine, as_input, read_for
from csad.training.logical_synthesis import label_parts, synthesise

import numpy as np

CALIBRATION_IMAGES = 64
# Cumulative. The student's trunk, three quarters of the published model's arithmetic, is int8 in any case. The output layers
# never are: what they give is subtracted from one another or compared, and eight bits of it moved the scores by ten standard
# deviations and more, while they are a twentieth of the arithmetic. Nor is the patch memory, which is no network.
FALLBACK_ORDER = (
    (
        "output layers",
        (
            "/lgst/student/heads/",
            "/lgst/teacher/",
            "/lgst/autoencoder/deconv8/",
            "/segmentor/network/fc2/conv3/",
        ),
    ),
    ("segmentor", ("/segmentor/",)),
    ("encoder", ("/encoder/",)),
    ("autoencoder", ("/lgst/autoencoder/",)),
)
TOLERATED_POINTS = 0.2  # of AUROC between good images and made anomalies
TOLERATED_MOVEMENT = 0.2  # of the good images' spread, by which scores near the threshold may move on average
MIN_SPREAD = 1e-6  # of the good images' scores: under it there is nothing to measure by
NEAR = 0.25  # of the images: those whose scores are nearest to the threshold, where a verdict could change


@dataclass(frozen=True)
class Check:
    """Scores, all finite, that a quantised model has to reproduce."""

    images: np.ndarray  # (N, 3, size, size) uint8
    scores: np.ndarray  # (N,) of fp32
    good: np.ndarray  # (N,) bool, or made anomalies

    @property
    def spread(self) -> float:
        """Standard deviation of the good images' scores, 0 for a single image."""
        return float(self.scores[self.good].std())

    def agreement(self, engine: Engine) -> Agreement:
        scores = np.concatenate([engine.score(image[None]) for image in self.images])
        if not np.isfinite(scores).all():
            return Agreement(float("inf"), float("inf"))
        good, points = self.good, 0.0
        if not good.all():
            points = abs(auroc(scores[good], scores[~good]) - auroc(self.scores[good], self.scores[~good]))
        threshold = choose_threshold(self.scores[good]).value
        near = np.argsort(np.abs(self.scores - threshold))[: max(round(NEAR * len(self.scores)), 1)]
        return Agreement(points, float(np.abs(scores - self.scores)[near].mean() / self.spread))


class Agreement(NamedTuple):
    """How far the scores of a quantised model are from those of fp32; infinitely where one is not finite."""

    points: float  # of AUROC
    movement: float  # mean difference of the scores near the threshold, in standard deviations of the good images' scores

    @property
    def suffices(self) -> bool:
        return self.points <= TOLERATED_POINTS and self.movement <= TOLERATED_MOVEMENT

    def __str__(self) -> str:
        return f"AUROC moves by {self.points:.2f} points, scores near the threshold by {self.movement:.2f} standard deviations"


def calibration_images(category: layouts.Category, metadata: dict[str, Any]) -> np.ndarray:
    """Training images, evenly spread over the sorted list, as the model takes them."""
    spread = category.train[:: math.ceil(len(category.train) / CALIBRATION_IMAGES)]
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
        build: see `quantise`.

    Raises:
        UserError: no quantised model agrees, or good images give nothing to measure agreement by.
    """
    check, count = make_check(category, fp32, paste_distance, seed), len(category.validation)
    if check.spread < MIN_SPREAD:
        alike = "a single image has" if count == 1 else f"{count} images with the same score have"
        raise UserError(
            f"{category.name}: what int8 does to the scores is measured in standard deviations of the "
            f"validation images' scores, and {alike} none; add validation images, or take another --precision"
        )
    model, kept, moved = quantise(build, check, category.name)
    if not moved.suffices:
        raise UserError(
            f"{category.name}: int8 changes the scores more than it should ({moved}, on "
            f"{counted(count, 'validation image')}), so the model is not exported and an earlier one stays "
            "as it is; take another --precision"
        )
    return model, {"precision": "int8", "kept_in_higher_precision": kept, "agreement": moved._asdict()}


def quantise(
    build: Callable[[tuple[str, ...]], tuple[Any, Engine]], check: Check, name: str
) -> tuple[Any, list[str], Agreement]:
    """Take parts back into higher precision until the scores agree, and say what every attempt comes to.

    Args:
        build: beginnings of node names to keep -> quantised model and an engine that runs it.
        name: of the category.

    Returns:
        The first model that agrees (else the last one), the names of the parts in higher
        precision, and how well its scores agree.
    """
    in_higher_precision: list[str] = []
    prefixes: tuple[str, ...] = ()
    for part, beginnings in FALLBACK_ORDER:
        in_higher_precision, prefixes = [*in_higher_precision, part], prefixes + beginnings
        model, engine = build(prefixes)
        agreement = check.agreement(engine)
        print(f"{name}: int8 with {', '.join(in_higher_precision)} in higher precision: {agreement}")
        if agreement.suffices:
            break
    return model, in_higher_precision, agreement


def make_check(category: layouts.Category, fp32: Engine, paste_distance: float, seed: int) -> Check:
    """Validation images, and one anomaly made from each by logical synthesis, with their fp32 scores."""
    good = read_for(fp32, category.validation, f"{category.name}: read validation images")
    factor, rng = good.shape[-1] // images.SIZE, np.random.default_rng(seed)
    anomalies, scores = [], []
    for image in good:
        prediction = fp32.predict(image[None])
        scores.append(prediction.score)
        label_map = np.kron(prediction.label_map[0], np.ones((factor, factor), np.uint8))
        # Anywhere in the image will do: here a component that hangs in the air is an anomaly like any other.
        parts, anywhere = label_parts(label_map), np.zeros(label_map.shape, bool)
        synthesis = synthesise(image.transpose(1, 2, 0), label_map, parts, anywhere, rng, paste_distance)
        if synthesis.pasted:
            anomalies.append(synthesis.image.transpose(2, 0, 1))
    if count := len(good) - len(anomalies):
        print(
            f"{category.name}: in {count} of {counted(len(good), 'picture')} no component could be pasted elsewhere, so no "
            "synthetic defect is made of them"
        )
    pictures = np.stack([*good, *anomalies])
    scores += [fp32.score(image[None]) for image in anomalies]
    require_finite(np.concatenate(scores), category.name, "int8 cannot be measured")
    return Check(pictures, np.concatenate(scores), np.arange(len(pictures)) < len(good))
