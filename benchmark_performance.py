"""Stage 5: fuse the scores of both branches and report image AUROC.

Reads anomaly_score/{category}_{patchhist,LGST}_{logi,struc,val}_score.npy and writes score_combine_result.txt: for each
category one line per branch and one for both together, logical then structural AUROC in percent; averages and what
the scores were made with stand on lines of their own.
"""

from __future__ import annotations

from itertools import chain, combinations

import numpy as np

import settings
from errors import UserError, run_script
from loco import files, layout
from loco.metrics import auroc
from models.normalisation import apply_trimmed_z, fit_trimmed_z

BRANCHES = {"patchhist": "train_segmentor.py", "LGST": "CSAD.py"}
COMBINATIONS = tuple(chain.from_iterable(combinations(BRANCHES, size) for size in (1, 2)))
PUBLISHED = "published CSAD on MVTec LOCO AD: average 95.3 (paper), 95.6 (repository)"


def main() -> None:
    args = settings.command_line(__doc__).parse_args()
    workspace = layout.Workspace(args.workspace)
    dataset = layout.Dataset(args.dataset_root or workspace.default_dataset)
    lines, results, stand_ins = [], [], set()
    with workspace.lock():
        for category in dataset.select(args.categories):
            scores = normalised_scores(category, workspace)
            lines.append(f"{category.name.upper()}:")
            for branches in COMBINATIONS:
                logical, structural = image_aurocs(category, [scores[branch] for branch in branches])
                lines.append(f"{branches} AUC: {logical:.3f} {structural:.3f}")
                results.append((branches, logical, structural))
            stand_ins |= used_stand_ins(category.name, workspace)
        lines += ["", f"data set: {dataset.root.name}"]
        for branches in COMBINATIONS:
            logical, structural = np.nanmean([pair for name, *pair in results if name == branches], axis=0)
            lines.append(f"average {branches} logical {logical:.3f} structural {structural:.3f} "
                         f"mean {np.nanmean([logical, structural]):.3f}")
        if stand_ins:
            lines.append(f"made with stand-ins: {', '.join(sorted(stand_ins))}; not comparable with published figures")
        lines.append(PUBLISHED)
        files.write_text(workspace.combined_scores, "\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"\nwrote {workspace.combined_scores}")


def normalised_scores(category: layout.Category, workspace: layout.Workspace) -> dict[str, dict[str, np.ndarray]]:
    """Both branches' test scores, trimmed-z-normalised on their validation scores (METHOD.md section 4)."""
    normalised = {}
    for branch, stage in BRANCHES.items():
        parts = {part: files.read_array(files.require(workspace.scores(category.name, branch, part), stage))
                 for part in ("logi", "struc", "val")}
        for part, kind in (("logi", layout.LOGICAL), ("struc", layout.STRUCTURAL)):
            expected = len(category.test(layout.GOOD)) + len(category.test(kind))
            if parts[part].shape != (expected,):
                raise UserError(f"{workspace.scores(category.name, branch, part)} holds {parts[part].size} scores but "
                                f"the data set has {expected} such images; run {stage} --overwrite")
        mean, std = fit_trimmed_z(parts["val"])
        normalised[branch] = {part: apply_trimmed_z(parts[part], mean, std) for part in ("logi", "struc")}
    return normalised


def image_aurocs(category: layout.Category, branches: list[dict[str, np.ndarray]]) -> tuple[float, float]:
    """Logical and structural AUROC of the sum of the branches' scores."""
    good = len(category.test(layout.GOOD))
    fused = {part: sum(branch[part] for branch in branches) for part in ("logi", "struc")}
    return tuple(auroc(scores[:good], scores[good:]) for scores in fused.values())


def used_stand_ins(category: str, workspace: layout.Workspace) -> set[str]:
    """Stand-ins noted in the records beside the checkpoints; files made elsewhere have none."""
    recorded = [path.with_suffix(".json") for path in (workspace.segmentor(category), workspace.lgst(category))]
    return {name for path in recorded if path.exists() for name in files.read_json(path)["stand_ins"]}


if __name__ == "__main__":
    run_script(main)
