"""Put everything a run found on one page: WORKSPACE/report.html, which needs no other file and no network (one per seed).

Reads what the five stages wrote: scores, metrics, label maps, anomaly maps, pseudo-labels and the records of
settings. The page says how good it is and what went wrong, shows every test image with its components, anomaly
map, verdict and findings (sortable, and to be filtered by score, kind and error), score histograms, ROC curves,
the results of every branch (under MVTec LOCO AD's categories with the published figures beside them),
pseudo-labels, settings, versions and stand-ins.
Of many categories one table has them all, the lowest first, and the rest of the page is about the lowest alone.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from csad import settings
from csad.branches import BRANCHES
from csad.cli import common_options, select, with_branches, with_seeds
from csad.data import files, images, layouts, records
from csad.data.roi import read_roi
from csad.data.workspace import Workspace
from csad.errors import UserError, run_script
from csad.evaluation import branch_weights, export_tables
from csad.evaluation.deviations import deviations, title_of
from csad.evaluation.localisation import read_maps
from csad.evaluation.scores import (
    FUSED,
    MANY,
    Scores,
    by_split,
    digest_scores,
    fused_mean,
    lowest_first,
    normalised_scores,
)
from csad.evaluation.thresholds import Threshold, choose_threshold
from csad.export.assembly import sources, versions
from csad.inference import inspection, overlays, verdicts
from csad.progress import ProgressBar
from csad.report import figures, page
from csad.synthetic.writer import components_root

import numpy as np

from models.fused import metadata
from models.fusion import fuse, share

PICTURES_LIMIT = 10_500_000  # bytes of test pictures; with base64's third and the text beside them the page stays under 20 MB
SIDES = (
    256,
    208,
    160,
    128,
    96,
    64,
)  # of the test pictures: the largest with which they stay within the limit
QUALITY = 70
SAMPLE = 12  # images by whose size the side is chosen
PSEUDO_LABELS = 8  # training images shown per category
PSEUDO_LABEL_SIDE = 160
METRICS = ("category", "weights", "rule", "detection", "measured")  # what is needed of stage 5's


def main() -> None:
    args = with_branches(with_seeds(common_options(__doc__))).parse_args()
    workspace, dataset, categories, chosen = select(args)
    for place in workspace.of_seeds(args.seeds).values():
        with place.lock():
            done = [
                category
                for category in categories
                if category.tested and place.metrics(category.name).exists()
            ]
            if not done:
                raise UserError(
                    f"{place.root} holds no results yet; "
                    + (
                        "run benchmark_performance.py first"
                        if any(category.tested for category in categories)
                        else "there are no good test images, and without them nothing to report"
                    )
                )
            if args.categories:  # without names, what is done of a data set that is only begun
                for category in categories:
                    files.require(place.metrics(category.name), "benchmark_performance.py")
            metrics = {
                category.name: files.read_json(place.metrics(category.name), keys=METRICS)
                for category in done
            }
            if len(done) > MANY:
                metrics = {one["category"]: one for one in lowest_first(metrics.values())}
            in_full: dict[str, Any] = dict.fromkeys(list(metrics)[:MANY])
            for category in ProgressBar(
                map(replace, done), "check scores", len(done), unit="category", leave=False
            ):
                measured = Measured(category, place, chosen[category.name], metrics[category.name])
                if category.name in in_full:
                    in_full[category.name] = measured
            write_page(dataset.root.resolve(), list(in_full.values()), list(metrics.values()), place)


class Measured:
    """What stage 5 measured of a category (``metrics``), and the scores that it measured.

    Attributes:
        branches: whose scores there are; weights: of those that are added, with ``rule``.
        threshold: of the fused scores.

    Raises:
        UserError: there are other scores or images now than those that were measured.
    """

    def __init__(
        self,
        category: layouts.Category,
        workspace: Workspace,
        chosen: settings.Settings,
        metrics: dict[str, Any],
    ):
        self.category, self.workspace, self.metrics = category, workspace, metrics
        self.weights, self.rule = self.metrics["weights"], self.metrics["rule"]
        self.branches = [branch for branch in BRANCHES if branch in self.metrics["detection"]]
        self.scores: Scores = normalised_scores(category, workspace, self.branches, self.rule)
        if self.metrics["measured"] != digest_scores(category, workspace, self.branches):
            raise UserError(
                f"{workspace.metrics(category.name)} was measured on other scores than there are now; "
                "run benchmark_performance.py again"
            )
        self.threshold: Threshold = choose_threshold(self.sum_of("val"))
        self.names = chosen.names
        self.roi, self.white_level = read_roi(category, images.SIZE, chosen.roi), chosen.images.white_level

    def sum_of(self, part: str) -> np.ndarray:
        return fuse({branch: self.scores[branch][part] for branch in self.weights}, self.weights, self.rule)

    def shares(self) -> dict[str, dict[str, np.ndarray]]:
        """Per branch and, as "fused", their sum: scores by split of test images."""
        parts = {
            branch: {part: share(values, self.rule) for part, values in self.scores[branch].items()}
            for branch in self.branches
        }
        parts = {FUSED: {part: self.sum_of(part) for part in ("logi", "struc")}} | parts
        return {name: by_split(self.category, one) for name, one in parts.items()}

    def outcome(self) -> page.Outcome:
        """What the threshold does to the test images."""
        over = {
            split: int((scores > self.threshold.value).sum())
            for split, scores in self.shares()[FUSED].items()
        }
        images = {split: len(scores) for split, scores in self.shares()[FUSED].items()}
        defects = [split for split in layouts.SPLITS if split != layouts.GOOD]
        return page.Outcome(
            over[layouts.GOOD],
            images[layouts.GOOD],
            sum(images[split] - over[split] for split in defects),
            sum(images[split] for split in defects),
        )

    @cached_property
    def reasons(self) -> tuple[dict[str, Any] | None, str]:
        """The histogram that they are read off, from the exported model, or why it is left out."""
        model = self.workspace.exported_model(self.category.name, "torch")
        if not model.exists():
            return None, "no reasons: there is no exported torch model; run export_model.py"
        known = metadata(files.read_state(model))
        try:
            weighed = known.get("weighed", known.get("branches", []))
            current = known.get("made_of") == sources(self.category.name, self.workspace, weighed)
        except UserError:
            current = False
        if not current:
            return (
                None,
                "reasons are left out: the exported model is older than the scores; run export_model.py again",
            )
        return known.get("histogram"), ""


def write_page(
    root: Path, measured: list[Measured], metrics: list[dict[str, Any]], workspace: Workspace
) -> None:
    """The page about the categories in ``measured``, and of all that there are their ``metrics``."""
    models = export_tables.read(workspace)
    summaries = [summary(one, models) for one in measured]
    shown = [tested for one in measured for tested in test_images(one)]
    side, shown, left_out = choose_side(shown)
    cards = [
        card(tested, side) | {"anchor": f"image-{index}"}
        for index, tested in enumerate(ProgressBar(shown, desc="draw test images", unit="image"))
    ]
    content = page.render(
        dataset=root.name,
        metrics=metrics,
        means=[fused_mean(one) for one in metrics],
        categories=summaries,
        cards=sorted(cards, key=lambda one: -one["score"]),
        side=side,
        titles={FUSED: FUSED} | {branch.name: branch.title for branch in BRANCHES.values()},
        left_out=left_out,
        versions=versions(),
        rendered=components_root(root).exists(),
    )
    files.write_text(workspace.report, content)
    print(
        f"wrote {workspace.report} ({workspace.report.stat().st_size / 1e6:.1f} MB, {len(cards)} test images)"
    )


class TestImage(NamedTuple):
    """One test image and what the stages found in it."""

    measured: Measured
    split: str
    path: Path
    shares: dict[str, float]  # of the fused branches; the score is their sum
    anomaly_maps: dict[str, np.ndarray]  # (64, 64), scaled, of the fused branches

    @property
    def score(self) -> float:
        return sum(self.shares.values())

    @property
    def anomalous(self) -> bool:
        return self.score > self.measured.threshold.value

    @property
    def error(self) -> str:
        if self.anomalous == (self.split != layouts.GOOD):
            return ""
        return "false alarm" if self.anomalous else "missed"


def test_images(one: Measured) -> list[TestImage]:
    maps: dict[str, dict[str, np.ndarray]] = {}
    for branch in one.weights:
        path = one.workspace.anomaly_maps(one.category.name, branch)
        if path.exists():
            maps[branch] = read_maps(path)
    shares, found = one.shares(), []
    for split in layouts.SPLITS:
        paths = one.category.test(split)
        for index, path in enumerate(paths):
            found.append(
                TestImage(
                    one,
                    split,
                    path,
                    {
                        branch: weight * float(shares[branch][split][index])
                        for branch, weight in one.weights.items()
                    },
                    {
                        branch: by[split][index]
                        for branch, by in maps.items()
                        if len(by.get(split, ())) == len(paths)
                    },
                )
            )
    return found


def choose_side(shown: list[TestImage]) -> tuple[int, list[TestImage], int]:
    """The side of pictures with which all fit into `PICTURES_LIMIT`, judged by a few; where none does, the smallest, the most
    telling images alone, errors first, and how many are left out."""
    few = [
        shown[index]
        for index in np.unique(np.linspace(0, len(shown) - 1, min(SAMPLE, len(shown))).astype(int))
    ]
    for side in SIDES:
        size = (
            1.15
            * np.mean([sum(len(uri) for _, uri in card(tested, side)["pictures"]) for tested in few])
            * 0.75
        )
        if size * len(shown) <= PICTURES_LIMIT:
            return side, shown, 0
    kept = sorted(shown, key=lambda tested: (not tested.error, -tested.score))[: int(PICTURES_LIMIT / size)]
    return side, kept, len(shown) - len(kept)


def card(tested: TestImage, side: int) -> dict[str, Any]:
    """What the page shows of one test image."""
    one, category = tested.measured, tested.measured.category
    image = images.read_rgb(tested.path, white_level=one.white_level)
    size = image.shape[1::-1]
    image = overlays.shrink(image, side)
    alarm = max(tested.shares, key=tested.shares.get)
    spot = None
    if tested.anomaly_maps:
        at_once = np.max(list(tested.anomaly_maps.values()), axis=0)
        its = tested.anomaly_maps.get(alarm, at_once)
        spot = inspection.maximum_of(its if its.any() else at_once, size)
    if one.roi is not None:
        image = overlays.outline(image, one.roi)

    def marked(picture: np.ndarray) -> np.ndarray:
        return overlays.ring(picture, spot, size) if tested.anomalous and spot is not None else picture

    drawn = [("image", marked(image))]
    try:
        masks = [images.read_mask(path) > 0 for path in category.region_masks(tested.split, tested.path)]
        if masks:
            drawn = [("image, annotated region outlined", marked(overlays.outline(image, *masks)))]
    except UserError:  # stage 5 says what is wrong with it; the page is worth having without
        drawn = [("image, annotated region unreadable", marked(image))]
    unusual, legend = [], []
    label_file = one.workspace.segmentation_output(category.name, tested.split, category.key(tested.path))
    if label_file.exists():
        label_map = images.read_mask(label_file)
        drawn.append(("components", overlays.label_overlay(image, label_map)))
        histogram, _ = one.reasons
        unusual = deviations(label_map, histogram, one.names) if histogram else []
        components = (
            range(1, len(histogram["mean"])) if histogram else np.unique(label_map[label_map > 0]).tolist()
        )
        legend = [(component, one.names.get(component, "")) for component in components]
    if tested.anomaly_maps:
        explaining = overlays.explaining_map(tested.anomaly_maps, tested.shares)
        drawn.append(
            ("how unusual each place is", marked(overlays.heat_overlay(image, explaining, tested.anomalous)))
        )
    verdict = verdicts.Verdict(
        tested.path,
        verdicts.ANOMALOUS if tested.anomalous else verdicts.NORMAL,
        one.threshold.value,
        tested.score,
        tested.shares,
        alarm,
        spot,
        unusual,
        size,
    )
    return {
        "category": category.name,
        "split": tested.split.removesuffix("_anomalies"),
        "name": tested.path.name,
        "score": tested.score,
        "threshold": one.threshold.value,
        "branches": tested.shares,
        "anomalous": tested.anomalous,
        "error": tested.error,
        "findings": verdict.findings,
        "legend": legend,
        "pictures": [(title, overlays.data_uri(picture, QUALITY)) for title, picture in drawn],
    }


def summary(one: Measured, models: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything about a category but its test images; ``models`` are what all evaluated exports came to."""
    category, workspace = one.category, one.workspace
    shares = one.shares()
    splits = {
        split.removesuffix("_anomalies"): {name: by[split] for name, by in shares.items()}
        for split in layouts.SPLITS
        if category.test(split)
    }
    return {
        "name": category.name,
        "metrics": one.metrics,
        "threshold": one.threshold,
        "note": one.reasons[1],
        "outcome": one.outcome(),
        "branches": one.branches,
        "weights": branch_weights.describe(one.weights),
        "images": {split: len(found[FUSED]) for split, found in splits.items()},
        "curves": {
            split: figures.roc(splits["good"], found, f"ROC curves of {category.name}, {split}")
            for split, found in splits.items()
            if split != "good"
        },
        "histogram": figures.histograms(
            {split: found[FUSED] for split, found in splits.items()},
            one.threshold.value,
            f"score histograms of {category.name}",
        ),
        "pseudo_labels": pseudo_labels(category, workspace, one.white_level, one.names),
        "records": records_of(category, workspace),
        "models": [evaluated for evaluated in models if evaluated["category"] == category.name],
    }


def pseudo_labels(
    category: layouts.Category, workspace: Workspace, white_level: float | None, names: dict[int, str]
) -> dict[str, Any] | None:
    """Some trusted training images with their pseudo-labels; None where there are none (any more)."""
    made = workspace.pseudo_labels(category.name)
    if not (made.trusted.exists() and made.histogram.exists()):
        return None
    paths, trusted = category.train, files.read_array(made.trusted)
    some = trusted[np.unique(np.linspace(0, len(trusted) - 1, min(PSEUDO_LABELS, len(trusted))).astype(int))]
    shown = []
    for path in (paths[index] for index in some if index < len(paths)):
        label_file = made.image(category.key(path)) / "filtered_cluster_map.png"
        if label_file.exists():
            image = overlays.shrink(images.read_rgb(path, white_level=white_level), PSEUDO_LABEL_SIDE)
            painted = overlays.label_overlay(image, images.read_mask(label_file))
            shown.append((path.name, overlays.data_uri(image, QUALITY), overlays.data_uri(painted, QUALITY)))
    areas = files.read_array(made.histogram).mean(0)
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


def listed(used: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested provenance as one list, "lgst.steps" for example; of absolute paths, which mean nothing elsewhere, the last part."""
    flat: dict[str, Any] = {}
    for key, value in used.items():
        if isinstance(value, dict):
            flat |= listed(value, f"{prefix}{key}.")
        else:
            absolute = isinstance(value, str) and Path(value).is_absolute()
            flat[f"{prefix}{key}"] = Path(value).name if absolute else value
    return flat


if __name__ == "__main__":
    run_script(main)
