"""Stage 1: turn the training images of each category into semantic pseudo-labels.

A proposer cuts every image into masks of parts; mask algebra makes one clean set of components of them; features of all
components are clustered, so that the same part gets the same label in every image. Images are grouped by how much of
each label they show, and the most ordinary ones of each group are trusted.

Writes datasets/masks/{category}/{image}/ (filtered_cluster_map.png is the pseudo-label map) and
datasets/masks/{category}/info/. Interrupted, it continues with the image at which it stopped. Pseudo-labels made by
others are used as they are. docs/method.md section 1. SAM-HQ and Grounding DINO see the pictures at their native size, and
all maps have that size; the classical proposer works on 256x256.

--proposer says where the masks come from: grounded_sam (Grounding DINO and SAM-HQ, the method's own), sam (SAM-HQ alone),
classical (image processing, no download), or auto: the first of them for which prompt and checkpoints are there.
"""

from __future__ import annotations

import argparse
from functools import partial

from csad.cli import common_options, select, with_cluster
from csad.data import files, layouts
from csad.data.checks import layout_line, quick_check
from csad.data.listing import count as counted
from csad.data.workspace import Workspace
from csad.errors import UserError, run_script
from csad.processes import share_of, workers_option
from csad.progress import ProgressBar
from csad.pseudo_labels.component_labels import feature_space, label_components, paint
from csad.pseudo_labels.component_search import find_missing
from csad.pseudo_labels.crop_embedding import CropEmbedding
from csad.pseudo_labels.label_run import LabelRun, provenance_of
from csad.pseudo_labels.one_picture import COMPONENTS, clustered_map, save_label_map
from csad.pseudo_labels.proposers import Proposer
from csad.pseudo_labels.saving import save_info
from csad.settings import Settings
from csad.standins.proposer_choice import choose_proposer
from csad.training.jobs import Task, run_jobs
from csad.training.stage import agreed_backbone, view_of

import numpy as np
import torch

from models.backbone import Backbone
from models.device import choose_training_device, forbid_tf32

IMAGES_PER_TASK = 64  # of a Ray cluster


def main() -> None:
    parser = common_options(__doc__)
    own = parser.add_argument_group("options of this stage")
    own.add_argument(
        "--proposer",
        dest="pseudo_labels.proposer",
        default=argparse.SUPPRESS,
        metavar="NAME",
        help="auto, grounded_sam, sam or classical; the same as --pseudo_labels.proposer",
    )
    own.add_argument(
        "--save_all_masks",
        dest="pseudo_labels.save_all_masks",
        action="store_const",
        const="true",
        default=argparse.SUPPRESS,
        help="write all_masks.png also where it is not needed, which takes long",
    )
    workers_option(own, "processes that look at pictures where no network proposes")
    own.add_argument(
        "--download",
        action="store_true",
        help="fetch missing checkpoints and backbone weights into WORKSPACE/ckpt",
    )
    run_jobs(with_cluster(parser).parse_args(), jobs)


def jobs(args: argparse.Namespace) -> dict[str, Task]:
    """The categories by name; on a Ray cluster every one in parts, as each image's components can be found by themselves."""
    workspace, _, categories, settings_of = select(args)
    device = choose_training_device(args.device)
    forbid_tf32()
    # Only cnn_image costs time; its network is left out where nobody asked for it.
    with_deepest = any("cnn_image" in cfg.pseudo_labels.features for cfg in settings_of.values())
    backbone = agreed_backbone(args, workspace, device, with_deepest)
    tasks = {}
    for category in categories:
        # Categories side by side share the processes, and a cluster fills its cores by itself.
        workers = 1 if args.ray else share_of(args.workers)
        cfg = settings_of[category.name]
        stage = PseudoLabelStage(category, workspace, cfg, backbone, device, args, workers)
        if not args.ray:
            tasks[category.name] = Task(category, None, stage.run)
            continue
        first, count, parts = f"{category.name}: begin", len(category.train), []
        tasks[first] = Task(category, None, stage.begin, 1)
        for start in range(0, count, IMAGES_PER_TASK):
            end = min(start + IMAGES_PER_TASK, count)
            parts.append(f"{category.name}: images {start + 1} to {end}")
            find = partial(stage.find_components, slice(start, end))
            tasks[parts[-1]] = Task(category, None, find, IMAGES_PER_TASK, (first,))
        tasks[category.name] = Task(category, None, stage.cluster, None, tuple(parts))
    return tasks


class PseudoLabelStage:
    """Stage 1 of one category, in three steps that hand on nothing but files."""

    def __init__(
        self,
        category: layouts.Category,
        workspace: Workspace,
        cfg: Settings,
        backbone: Backbone,
        device: torch.device,
        args: argparse.Namespace,
        workers: int = 1,
    ):
        self.category, self.workspace, self.backbone = category, workspace, backbone
        self.device, self.args, self.workers = device, args, workers
        self.settings, self.view = cfg.pseudo_labels, view_of(category, cfg)
        self.label_run = LabelRun(category, workspace)
        self.proposer: Proposer | None = None

    def run(self) -> None:
        if self.begin():
            self.find_components(slice(None))
            self.cluster()

    def begin(self) -> bool:
        """Check everything, and note what is used; False where there is nothing to do."""
        category, args = self.category, self.args
        print(layout_line(category))
        for warning in quick_check(category):
            print(f"{category.name}: {warning}")
        self.proposer = self.choose_proposer()
        provenance = provenance_of(
            category.train, self.view, self.proposer, self.settings, self.backbone, args.seed
        )
        return self.label_run.begin(provenance, self.proposer, args.overwrite)

    def choose_proposer(self, **changes: str) -> Proposer:
        settings, folder = self.settings.model_copy(update=changes), self.workspace.downloads
        return choose_proposer(self.category.name, settings, folder, self.device, self.args.download)

    def find_components(self, part: slice) -> None:
        """Propose the components of some images, and describe them by their features."""
        proposer = self.proposer
        if proposer is None:  # begun by another process, and not auto once more
            proposer = self.choose_proposer(proposer=self.label_run.provenance["proposer"].split()[0])
        embedding = None
        if "cnn_image" in self.settings.features:
            assert self.backbone.deepest is not None  # `jobs` has it built where a category asks for it
            embedding = CropEmbedding(self.backbone.deepest, self.settings.rotations).to(self.device)
        pictures = list(zip(self.category.train, self.label_run.folders))[part]
        options = self.view, self.settings, embedding, self.device, self.workers
        find_missing(self.category.name, pictures, proposer, *options)

    def cluster(self) -> None:
        """Give the components of all images their labels, and put everything in its place."""
        name, settings, run = self.category.name, self.settings, self.label_run
        count, folders = len(self.category.train), run.folders
        described = [files.read_arrays(folder / COMPONENTS) for folder in folders]
        image_of = np.repeat(np.arange(count), [len(features["area"]) for features in described])
        features = {key: np.concatenate([of_image[key] for of_image in described]) for key in described[0]}
        if not len(image_of):
            raise UserError(
                f"{name}: no parts were found in any training image; parts should stand out from "
                "their background by colour"
            )
        vectors, bandwidth = feature_space(name, features, count, settings, self.backbone, self.args.seed)
        labels = label_components(name, vectors, features["area"][:, 0], image_of, count, bandwidth, settings)
        with run.completing() as provenance:
            bar = ProgressBar(folders, desc=f"{name}: write label maps", unit="image")
            for index, folder in enumerate(bar):
                of_image, components = image_of == index, clustered_map(folder, settings)
                save_label_map(folder / "cluster_map.png", paint(components, labels.clusters[of_image]))
                final = paint(components, labels.labels[of_image])
                save_label_map(folder / "filtered_cluster_map.png", final)
            save_info(run.unfinished.info, provenance, features, vectors, image_of, bandwidth, labels)
        stand_ins = ", ".join(provenance["stand_ins"])
        print(
            f"{name}: {counted(labels.filtered_histogram.shape[1], 'label')}, {len(labels.trusted)} of "
            f"{counted(count, 'image')} trusted, {counted(labels.groups.max() + 1, 'kind')} of images"
            + (f" (stand-ins: {stand_ins})" if stand_ins else "")
        )


if __name__ == "__main__":
    run_script(main)
