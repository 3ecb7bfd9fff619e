"""Put everything a run found on one page: WORKSPACE/report.html, which needs no other file and no network (one per seed).

Reads what the five stages wrote: scores, metrics, label maps, anomaly maps, pseudo-labels and the records of
settings. The page says how good it is and what went wrong, shows every test image with its components, anomaly
map, verdict and findings (sortable, and to be filtered by score, kind and error), score histograms, ROC curves,
the results of every branch (of MVTec LOCO AD's five categories with the published average beside them),
pseudo-labels, settings, versions and stand-ins.
Of many categories one table has them all, the lowest first, and the rest of the page is about the lowest alone.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from csad.branches import BRANCHES
from csad.cli import common_options, select, with_branches, with_seeds
from csad.data import files
from csad.data.workspace import Workspace
from csad.errors import UserError, run_script
from csad.evaluation import export_tables
from csad.evaluation.scores import FUSED, MANY, fused_mean, lowest_first
from csad.export.versions import versions
from csad.progress import ProgressBar
from csad.report import page
from csad.report.cards import card, choose_side
from csad.report.measured import Measured, test_images
from csad.report.summaries import summary
from csad.synthetic.writer import components_root

METRICS = ("category", "weights", "rule", "detection", "measured")  # what is needed of stage 5's


def main() -> None:
    args = with_branches(with_seeds(common_options(__doc__))).parse_args()
    workspace, dataset, categories, settings_of = select(args)
    for seed_workspace in workspace.of_seeds(args.seeds).values():
        with seed_workspace.lock():
            tested = [category for category in categories if category.tested]
            done = [category for category in tested if seed_workspace.metrics(category.name).exists()]
            if not done:
                advice = "there are no good test images, and without them nothing to report"
                if tested:
                    advice = "run benchmark_performance.py first"
                raise UserError(f"{seed_workspace.root} holds no results yet; {advice}")
            if args.categories:  # without names, what is done of a data set that is only begun
                for category in categories:
                    files.require(seed_workspace.metrics(category.name), "benchmark_performance.py")
            metrics = {
                category.name: files.read_json(seed_workspace.metrics(category.name), keys=METRICS)
                for category in done
            }
            if len(done) > MANY:
                metrics = {content["category"]: content for content in lowest_first(metrics.values())}
            in_full: dict[str, Any] = dict.fromkeys(list(metrics)[:MANY])
            for category in ProgressBar(
                map(replace, done), "check scores", len(done), unit="category", leave=False
            ):
                measured = Measured(
                    category, seed_workspace, settings_of[category.name], metrics[category.name]
                )
                if category.name in in_full:
                    in_full[category.name] = measured
            write_page(dataset.root.resolve(), list(in_full.values()), list(metrics.values()), seed_workspace)


def write_page(
    root: Path, measured: list[Measured], metrics: list[dict[str, Any]], workspace: Workspace
) -> None:
    """The page about the categories in ``measured``, and of all that there are their ``metrics``."""
    models = export_tables.read(workspace)
    summaries = [summary(category, models) for category in measured]
    side, shown, left_out = choose_side([image for category in measured for image in test_images(category)])
    cards = [
        card(image, side) | {"anchor": f"image-{index}"}
        for index, image in enumerate(ProgressBar(shown, desc="draw test images", unit="image"))
    ]
    content = page.render(
        dataset=root.name,
        metrics=metrics,
        means=[fused_mean(content) for content in metrics],
        categories=summaries,
        cards=sorted(cards, key=lambda card: -card["score"]),
        side=side,
        titles={FUSED: "all together"} | {branch.name: branch.title for branch in BRANCHES.values()},
        left_out=left_out,
        versions=versions(),
        rendered=components_root(root).exists(),
    )
    files.write_text(workspace.report, content)
    print(
        f"wrote {workspace.report} ({workspace.report.stat().st_size / 1e6:.1f} MB, {len(cards)} test images)"
    )


if __name__ == "__main__":
    run_script(main)
