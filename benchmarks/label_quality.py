"""Label maps against the truth, which only the built-in data set knows: mean IoU per category.

Measured are the pseudo-label maps of the training images that stage 1 trusts, and the segmentor's label maps of the good
test images. Neither knows class names: each true class, background included, is compared with the label that suits it best,
one to one (`csad.evaluation.label_matching`). Prints a Markdown table and writes label_quality.json to the workspace.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from csad.cli import common_options, select
from csad.data import files, images, layouts
from csad.errors import UserError, run_script
from csad.evaluation.label_matching import LabelMatch, match_labels
from csad.synthetic.writer import components_root

import cv2
import numpy as np

from benchmarks.measuring import markdown


def main() -> None:
    args = common_options(__doc__).parse_args()
    workspace, dataset, categories, _ = select(args)
    truth = components_root(dataset.root)
    if not truth.is_dir():
        raise UserError(
            f"the true label maps are missing: {truth}; only data sets of make_synthetic_loco.py have them"
        )
    qualities = {}
    for category in categories:
        made, good = workspace.pseudo_labels(category.name), category.test(layouts.GOOD)
        trusted = files.read_array(files.require(made.trusted, "pseudo_label.py"))
        paths = [category.train[index] for index in trusted]
        labelled = [made.image(category.key(path)) / "filtered_cluster_map.png" for path in paths]
        segmented = [
            workspace.segmentation_output(category.name, layouts.GOOD, category.key(path)) for path in good
        ]
        qualities[category.name] = {
            "pseudo-labels": compare(labelled, true_maps(truth, dataset.root, paths), "pseudo_label.py"),
            "segmentor": compare(segmented, true_maps(truth, dataset.root, good), "train_segmentor.py"),
        }

    content = {
        name: {
            what: {"mean_iou": match.mean_iou, "per_class": match.per_class} for what, match in parts.items()
        }
        for name, parts in qualities.items()
    }
    with workspace.lock():
        files.write_json(workspace.root / "label_quality.json", content)
    means = {name: [match.mean_iou for match in parts.values()] for name, parts in qualities.items()}
    means["average"] = np.mean(list(means.values()), axis=0).tolist()
    rows = [[name, *(f"{mean:.3f}" for mean in of_category)] for name, of_category in means.items()]
    print("\n".join(markdown(["category", "trusted pseudo-labels", "segmentor"], rows)))


def true_maps(truth: Path, root: Path, paths: Sequence[Path]) -> list[Path]:
    """Paths of the true label maps of images."""
    return [truth / path.relative_to(root).with_suffix(".png") for path in paths]


def compare(predicted: Sequence[Path], true: Sequence[Path], stage: str) -> LabelMatch:
    """Match the label maps in files; true ones are brought to the predicted ones' size, nearest neighbour.
    UserError if a predicted map is missing; names the stage that makes it."""
    maps, targets = [], []
    for path, target in zip(predicted, true, strict=True):
        maps.append(images.read_mask(files.require(path, stage)))
        height, width = maps[-1].shape
        targets.append(cv2.resize(images.read_mask(target), (width, height), interpolation=cv2.INTER_NEAREST))
    return match_labels(maps, targets)


if __name__ == "__main__":
    run_script(main)
