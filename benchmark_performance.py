"""Stage 5: fuse the scores of the branches and report how well they detect and localise.

Reads anomaly_score/{category}_{patchhist,LGST,memory,DFM}_{logi,struc,val}_score.npy, the branches' maps and the ground truth.
Writes score_combine_result.txt: for each category one line per branch, the published sum, that of all at
equal weights and the fused one, logical then structural image AUROC in percent; everything else (averages,
stand-ins, average precision, F1-max, single defects, pixel metrics and saturated per-region overlap) stands
on lines of its own. The same numbers per category: anomaly_score/{category}_metrics.json.
"""

from __future__ import annotations

from dataclasses import replace

from csad.cli import common_options, select, with_branches, with_seeds
from csad.data import files
from csad.errors import UserError, run_script
from csad.evaluation import seeds
from csad.evaluation.measures import measure
from csad.evaluation.score_tables import by_category, details, overview, unmeasured
from csad.evaluation.scores import MANY, reservations
from csad.progress import ProgressBar
from csad.synthetic.writer import components_root


def main() -> None:
    args = with_branches(with_seeds(common_options(__doc__))).parse_args()
    workspace, dataset, categories, settings_of = select(args)
    workspaces = workspace.of_seeds(args.seeds).values()
    with workspace.lock_with(workspaces):
        runs: list[dict[str, dict]] = []
        for seed_workspace in workspaces:
            runs.append({})
            untested: list[str] = []  # the same with every seed
            # Copies, which take their lists of files with them when they go.
            for category in ProgressBar(
                map(replace, categories), "measure", len(categories), unit="category", leave=False
            ):
                if not category.tested:
                    untested.append(f"{category.name}: nothing to measure, there are no good test images")
                    continue
                runs[-1][category.name] = measure(category, seed_workspace, settings_of[category.name])
            if not runs[-1]:
                raise UserError("; ".join(untested) + "; export_model.py and predict.py need none")
            for name, content in runs[-1].items():
                files.write_json(seed_workspace.metrics(name), content)
            target = seed_workspace.combined_scores
            summary = overview(runs[-1], with_published=not components_root(dataset.root).exists())
            lines = [*by_category(runs[-1]), *summary, *details(runs[-1]), *untested]
            files.write_text(target, "\n".join(lines) + "\n")
            if len(runs[-1]) > MANY:
                lines = summary
        if args.seeds:
            target, lines = workspace.over_seeds(target.stem), over_seeds(runs, args.seeds, untested)
            files.write_text(target, "\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"\nwrote {target}")


def over_seeds(runs: list[dict[str, dict]], numbers: list[int], untested: list[str]) -> list[str]:
    """The lines of the table over all seeds; what was not measured is said once, with its seeds."""
    lines = seeds.table(seeds.over_seeds(runs), numbers)
    seeds_of: dict[str, list[str]] = {}
    for run, number in zip(runs, numbers):
        for line in (*unmeasured(run), *untested):
            seeds_of.setdefault(line, []).append(str(number))
    lines += [f"{line} (seed{'s' * (len(own) > 1)} {', '.join(own)})" for line, own in seeds_of.items()]
    return lines + reservations(content for run in runs for content in run.values())


if __name__ == "__main__":
    run_script(main)
