"""The figure of `benchmarks.speed` as SVG."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np


def scatter(rows: list[dict], filled: Collection[str]) -> str:
    """Latency on a logarithmic axis to the right, AUROC upwards, a numbered key beside it.

    Args:
        rows: the results of one batch size, all with an AUROC.
        filled: graphs whose marks are filled.
    """
    width, height, left, top, right, bottom = 860, 400, 64, 24, 330, 52
    across, up = width - left - right, height - top - bottom
    fastest, slowest = (f(row["ms_per_image"] for row in rows) for f in (min, max))
    low, high = np.log10(fastest / 1.4), np.log10(slowest * 1.4)
    worst, best = (f(row["auroc_mean"] for row in rows) for f in (min, max))
    floor, ceiling = worst - max(0.25, 0.2 * (best - worst)), best + max(0.25, 0.2 * (best - worst))
    colours = {"torch": "#c2410c", "onnxruntime": "#1d4ed8", "openvino": "#15803d"}

    def position(row: dict) -> tuple[float, float]:
        return (
            left + across * (np.log10(row["ms_per_image"]) - low) / (high - low),
            top + up * (ceiling - row["auroc_mean"]) / (ceiling - floor),
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<rect x="{left}" y="{top}" width="{across}" height="{up}" fill="none" stroke="#888"/>',
    ]
    for value in [step * 10.0**power for power in range(-2, 5) for step in (1, 2, 5)]:
        if low <= np.log10(value) <= high:
            x = left + across * (np.log10(value) - low) / (high - low)
            parts += [
                f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{top + up}" stroke="#ddd"/>',
                f'<text x="{x:.1f}" y="{top + up + 17}" text-anchor="middle">{value:g}</text>',
            ]
    for value in np.linspace(floor, ceiling, 5)[1:-1]:
        y = top + up * (ceiling - value) / (ceiling - floor)
        parts += [
            f'<line x1="{left}" y1="{y:.1f}" x2="{left + across}" y2="{y:.1f}" stroke="#ddd"/>',
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.2f}</text>',
        ]
    parts += [
        f'<text x="{left + across / 2}" y="{height - 12}" text-anchor="middle">ms per image, batch {rows[0]["batch"]}'
        " (logarithmic)</text>",
        f'<text transform="translate(14 {top + up / 2}) rotate(-90)" text-anchor="middle">mean image AUROC, %</text>',
    ]
    for number, row in enumerate(sorted(rows, key=lambda row: row["ms_per_image"]), start=1):
        (x, y), colour = position(row), colours[row["runtime"]]
        fill = colour if row["graph"] in filled else "white"
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{fill}" stroke="{colour}" stroke-width="2"/>',
            f'<text x="{x:.1f}" y="{y - 11 - 12 * (number % 4):.1f}" text-anchor="middle">{number}</text>',
        ]
        line = top + 8 + 22 * (number - 1)
        parts += [
            f'<circle cx="{width - right + 26}" cy="{line}" r="5" fill="{fill}" stroke="{colour}" stroke-width="2"/>',
            f'<text x="{width - right + 40}" y="{line + 4}">{number}  {row["graph"]}, {row["runtime"]} {row["precision"]}: '
            f"{row['ms_per_image']:.0f} ms</text>",
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"
