"""Figures of several seeds as mean and standard deviation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from csad.data.listing import count
from csad.evaluation.metrics import mean_known

import numpy as np


class Figure(NamedTuple):
    """A number over several seeds."""

    mean: float
    std: float  # divisor n - 1; NaN for a single seed
    note: str = ""  # of how many it is, where some were not measured


def over_seeds(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Figure]]:
    """Mean and standard deviation (divisor n - 1; NaN for a single seed) of every number.

    Args:
        runs: per seed, {category: nested dictionaries with numbers for leaves}; leaves that are no numbers are left out.

    Returns:
        {category: {"outer inner": figure}}, at the end with the category "average": each seed's average over
        the categories, then mean and deviation of those. What is not finite was not measured and does not count.
    """
    flat = [{category: _numbers(content) for category, content in run.items()} for run in runs]
    for run in flat:
        shared = [
            name for name in next(iter(run.values())) if all(name in numbers for numbers in run.values())
        ]
        run["average"] = {name: mean_known(numbers[name] for numbers in run.values()) for name in shared}
    figures = {
        category: {
            name: _figure([run[category][name] for run in flat])
            for name in numbers
            if all(name in run[category] for run in flat)
        }
        for category, numbers in flat[0].items()
    }
    for name, figure in figures["average"].items():
        counts = [
            sum(math.isfinite(run[category][name]) for category in run if category != "average")
            for run in flat
        ]
        if min(counts) < len(flat[0]) - 1:
            figures["average"][name] = figure._replace(
                note=f"{min(counts)} of {count(len(flat[0]) - 1, 'category')}"
            )
    return figures


def _figure(values: list[float]) -> Figure:
    measured = [value for value in values if math.isfinite(value)]
    return Figure(
        mean_known(measured),
        float(np.std(measured, ddof=1)) if len(measured) > 1 else float("nan"),
        f"{len(measured)} of {count(len(values), 'seed')}" if len(measured) < len(values) else "",
    )


def table(figures: dict[str, dict[str, Figure]], seeds: Sequence[int]) -> list[str]:
    """The lines of a table of `over_seeds`, one number per line."""
    width = max(len(name) for numbers in figures.values() for name in numbers)
    lines = [f"mean and standard deviation over seeds {', '.join(map(str, seeds))}", ""]
    for category, numbers in figures.items():
        lines += [
            f"{category:24}{name:{width}}{mean:12.3f} ± {std:.3f}" + (f" ({note})" if note else "")
            for name, (mean, std, note) in numbers.items()
        ]
    return lines


def _numbers(content: dict[str, Any], prefix: str = "") -> dict[str, float]:
    numbers: dict[str, float] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            numbers |= _numbers(value, f"{prefix}{key} ")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            numbers[f"{prefix}{key}"] = float(value)
    return numbers
