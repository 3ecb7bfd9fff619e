"""How much of each component good images hold, for people to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from models.constants import QUARTERS


def area_statistics(parameters: Mapping[str, np.ndarray], classes: int) -> dict[str, list[Any]]:
    """Mean and std of every class's area fraction on the training images, background included, for people to read.

    They follow from the detector's parameters alone, so that published parameter files have them, too: the covariance is
    the pseudo-inverse of its pseudo-inverse, and background is what the components leave.

    Args:
        parameters: the arrays of `models.patch_histogram.fit_parameters`.
        classes: components and background.

    Returns:
        ``mean`` and ``std``, C fractions of the image each; ``quarter_mean`` and ``quarter_std``, 4 lists of C
        fractions of each quarter, in docs/method.md's order.
    """
    statistics = {}
    for name, title, groups in (("hist", "", 1), ("patch_hist", "quarter_", QUARTERS)):
        mean = np.array(parameters[f"{name}_mean"], dtype=np.float64).reshape(groups, classes)
        mean[:, 0] = 1 - mean[:, 1:].sum(1)
        inverse = np.asarray(parameters[f"{name}_invcov"], dtype=np.float64)
        covariance = np.linalg.pinv(inverse, hermitian=True)
        own = [slice(first, first + classes) for first in range(0, groups * classes, classes)]
        blocks = [covariance[part, part] for part in own]
        variance = np.array([[block[1:, 1:].sum(), *np.diag(block)[1:]] for block in blocks])
        std = np.sqrt(variance.clip(min=0))
        for kind, values in (("mean", mean), ("std", std)):
            statistics[f"{title}{kind}"] = (values if groups > 1 else values[0]).tolist()
    return statistics
