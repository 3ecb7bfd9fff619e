"""What the page says of a category besides its test images: metrics, curves, pseudo-labels, and how it was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from csad.branches import BRANCHES
from csad.data import files, images, layouts, records
from csad.data.workspace import Workspace
from csad.evaluation.deviations import title_of
from csad.evaluation.scores import FUSED
from csad.inference import overlays
from csad.report import figures
from csad.report.cards import QUALITY
from csad.report.cautions import component_caution
from csad.report.measured import Measured

import numpy as np

PSEUDO_LABELS = 8  # training images shown per category
PSEUDO_LABEL_SIDE, THRESHOLD_SIDE = 160, 250


def summary(measured: Measured, models: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything about a category but its test images; ``models`` are what all evaluated exports came to."""
    category, workspace = measured.category, measured.workspace
    contributions = measured.contributions()
    splits = {
        split.removesuffix("_anomalies"): {name: by[split] for name, by in contributions.items()}
        for split in layouts.SPLITS
        if category.test(split)
    }
    return {
        "name": category.name,
        "metrics": measured.metrics,
        "threshold": measured.threshold,
        "caution": component_caution(measured),
        "threshold_image": threshold_image(measured),
        "note": measured.histogram[1],
        "outcome": measured.outcome(),
        "branches": measured.branches,
        "images": {split: len(scores[FUSED]) for split, scores in splits.items()},
        "curves": {
            split: figures.roc(splits["good"], scores, f"ROC curves of {category.name}, {split}")
            for split, scores in splits.items()
            if split != "good"
        },
        "histogram": figures.histograms(
            {split: scores[FUSED] for split, scores in splits.items()},
            measured.threshold.value,
            f"score histograms of {category.name}",
        ),
        "pseudo_labels": pseudo_labels(category, workspace, measured.white_level, measured.names),
        "records": records_of(category, workspace),
        "models": [evaluated for evaluated in models if evaluated["category"] == category.name],
    }


def threshold_image(measured: Measured) -> tuple[str, str]:
    """Name and picture, as an address that needs no file, of the validation image whose score is the threshold."""
    index = np.argmin(np.abs(measured.fused["val"] - measured.threshold.value))
    path = measured.category.validation[index]
    image = overlays.shrink(images.read_rgb(path, white_level=measured.white_level), THRESHOLD_SIDE)
    name = path.relative_to(measured.category.root).as_posix()
    return name, overlays.data_uri(image, QUALITY)


def pseudo_labels(
    category: layouts.Category, workspace: Workspace, white_level: float | None, names: dict[int, str]
) -> dict[str, Any] | None:
    """Some trusted training images with their pseudo-labels; None where there are none (any more)."""
    labelled = workspace.pseudo_labels(category.name)
    if not (labelled.trusted.exists() and labelled.histogram.exists()):
        return None
    paths, trusted = category.train, files.read_array(labelled.trusted)
    indices = trusted[
        np.unique(np.linspace(0, len(trusted) - 1, min(PSEUDO_LABELS, len(trusted))).astype(int))
    ]
    shown = []
    for path in (paths[index] for index in indices if index < len(paths)):
        label_file = labelled.image(category.key(path)) / "filtered_cluster_map.png"
        if label_file.exists():
            image = overlays.shrink(images.read_rgb(path, white_level=white_level), PSEUDO_LABEL_SIDE)
            painted = overlays.label_overlay(image, images.read_mask(label_file))
            shown.append((path.name, overlays.data_uri(image, QUALITY), overlays.data_uri(painted, QUALITY)))
    areas = files.read_array(labelled.histogram).mean(0)
    return {
        "shown": shown,
        "trusted": len(trusted),
        "images": len(paths),
        "labels": [
            (index, title_of(index, names.get(index, "")), 100 * area)
            for index, area in enumerate(areas.tolist(), start=1)
        ],
    }


def records_of(category: layouts.Category, workspace: Workspace) -> dict[str, dict[str, Any]]:
    """What each stage noted about how it was run, by stage."""
    noted = {"pseudo_label.py": workspace.pseudo_labels(category.name).record}
    for branch, row in BRANCHES.items():
        stage = row.stage if row.stage not in noted else f"{row.stage}, {row.title}"
        noted[stage] = workspace.record(category.name, branch)
    return {
        stage: listed(records.read_record(path)["used"]) for stage, path in noted.items() if path.exists()
    }


def listed(provenance: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested provenance as one list, "lgst.steps" for example; of absolute paths, which mean nothing elsewhere, the last part."""
    flat: dict[str, Any] = {}
    for key, value in provenance.items():
        if isinstance(value, dict):
            flat |= listed(value, f"{prefix}{key}.")
        else:
            absolute = isinstance(value, str) and Path(value).is_absolute()
            flat[f"{prefix}{key}"] = Path(value).name if absolute else value
    return flat
