"""Which parts of a model int8 can have: as much as possible while the scores stay those of fp32.

Quantising everything moves borders of the label map, and the patch histogram weighs single pixels. So parts are taken back
into higher precision one after another, those first that cost least, until the scores agree with fp32's on good images and
on anomalies made from them. Test images decide nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from csad.evaluation.metrics import auroc
from csad.evaluation.thresholds import choose_threshold
from csad.inference.engines import Engine

import numpy as np

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
        movement = float(np.abs(scores - self.scores)[near].mean() / max(self.spread, MIN_SPREAD))
        return Agreement(points, movement)


class Agreement(NamedTuple):
    """How far the scores of a quantised model are from those of fp32; infinitely where one is not finite."""

    points: float  # of AUROC
    movement: float  # mean difference of the scores near the threshold, in standard deviations of the good images' scores

    @property
    def suffices(self) -> bool:
        return self.points <= TOLERATED_POINTS and self.movement <= TOLERATED_MOVEMENT

    def __str__(self) -> str:
        return f"AUROC moves by {self.points:.2f} points, scores near the threshold by {self.movement:.2f} standard deviations"


def quantise(
    build: Callable[[tuple[str, ...]], tuple[Any, Engine]], check: Check, say: Callable[[str], None]
) -> tuple[Any, list[str], Agreement]:
    """Take parts back into higher precision until the scores agree.

    Args:
        build: beginnings of node names to keep -> quantised model and an engine that runs it.
        say: told what every attempt came to.

    Returns:
        The first model that agrees (else the last one), the names of the parts in higher
        precision, and how well its scores agree.
    """
    in_higher_precision: list[str] = []
    prefixes: tuple[str, ...] = ()
    for name, beginnings in FALLBACK_ORDER:
        in_higher_precision, prefixes = [*in_higher_precision, name], prefixes + beginnings
        model, engine = build(prefixes)
        agreement = check.agreement(engine)
        say(f"int8 with {', '.join(in_higher_precision)} in higher precision: {agreement}")
        if agreement.suffices:
            break
    return model, in_higher_precision, agreement
