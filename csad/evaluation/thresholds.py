"""The score over which an image is called anomalous, and what it promises (docs/beyond.md). NumPy only."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from csad.errors import UserError

import numpy as np

FALSE_POSITIVE_RATE = 0.01  # of good images, over the threshold that a model suggests


class Threshold(NamedTuple):
    """A score over which an image is called anomalous."""

    value: float  # the score
    target_fpr: float  # the fraction of good images that may lie over it
    # The fraction that so many validation images guarantee, in expectation over their choice.
    guaranteed_fpr: float
    images: int  # number of validation images

    @property
    def is_met(self) -> bool:
        """Whether the target is guaranteed."""
        return self.guaranteed_fpr <= self.target_fpr + 1e-12

    @property
    def description(self) -> str:
        """What the threshold promises, for people; in expectation over the choice of the validation images."""
        count, of = _ratio(self.guaranteed_fpr)
        text = f"about {count} good part{'s' * (count > 1)} in {of} may be rejected"
        if self.guaranteed_fpr >= 1:
            text = "every good part may be rejected"
        if self.is_met:
            return text
        if not self.target_fpr:
            return f"{text}; no number of good validation pictures would allow none"
        count, of = _ratio(self.target_fpr)
        needed = math.ceil(1 / self.target_fpr - 1e-9) - 1
        return f"{text}; {needed} good validation picture{'s' * (needed != 1)} would allow {count} in {of}"


def _ratio(fraction: float) -> tuple[int, int]:
    """A fraction, 0 < fraction <= 1, as people count: 1 in 12, 40 in 100."""
    of = round(1 / fraction)
    return (1, of) if of >= 10 or abs(of * fraction - 1) < 0.02 else (round(100 * fraction), 100)


def choose_threshold(validation: np.ndarray, rate: float = FALSE_POSITIVE_RATE) -> Threshold:
    """The order statistic of the validation scores over which, in expectation, at most a fraction ``rate`` of good images lies.

    With n scores that is the ceil((n + 1)(1 - rate))-th smallest one (split conformal prediction); where n is too small for
    the rate it is the largest, which promises 1 / (n + 1).

    Raises:
        ValueError: no score, one that is not finite, or a rate outside of 0..1.
    """
    scores = np.sort(np.asarray(validation, dtype=np.float64))
    if scores.size == 0 or not np.isfinite(scores).all():
        raise ValueError("a threshold needs at least one validation score, and all of them finite")
    if not 0 <= rate <= 1:
        raise ValueError(f"a rate of {rate} does not lie between 0 and 1")
    n = scores.size
    rank = min(max(math.ceil((n + 1) * (1 - rate) - 1e-9), 1), n)
    return Threshold(float(scores[rank - 1]), rate, 1 - rank / (n + 1), n)


def threshold_of(
    metadata: dict[str, Any], value: float | None, rate: float | None, model: str
) -> tuple[float, str | None]:
    """The threshold to judge by, and what it promises in words; None where it was given as a number.

    Args:
        metadata: of the model.
        value: a threshold of the user's own.
        rate: fraction of good images that may be called anomalous; None: what the model says.

    Raises:
        UserError: a number is not finite, the rate is no fraction, or the model does not know its validation scores.
    """
    if value is not None:
        return finite(value, "--threshold"), None
    if rate is None and metadata.get("threshold") is not None:
        return finite(metadata["threshold"], f"the threshold in {model}"), metadata.get(
            "threshold_words", "set in the model"
        )
    threshold = threshold_for(
        metadata, FALSE_POSITIVE_RATE if rate is None else fraction(rate, "--false_positive_rate"), model
    )
    return threshold.value, threshold.description


def threshold_image(metadata: dict[str, Any]) -> str | None:
    """The validation image whose score is the threshold in a model's metadata, from its category's folder on.

    None where the threshold is no image's score, or the model does not know the images.
    """
    by_score = dict(zip(metadata.get("validation_scores", []), metadata.get("validation_images", [])))
    return by_score.get(metadata.get("threshold"))


def threshold_for(metadata: dict[str, Any], rate: float, model: str) -> Threshold:
    """The threshold for a rate, from the validation scores in a model's metadata; errors as of `threshold_of`."""
    if not len(metadata.get("validation_scores", [])):
        raise UserError(
            f"{model} does not know the scores of validation images; name a --threshold, set one with "
            "export_model.py --set_threshold, or export it again from the stages' files"
        )
    try:
        return choose_threshold(np.array(metadata["validation_scores"]), rate)
    except ValueError as problem:
        raise UserError(f"{model}: {problem}; export it again") from problem


def fraction(rate: float, what: str) -> float:
    """The rate itself; UserError if it does not lie between 0 and 1."""
    if not 0 < rate < 1:
        raise UserError(f"{what} is {rate}; it must lie between 0 and 1")
    return rate


def finite(value: float, what: str) -> float:
    """The value itself; UserError if it is not finite."""
    if not math.isfinite(value):
        raise UserError(f"{what} is {value}; it must be a finite number")
    return value
