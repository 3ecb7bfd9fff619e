"""The plots of docs/results.md, as SVG; the same content gives the same bytes with the same matplotlib."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from csad.branches import BRANCHES
from csad.evaluation.metrics import mean_known
from csad.evaluation.scores import FUSED

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from benchmarks import all_stages
from benchmarks import few_images as few
from benchmarks.few_images import KINDS, TITLES

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType  # since 3.10

# Okabe and Ito's colours, which can be told apart by everyone.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE: dict[RcKeyType, Any] = {
    "font.size": 11,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e0e0e0",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "csad",
}
BRANCH_COLOURS = dict(zip(BRANCHES, COLOURS)) | {FUSED: "#000000"}
MARKERS = {"torch": "o", "onnx": "s", "openvino": "D"}
RUNTIMES = {"torch": "PyTorch", "onnx": "onnxruntime", "openvino": "OpenVINO"}
RUNTIME_COLOURS = {"torch": "#D55E00", "onnxruntime": "#0072B2", "openvino": "#009E73"}
PEER_COLOUR = "#555555"


@contextmanager
def figure(width: float, height: float, columns: int = 1) -> Iterator[tuple[Figure, Any]]:
    """A figure on white with axes beside each other, all in one style."""
    with matplotlib.rc_context(STYLE):
        drawn = Figure((width, height), facecolor="white", layout="constrained")
        yield drawn, drawn.subplots(1, columns, squeeze=False)[0]


def svg(drawn: Figure) -> bytes:
    content = io.BytesIO()
    drawn.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()


def legend_below(drawn: Figure, axis: Any) -> None:
    """One legend for axes that show the same things."""
    handles, labels = axis.get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=len(labels))


def roc(content: dict[str, Any]) -> bytes:
    """ROC curves of each branch and the sum, averaged over the categories at equal false-positive rates.

    Args:
        content: "false_positive_rates" (n), and "roc": branch -> kind -> true-positive rates (n), both 0..1.
    """
    with figure(9.6, 4.6, 2) as (drawn, axes):
        for axis, kind in zip(axes, KINDS):
            for branch, curves in content["roc"].items():
                if kind not in curves:
                    continue
                axis.plot(
                    content["false_positive_rates"],
                    curves[kind],
                    color=BRANCH_COLOURS[branch],
                    label=TITLES[branch],
                    linewidth=2.6 if branch == FUSED else 1.6,
                )
            axis.plot([0, 1], [0, 1], color="#aaaaaa", linestyle=":", linewidth=1)
            axis.set(
                title=f"{kind} anomalies",
                xlabel="false-positive rate",
                ylabel="true-positive rate",
                xlim=(-0.01, 1.01),
                ylim=(0, 1.02),
                aspect="equal",
            )
        legend_below(drawn, axes[0])
        return svg(drawn)


def few_images(content: dict[str, Any]) -> bytes:
    """Image AUROC over the number of training images, mean and standard deviation over draws, averaged over categories."""
    rows = content["rows"]
    counts = sorted({row["images"] for row in rows})
    with figure(9.6, 4.4, 2) as (drawn, axes):
        for axis, kind in zip(axes, KINDS):
            for number, branch in enumerate(TITLES):
                spreads = [
                    few.spread([row for row in rows if row["images"] == count], branch, kind)
                    for count in counts
                ]
                shown = [(count, *both) for count, both in zip(counts, spreads) if both]
                if not shown:
                    continue
                x, mean, std = np.array(shown).T
                axis.errorbar(
                    x * 1.015 ** (number - 2),  # beside each other
                    mean,
                    std,
                    color=BRANCH_COLOURS[branch],
                    label=TITLES[branch],
                    marker="o",
                    markersize=4,
                    capsize=3,
                    linewidth=2.6 if branch == FUSED else 1.4,
                    elinewidth=1,
                )
            axis.set(
                title=f"{kind} anomalies", xlabel="training images", ylabel="image AUROC, %", xscale="log"
            )
            axis.set_ylim(top=101)
            axis.set_xticks(counts, [str(count) for count in counts])
            axis.minorticks_off()
        legend_below(drawn, axes[0])
        return svg(drawn)


def tradeoff(content: dict[str, Any]) -> bytes:
    """Image AUROC, mean of both kinds over the categories, against images per second at batch 1.

    Args:
        content: rows of benchmarks.peers.
    """
    return speed_against_auroc(tradeoff_points(content["rows"]), 1)


def speeds(rows: Sequence[dict[str, Any]]) -> bytes:
    """Mean image AUROC against images per second of rows of benchmarks.speed, which have one batch size; ours are filled."""
    points = [
        {
            "title": f"{row['graph']}, {row['runtime']} {row['precision']}",
            "speed": row["images_per_second"],
            "auroc": row["auroc_mean"],
            "ours": row["graph"] == "ours",
            "colour": RUNTIME_COLOURS[row["runtime"]],
            "marker": "o",
        }
        for row in rows
    ]
    return speed_against_auroc(sorted(points, key=lambda point: -point["speed"]), rows[0]["batch"])


def speed_against_auroc(points: Sequence[dict[str, Any]], batch: int) -> bytes:
    """Points with a numbered key beside them."""
    with figure(10.5, max(4.4, 0.27 * len(points) + 0.8)) as (drawn, (axis,)):
        for number, point in enumerate(points, start=1):
            axis.scatter(
                point["speed"],
                point["auroc"],
                s=70,
                marker=point["marker"],
                facecolor=point["colour"] if point["ours"] else "white",
                edgecolor=point["colour"],
                linewidth=1.8,
                zorder=3,
                label=f"{number}  {point['title']}: {point['auroc']:.1f}",
            )
            offset = (0, 8 if number % 2 else -17)
            axis.annotate(
                str(number), (point["speed"], point["auroc"]), offset, textcoords="offset points", ha="center"
            )
        xlabel = f"images per second, batch {batch} (logarithmic)"
        axis.set(xscale="log", xlabel=xlabel, ylabel="mean image AUROC, %")
        low = min(point["speed"] for point in points) / 1.3
        high = max(point["speed"] for point in points) * 1.3
        ticks = [step * 10.0**power for power in range(-2, 5) for step in (1, 2, 5)]
        ticks = [tick for tick in ticks if low <= tick <= high]
        axis.set_xlim(low, high)
        axis.margins(y=0.15)
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        drawn.legend(loc="outside right center", fontsize=9.5)
        return svg(drawn)


def tradeoff_points(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One point per method or model that all categories have been timed and measured for, the best first."""
    categories = {row["category"] for row in rows}
    points = []
    for method in dict.fromkeys(row["method"] for row in rows):
        of_method = [row for row in rows if row["method"] == method and "1" in row.get("ms_per_image", {})]
        aurocs = [[row[f"auroc_{kind}"] for row in of_method] for kind in KINDS]
        means = [mean for mean in map(mean_known, aurocs) if np.isfinite(mean)]
        if {row["category"] for row in of_method} != categories or not means:
            continue
        first = of_method[0]
        alone = first.get("alone") or FUSED
        points.append(
            {
                "title": f"{TITLES[alone]}, {RUNTIMES[first['format']]} {first['precision']}"
                if first["ours"]
                else f"anomalib: {first['title']}",
                "speed": 1000 / float(np.mean([row["ms_per_image"]["1"] for row in of_method])),
                "auroc": float(np.mean(means)),
                "ours": first["ours"],
                "colour": BRANCH_COLOURS[alone] if first["ours"] else PEER_COLOUR,
                "marker": MARKERS[first["format"]] if first["ours"] else "^",
            }
        )
    return sorted(points, key=lambda point: -point["auroc"])


def training_time(content: dict[str, Any]) -> bytes:
    """Seconds of each stage, one bar per category, of the first seed.

    Args:
        content: "seconds": seed -> category -> stage -> seconds.
    """
    seconds = next(iter(content["seconds"].values()))
    with figure(9.6, 0.5 * len(seconds) + 1.7) as (drawn, (axis,)):
        left = np.zeros(len(seconds))
        for (stage, title), colour in zip(all_stages.TITLES.items(), COLOURS):
            widths = np.array([stages.get(stage, 0) for stages in seconds.values()])
            axis.barh(list(seconds), widths, left=left, color=colour, label=title, height=0.62)
            left += widths
        for y, total in enumerate(left):
            axis.text(total, y, f"  {total:.0f} s", va="center")
        axis.invert_yaxis()
        axis.grid(False, axis="y")
        axis.set_xlim(right=1.1 * left.max())
        axis.set_xlabel("seconds, stages in processes of their own")
        drawn.legend(loc="outside upper center", ncols=3)
        return svg(drawn)
