"""Small SVG figures that take their colours from the page's style sheet, so that they follow light and dark mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

_WIDTH, _HEIGHT = 360, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 10, 38
_BINS = 28
_TICKS = (0, 0.25, 0.5, 0.75, 1)  # along both axes


def roc(good: Mapping[str, np.ndarray], anomalous: Mapping[str, np.ndarray], label: str) -> Markup:
    """ROC curves of several scores; the keys become the lines' CSS classes.

    Args:
        good, anomalous: per score (n,) and (m,) values, higher = more anomalous.
        label: what the figure shows, for readers who cannot see it.
    """
    from sklearn.metrics import roc_curve

    parts = [
        _frame(
            "fraction of good pictures rejected", "fraction of defects found", [f"{x:.2f}" for x in _TICKS]
        ),
        f'<line class="chance" x1="{_x(0)}" y1="{_y(0)}" x2="{_x(1)}" y2="{_y(1)}"/>',
    ]
    for name, normal in good.items():
        labels = np.r_[np.zeros(len(normal)), np.ones(len(anomalous[name]))]
        false_rate, true_rate, _ = roc_curve(labels, np.r_[normal, anomalous[name]])
        points = " ".join(f"{_x(x):.1f},{_y(y):.1f}" for x, y in zip(false_rate, true_rate))
        parts.append(f'<polyline class="line {name}" points="{points}"/>')
    return _figure(parts, label)


def histograms(scores: Mapping[str, np.ndarray], threshold: float, label: str) -> Markup:
    """Fraction of images over score, one outline per kind; the keys become CSS classes.

    The axis is wide at the threshold and closer the farther away (asinh), so that one score of 640 leaves the others apart.
    """
    unit = _unit(scores, threshold)
    scaled = {name: np.arcsinh((values - threshold) / unit) for name, values in scores.items()}
    everything = np.concatenate([*scaled.values(), [0.0]])
    low, high = min(float(everything.min()), -1.0), max(float(everything.max()), 1.0)
    edges = np.linspace(low, high, _BINS + 1)
    fractions = {
        name: np.histogram(values, edges)[0] / max(len(values), 1) for name, values in scaled.items()
    }
    top = max(fraction.max() for fraction in fractions.values()) or 1
    ticks = [_short(threshold + unit * float(np.sinh(low + fraction * (high - low)))) for fraction in _TICKS]
    parts = [_frame("score, widest near the threshold", "fraction of images", ticks, top)]
    for name, fraction in fractions.items():
        corners = zip(np.repeat(edges, 2), np.r_[0, np.repeat(fraction, 2), 0])
        points = " ".join(f"{_x((x - low) / (high - low)):.1f},{_y(y / top):.1f}" for x, y in corners)
        parts.append(f'<polygon class="area {name}" points="{points}"/>')
    x = _x(-low / (high - low))
    parts.append(f'<line class="threshold" x1="{x:.1f}" y1="{_y(0)}" x2="{x:.1f}" y2="{_y(1)}"/>')
    anchor, shift = ("start", 4) if -low / (high - low) < 0.7 else ("end", -4)
    parts.append(
        f'<text class="threshold-text" x="{x + shift:.1f}" y="{_TOP + 11}" text-anchor="{anchor}">'
        f"threshold {_short(threshold)}</text>"
    )
    return _figure(parts, label)


def _unit(scores: Mapping[str, np.ndarray], threshold: float) -> float:
    """The score's distance from the threshold up to which the axis is linear: half of what is usual for good images."""
    distances = np.abs(scores.get("good", next(iter(scores.values()))) - threshold)
    unit = float(np.median(distances)) / 2 if distances.size else 0.0
    return unit if unit > 1e-9 * max(1.0, abs(threshold)) else max(1.0, abs(threshold))


def _short(value: float) -> str:
    return (
        f"{value:.2g}" if 1e-3 <= abs(value) < 100 else f"{value:.0f}" if abs(value) < 1e5 else f"{value:.0e}"
    )


def _frame(across: str, up: str, ticks: Sequence[str], top: float = 1) -> str:
    """Axes and grid; ``ticks`` stand below, and upwards fractions from 0 to ``top``, 1 at most."""
    parts = []
    for fraction, below in zip(_TICKS, ticks):
        x, y = _x(fraction), _y(fraction)
        parts.append(
            f'<line class="grid" x1="{x}" y1="{_y(0)}" x2="{x}" y2="{_y(1)}"/>'
            f'<line class="grid" x1="{_x(0)}" y1="{y}" x2="{_x(1)}" y2="{y}"/>'
            f'<text x="{x}" y="{_y(0) + 14}" text-anchor="middle">{below}</text>'
            f'<text x="{_x(0) - 5}" y="{y + 3}" text-anchor="end">{fraction * top:.2f}</text>'
        )
    parts.append(
        f'<text x="{_x(0.5)}" y="{_HEIGHT - 5}" text-anchor="middle">{across}</text>'
        f'<text transform="translate(11 {_y(0.5)}) rotate(-90)" text-anchor="middle">{up}</text>'
    )
    return "".join(parts)


def _x(fraction: float) -> float:
    return _LEFT + fraction * (_WIDTH - _LEFT - _RIGHT)


def _y(fraction: float) -> float:
    return _HEIGHT - _BOTTOM - fraction * (_HEIGHT - _TOP - _BOTTOM)


def _figure(parts: list[str], label: str) -> Markup:
    template = Markup('<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>')
    return template.format(_WIDTH, _HEIGHT, label, Markup("".join(parts)))
