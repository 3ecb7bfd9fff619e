"""What an exported model scores the test images, one by one: a table, AUROCs, milliseconds, the difference from PyTorch."""

from __future__ import annotations

import csv
import io
import math
import time
from pathlib import Path

from csad.data import files, layouts
from csad.data.workspace import Workspace
from csad.errors import UserError
from csad.evaluation.metrics import auroc, mean_known
from csad.evaluation.thresholds import threshold_image
from csad.inference.engines import Engine, read_for
from csad.progress import ProgressBar

import numpy as np

WARM_UP = 3  # images scored before the clock counts


def evaluate(
    category: layouts.Category, engine: Engine, workspace: Workspace, format: str, precision: str
) -> dict:
    """Score every test image one by one, as a production line would; write the CSV and the JSON beside it.
    UserError if a score is not finite."""
    rows, seconds, preparing = [], [], []
    scores: dict[str, list[float]] = {split: [] for split in layouts.SPLITS}
    what = f"{category.name}: evaluate {engine.runtime}"
    for split, path in ProgressBar(category.test_images, desc=what, unit="image"):
        start = time.perf_counter()
        image = read_for(engine, [path])
        between = time.perf_counter()
        score = float(engine.score(image)[0])
        seconds.append(time.perf_counter() - between)
        preparing.append(between - start)
        if not math.isfinite(score):
            raise UserError(
                f"{category.name}: the {engine.runtime} model gives {path.name} a score that is not finite; "
                "export it again"
            )
        scores[split].append(score)
        rows.append((path.relative_to(category.root).as_posix(), split, repr(score)))

    good, logical, structural = (np.array(scores[split]) for split in layouts.SPLITS)
    aurocs = [auroc(good, logical), auroc(good, structural)]
    target = workspace.evaluation(category.name, format, precision)
    report = {
        "category": category.name,
        "format": format,
        "precision": precision,
        "runtime": engine.runtime,
        "ran_in": engine.precision,
        "networks": engine.networks,
        "branches": engine.branches,
        "auroc_logical": aurocs[0],
        "auroc_structural": aurocs[1],
        "auroc_mean": mean_known(aurocs),
        "ms_per_image": _median_ms(seconds),
        "preprocessing_ms": _median_ms(preparing),
        "largest_difference": 0.0
        if (format, precision) == ("torch", "fp32")
        else largest_difference(rows, engine, workspace.evaluation(category.name, "torch")),
        "kept_in_higher_precision": engine.metadata.get("kept_in_higher_precision", []),
        "images": len(rows),
        "threshold": engine.metadata.get("threshold"),
        "threshold_image": threshold_image(engine.metadata),
        "dataset": category.root.resolve().parent.name,
        "device": engine.device,
        "stand_ins": engine.metadata.get("stand_ins", []),
        "chosen_on_test": engine.metadata.get("chosen_on_test", []),
    }

    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("image", "split", "score"))
    writer.writerows((files.to_csv_text(image), split, score) for image, split, score in rows)
    files.write_text(target, table.getvalue())
    files.write_json(target.with_suffix(".json"), report | {"model": engine.metadata})
    return report


def largest_difference(rows: list[tuple[str, str, str]], engine: Engine, reference: Path) -> float | None:
    """Of any score from the torch fp32 model's, or None where that model, or its evaluation, is not at hand."""
    if not reference.exists() or not reference.with_suffix(".json").exists():
        return None
    evaluated = files.read_json(reference.with_suffix(".json"), keys={"model": dict})["model"]
    if any(evaluated.get(key) != engine.metadata.get(key) for key in ("weights", "branch_weights")):
        return None  # the torch model was made anew and not evaluated since, or the other way round
    expected = files.read_scores(reference)
    differences = (abs(float(score) - expected[image]) for image, _, score in rows if image in expected)
    return max(differences, default=None)


def _median_ms(seconds: list[float]) -> float:
    return 1000 * float(np.median(seconds[WARM_UP:] or seconds))
