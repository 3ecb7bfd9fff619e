"""Figures of several seeds as mean and standard deviation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def over_seeds(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, tuple[float, float]]]:
    """Mean and standard deviation (divisor n - 1; NaN for a single seed) of every number.

    Args:
        runs: per seed, {category: nested dictionaries with numbers for leaves}; leaves that are no numbers are left out.

    Returns:
        {category: {"outer inner": (mean, std)}}, at the end with the category "average": each seed's average over
        the categories, then mean and deviation of those.
    """
    flat = [{category: _numbers(content) for category, content in run.items()} for run in runs]
    for run in flat:
        shared = [name for name in next(iter(run.values())) if all(name in numbers for numbers in run.values())]
        run["average"] = {name: float(np.mean([numbers[name] for numbers in run.values()])) for name in shared}
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for category in flat[0]:
        values = {name: [run[category][name] for run in flat] for name in flat[0][category]
                  if all(name in run[category] for run in flat)}
        found[category] = {name: (float(np.mean(one)), float(np.std(one, ddof=1)) if len(one) > 1 else float("nan"))
                           for name, one in values.items()}
    return found


def table(found: dict[str, dict[str, tuple[float, float]]], seeds: Sequence[int]) -> list[str]:
    """The lines of a table of `over_seeds`, one number per line."""
    width = max(len(name) for numbers in found.values() for name in numbers)
    lines = [f"mean and standard deviation over seeds {', '.join(map(str, seeds))}", ""]
    for category, numbers in found.items():
        lines += [f"{category:24}{name:{width}}{mean:12.3f} ± {std:.3f}" for name, (mean, std) in numbers.items()]
    return lines


def _numbers(content: dict[str, Any], prefix: str = "") -> dict[str, float]:
    found = {}
    for key, value in content.items():
        if isinstance(value, dict):
            found |= _numbers(value, f"{prefix}{key} ")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[f"{prefix}{key}"] = float(value)
    return found
