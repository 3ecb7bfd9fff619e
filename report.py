"""Put everything a run found on one page: WORKSPACE/report.html, which needs no other file and no network (one per seed).

Reads what the five stages wrote: scores, metrics, label maps, anomaly maps, pseudo-labels and the records of settings. The page
has the results with the published figures beside them, ROC curves, score histograms, every test image with its components,
anomaly map and verdict (sortable, and to be filtered by score, kind and error), pseudo-labels, settings, versions and stand-ins.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

import settings
from data import files, images, layouts
from data.workspace import Workspace
from deploy.assembly import versions
from errors import UserError, run_script
from evaluation.deviations import deviations
from evaluation.scores import BRANCHES, PARTS, digest_scores, normalised_scores
from models.fused import metadata
from report import figures, page, pictures

FALSE_POSITIVE_RATE = 0.01  # of validation images, from which the verdict's threshold follows
PICTURES_LIMIT = 12_000_000  # bytes of test pictures; base64 makes them a third larger, and the page stays under 20 MB
SIDES = (256, 208, 160, 128, 96, 64)  # of the test pictures: the largest with which they stay within the limit
QUALITY = 70
SAMPLE = 12  # images by whose size the side is chosen
PSEUDO_LABELS = 8  # training images shown per category
PSEUDO_LABEL_SIDE = 160


def main() -> None:
    args = settings.with_seeds(settings.command_line(__doc__)).parse_args()
    dataset = layouts.Dataset(args.dataset_root or Workspace(args.workspace).default_dataset)
    categories = dataset.select(args.categories, settings.logical_defects(args.preset))
    settings.check((category.name for category in categories), args)
    for workspace in Workspace(args.workspace).of_seeds(args.seeds).values():
        done = [category for category in categories if workspace.metrics(category.name).exists()]
        if not done:
            raise UserError(f"{workspace.root} holds no results yet; run benchmark_performance.py first")
        if args.categories:  # without names, what is done of a data set that is only begun
            for category in categories:
                files.require(workspace.metrics(category.name), "benchmark_performance.py")
        write_page(dataset.root.name, done, workspace)


def write_page(dataset: str, categories: list[layouts.Category], workspace: Workspace) -> None:
    summaries = [summary(category, workspace) for category in categories]
    shown = [tested for category in categories for tested in test_images(category, workspace)]
    side = choose_side(shown)
    cards = [card(tested, side) for tested in tqdm(shown, desc="draw test images", unit="image")]
    content = page.render(
        dataset=dataset, categories=summaries, cards=sorted(cards, key=lambda one: -one["score"]), side=side,
        false_positive_rate=FALSE_POSITIVE_RATE, versions=versions())
    files.write_text(workspace.report, content)
    print(f"wrote {workspace.report} ({workspace.report.stat().st_size / 1e6:.1f} MB, {len(cards)} test images)")


class TestImage(NamedTuple):
    """One test image and what the stages found in it."""

    category: layouts.Category
    kind: str
    path: Path
    scores: dict[str, float]  # per branch, normalised; the score is their sum
    threshold: float
    label_map: Path
    anomaly_map: np.ndarray | None  # (64, 64)
    histogram: dict[str, Any] | None

    @property
    def score(self) -> float:
        return sum(self.scores.values())


def test_images(category: layouts.Category, workspace: Workspace) -> list[TestImage]:
    scores = normalised_scores(category, workspace)
    threshold = verdict_threshold(scores)
    maps_file, model = workspace.anomaly_maps(category.name), workspace.exported_model(category.name, "torch")
    maps = files.read_arrays(maps_file) if maps_file.exists() else {}
    histogram = metadata(files.read_state(model)).get("histogram") if model.exists() else None
    found = []
    for kind in layouts.SPLITS:
        paths = category.test(kind)
        of_kind = by_kind(category, scores, kind)
        for index, path in enumerate(paths):
            found.append(TestImage(
                category, kind, path, {branch: float(values[index]) for branch, values in of_kind.items()}, threshold,
                workspace.segmentation_output(category.name, kind, path),
                maps[kind][index] if len(maps.get(kind, ())) == len(paths) else None, histogram))
    return found


def by_kind(category: layouts.Category, scores: dict[str, dict[str, np.ndarray]], kind: str) -> dict[str, np.ndarray]:
    """Per branch the normalised scores of one kind of test image, in sorted file order."""
    good = len(category.test(layouts.GOOD))
    if kind == layouts.GOOD:
        return {branch: parts["logi"][:good] for branch, parts in scores.items()}
    part = next(part for part, of_kind in PARTS.items() if of_kind == kind)
    return {branch: parts[part][good:] for branch, parts in scores.items()}


def verdict_threshold(scores: dict[str, dict[str, np.ndarray]]) -> float:
    """The fused score that a share `FALSE_POSITIVE_RATE` of the validation images exceeds."""
    return float(np.quantile(sum(parts["val"] for parts in scores.values()), 1 - FALSE_POSITIVE_RATE))


def choose_side(shown: list[TestImage]) -> int:
    """The side of pictures with which all of them fit into `PICTURES_LIMIT`, judged by a few."""
    few = [shown[index] for index in np.unique(np.linspace(0, len(shown) - 1, min(SAMPLE, len(shown))).astype(int))]
    for side in SIDES:
        size = np.mean([sum(len(uri) for _, uri in card(tested, side)["pictures"]) for tested in few]) * 0.75
        if 1.15 * size * len(shown) <= PICTURES_LIMIT:
            return side
    raise UserError(f"{len(shown)} test images do not fit on one page of 20 MB; choose fewer --categories")


def card(tested: TestImage, side: int) -> dict[str, Any]:
    """What the page shows of one test image."""
    image = pictures.shrink(images.read_rgb(tested.path), side)
    drawn = [("image", image)]
    try:
        masks = [images.read_mask(path) > 0 for path in tested.category.region_masks(tested.kind, tested.path)]
        if masks:
            drawn = [("image, annotated region outlined", pictures.outline(image, *masks))]
    except UserError:  # stage 5 says what is wrong with it; the page is worth having without
        drawn = [("image, annotated region unreadable", image)]
    words = []
    if tested.label_map.exists():
        label_map = images.read_mask(tested.label_map)
        drawn.append(("components", pictures.label_overlay(image, label_map)))
        if tested.histogram:
            words = [one.words for one in deviations(label_map, tested.histogram)]
    if tested.anomaly_map is not None:
        drawn.append(("anomaly map", pictures.heat_overlay(image, tested.anomaly_map)))
    anomalous = tested.score > tested.threshold
    error = "" if anomalous == (tested.kind != layouts.GOOD) else "false alarm" if anomalous else "missed"
    return {"category": tested.category.name, "kind": tested.kind.removesuffix("_anomalies"), "name": tested.path.name,
            "score": tested.score, "branches": tested.scores, "threshold": tested.threshold, "anomalous": anomalous,
            "error": error, "words": words,
            "pictures": [(title, pictures.data_uri(picture, QUALITY)) for title, picture in drawn]}


def summary(category: layouts.Category, workspace: Workspace) -> dict[str, Any]:
    """Everything about a category but its test images."""
    scores = normalised_scores(category, workspace)
    threshold = verdict_threshold(scores)
    kinds = {kind.removesuffix("_anomalies"): by_kind(category, scores, kind) for kind in layouts.SPLITS if category.test(kind)}
    both = "both"
    fused = {kind: {both: sum(branches.values())} | branches for kind, branches in kinds.items()}
    return {
        "name": category.name, "metrics": metrics_of(category, workspace), "threshold": threshold,
        "images": {kind: len(found[both]) for kind, found in fused.items()},
        "curves": {kind: figures.roc(fused["good"], found, f"ROC curves of {category.name}, {kind}")
                   for kind, found in fused.items() if kind != "good"},
        "histogram": figures.histograms({kind: found[both] for kind, found in fused.items()}, threshold,
                                        f"score histograms of {category.name}"),
        "pseudo_labels": pseudo_labels(category, workspace), "records": records_of(category, workspace),
        "models": [evaluated for evaluated in (files.read_json(workspace.export_report)
                                               if workspace.export_report.exists() else [])
                   if evaluated["category"] == category.name]}


def metrics_of(category: layouts.Category, workspace: Workspace) -> dict[str, Any]:
    """What stage 5 measured.

    Raises:
        UserError: it measured other scores than those that the curves and pictures show.
    """
    path = workspace.metrics(category.name)
    metrics, now = files.read_json(path), digest_scores(category, workspace)
    if metrics.get("measured", now) != now:
        raise UserError(f"{path} was measured on other scores than there are now; run benchmark_performance.py again")
    return metrics


def pseudo_labels(category: layouts.Category, workspace: Workspace) -> dict[str, Any] | None:
    """Some trusted training images with their pseudo-labels; None where there are none (any more)."""
    info = workspace.info(category.name)
    trusted_file, histogram_file = info / "filtered_histogram_indices.npy", info / "filtered_component_histogram.npy"
    if not (trusted_file.exists() and histogram_file.exists()):
        return None
    paths, trusted = category.train, files.read_array(trusted_file)
    chosen = trusted[np.unique(np.linspace(0, len(trusted) - 1, min(PSEUDO_LABELS, len(trusted))).astype(int))]
    shown = []
    for path in (paths[index] for index in chosen if index < len(paths)):
        label_file = workspace.image_masks(category.name, path) / "filtered_cluster_map.png"
        if label_file.exists():
            image = pictures.shrink(images.read_rgb(path), PSEUDO_LABEL_SIDE)
            painted = pictures.label_overlay(image, images.read_mask(label_file))
            shown.append((path.name, pictures.data_uri(image, QUALITY), pictures.data_uri(painted, QUALITY)))
    areas = files.read_array(histogram_file).mean(0)
    colours = images.colour_labels(np.arange(1, len(areas) + 1, dtype=np.uint8))
    return {"shown": shown, "trusted": len(trusted), "images": len(paths),
            "labels": [(index + 1, "#" + bytes(colour).hex(), 100 * area)
                       for index, (colour, area) in enumerate(zip(colours.tolist(), areas))]}


def records_of(category: layouts.Category, workspace: Workspace) -> dict[str, dict[str, Any]]:
    """What each stage noted about how it was run, by stage."""
    noted = {"pseudo_label.py": workspace.info(category.name) / "pseudo_label.json",
             BRANCHES["patchhist"]: workspace.segmentor(category.name).with_suffix(".json"),
             BRANCHES["LGST"]: workspace.lgst(category.name).with_suffix(".json")}
    return {stage: files.read_json(path) for stage, path in noted.items() if path.exists()}


if __name__ == "__main__":
    run_script(main)
