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
import shutil
from functools import partial
from pathlib import Path

from csad import settings
from csad.cli import common_options, select, with_cluster
from csad.data import downloads, files, layouts, records
from csad.data.checks import header_check
from csad.data.overview import layout_line
from csad.data.workspace import PseudoLabels, Workspace
from csad.errors import UserError, run_script
from csad.processes import map_pictures, workers_option
from csad.progress import ProgressBar
from csad.pseudo_labels import beyond_clustering, checkpoints, clustering, masks, one_picture
from csad.pseudo_labels.crop_embedding import CropEmbedding, random_projection
from csad.pseudo_labels.grounded_sam import GroundedSamProposer, SamProposer
from csad.pseudo_labels.one_picture import COMPONENTS, REFINED, clustered_map, propose, save_label_map
from csad.pseudo_labels.proposers import Proposer
from csad.pseudo_labels.saving import save_info
from csad.standins.classical import ClassicalProposer
from csad.training.jobs import Task, run_jobs
from csad.training.stage import agreed_backbone, view_of

import numpy as np
import torch

from models.backbone import CROP_WEIGHTS, PUBLISHED, Backbone, fingerprint
from models.device import choose_training_device, forbid_tf32

IMAGES_PER_TASK = 64  # of a Ray cluster
MOST_CLUSTERS = 30  # without a warning: few products have so many kinds of parts
IMAGES_AT_ONCE = (
    16  # whose components are described together on a GPU; a CPU gains nothing from more than one
)


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
    workspace, _, categories, chosen = select(args)
    device = choose_training_device(args.device)
    forbid_tf32()
    # Only cnn_image costs time; its network is left out where nobody asked for it.
    with_deepest = any("cnn_image" in one.pseudo_labels.features for one in chosen.values())
    backbone = agreed_backbone(args, workspace, device, with_deepest)
    tasks = {}
    for category in categories:
        labelling = Labelling(
            category,
            workspace,
            chosen[category.name],
            backbone,
            device,
            args,
            1 if args.ray else args.workers,
        )  # a cluster fills its cores by itself
        if not args.ray:
            tasks[category.name] = Task(category, None, labelling.run)
            continue
        first, images_in_all = f"{category.name}: begin", len(category.train)
        tasks[first] = Task(category, None, labelling.begin, 1)
        parts = {
            f"{category.name}: images {start + 1} to {min(start + IMAGES_PER_TASK, images_in_all)}": slice(
                start, start + IMAGES_PER_TASK
            )
            for start in range(0, images_in_all, IMAGES_PER_TASK)
        }
        for name, part in parts.items():
            tasks[name] = Task(
                category, None, partial(labelling.find_components, part), IMAGES_PER_TASK, (first,)
            )
        tasks[category.name] = Task(category, None, labelling.cluster, None, tuple(parts))
    return tasks


class Labelling:
    """Stage 1 of one category, in three steps that hand on nothing but files."""

    def __init__(
        self,
        category: layouts.Category,
        workspace: Workspace,
        chosen: settings.Settings,
        backbone: Backbone,
        device: torch.device,
        args: argparse.Namespace,
        workers: int = 1,
    ):
        self.workers = workers
        self.category, self.workspace, self.backbone, self.device, self.args = (
            category,
            workspace,
            backbone,
            device,
            args,
        )
        self.chosen, self.paths, self.view = chosen.pseudo_labels, category.train, view_of(category, chosen)
        self.finished = workspace.pseudo_labels(category.name)
        # Beside what is there, so that nothing finished is harmed before the new is complete.
        self.labels = workspace.unfinished_pseudo_labels(category.name)
        self.folders = [self.labels.image(category.key(path)) for path in self.paths]
        self.begun = self.labels.root / "begun.json"
        self.proposer: Proposer | None = None

    def run(self) -> None:
        if self.begin():
            self.find_components(slice(None))
            self.cluster()

    def begin(self) -> bool:
        """Check everything, and note what is used; False where there is nothing to do."""
        category, overwrite = self.category, self.args.overwrite
        print(layout_line(category))
        for warning in header_check(category):
            print(f"{category.name}: {warning}")
        proposer = self.proposer = self.choose_proposer()
        used = {
            "pseudo_labels": self.chosen.model_dump(),
            "images": self.view.record,
            "proposer": proposer.name,
            "picture_size": proposer.working_size,
            "checkpoints": proposer.checkpoints | self.crop_weights(),
            **records.inputs(self.paths, self.args.seed, self.backbone, self.stand_ins(proposer)),
        }
        record = self.record(used)
        superseded = record.superseded() if overwrite else None
        changes = records.difference(self.used(), records.as_json(used)) if self.begun.exists() else []
        if overwrite and self.begun.exists() and files.read_json(self.begun)["overwrites"] != superseded:
            changes.append("begun by another run")
        if changes or not self.begun.exists() or record.path.exists():
            refuse_unknown_files(
                record, [self.finished.image(folder.name) for folder in self.folders], overwrite
            )
            if record.plan(overwrite) == records.SKIP:
                print(f"{category.name}: pseudo-labels are there already, skipped (--overwrite starts over)")
                return False
        if changes:
            if not overwrite:
                raise UserError(
                    f"{self.labels.root} was made with different settings or images ({'; '.join(changes[:4])}); "
                    "--overwrite starts over, another --workspace keeps both"
                )
            shutil.rmtree(self.labels.root)
        proposer.load()  # a bad checkpoint leaves everything as it was
        files.write_json(self.begun, {"used": used, "overwrites": superseded})
        return True

    def choose_proposer(self, **changes: str) -> Proposer:
        return choose_proposer(
            self.category.name,
            self.chosen.model_copy(update=changes),
            self.workspace.downloads,
            self.device,
            self.args.download,
        )

    def crop_weights(self) -> dict[str, str]:
        """Origin and fingerprint of the published network's weights for cnn_image, which are not those of the encoder."""
        backbone = self.backbone
        if "cnn_image" not in self.chosen.features or backbone.deepest is None or backbone.name != PUBLISHED:
            return {}
        return {backbone.deepest_origin: fingerprint(backbone.deepest)}

    def stand_ins(self, proposer: Proposer) -> list[str]:
        """What, besides the backbone, stands in for the published thing."""
        crops = (
            []
            if self.backbone.has_published_crops
            else [f"cnn_image by {origin}" for origin in self.crop_weights()]
        )
        return crops + ([f"proposer {proposer.name}"] if proposer.is_stand_in else [])

    def used(self) -> dict:
        return files.read_json(self.begun, keys={"used": dict, "overwrites": (str, type(None))})["used"]

    def record(self, used: dict) -> records.Record:
        outputs = [self.finished.image(folder.name) / "filtered_cluster_map.png" for folder in self.folders]
        return records.Record(
            self.finished.record, used, [*outputs, self.finished.histogram, self.finished.trusted]
        )

    def find_components(self, part: slice) -> None:
        """Propose and describe the components of images that have none yet."""
        paths, folders, chosen = self.paths[part], self.folders[part], self.chosen
        proposer = self.proposer or self.choose_proposer(
            proposer=self.used()["proposer"].split()[0]
        )  # not auto once more
        embedding = (
            CropEmbedding(self.backbone.deepest, chosen.rotations).to(self.device)
            if ("cnn_image" in chosen.features)
            else None
        )
        if not proposer.checkpoints:  # no network, which would use all cores by itself, or the GPU
            self.find_in_processes(paths, folders, proposer, with_features=embedding is None)
            if embedding is None:
                return
        at_once = 1 if self.device.type == "cpu" else IMAGES_AT_ONCE
        what = "find components" if proposer.checkpoints else "describe components"
        with ProgressBar(total=len(paths), desc=f"{self.category.name}: {what}", unit="image") as bar:
            # Always the same images together, so that a resumed run repeats the very same numbers.
            for first in range(0, len(paths), at_once):
                group = slice(first, first + at_once)
                if not all((folder / COMPONENTS).exists() for folder in folders[group]):
                    pictures = [
                        one_picture.read(path, self.view, proposer.working_size) for path in paths[group]
                    ]
                    for picture, folder in zip(pictures, folders[group]):
                        propose(picture, folder, proposer, chosen)
                    label_maps = [clustered_map(folder, chosen) for folder in folders[group]]
                    for folder, features in zip(folders[group], describe(pictures, label_maps, embedding)):
                        files.write_arrays(folder / COMPONENTS, **features)
                bar.update(len(folders[group]))

    def find_in_processes(
        self, paths: list[Path], folders: list[Path], proposer: Proposer, with_features: bool
    ) -> None:
        """`one_picture.find_components` of those pictures of which that is not done yet."""
        last_written = COMPONENTS if with_features else REFINED
        work = partial(
            one_picture.find_components,
            proposer=proposer,
            view=self.view,
            chosen=self.chosen,
            with_features=with_features,
        )
        pending = [
            (path, folder) for path, folder in zip(paths, folders) if not (folder / last_written).exists()
        ]
        with ProgressBar(
            total=len(paths),
            initial=len(paths) - len(pending),
            desc=f"{self.category.name}: find components",
            unit="image",
        ) as bar:
            map_pictures(work, pending, self.workers, bar)

    def cluster(self) -> None:
        """Give the components of all images their labels, and put everything in its place."""
        name, paths, folders, chosen, labels = (
            self.category.name,
            self.paths,
            self.folders,
            self.chosen,
            self.labels,
        )
        described = [files.read_arrays(folder / COMPONENTS) for folder in folders]
        image_of = np.repeat(np.arange(len(paths)), [len(one["area"]) for one in described])
        features = {name: np.concatenate([one[name] for one in described]) for name in described[0]}
        if not len(image_of):
            raise UserError(
                f"{name}: no parts were found in any training image; parts should stand out from "
                "their background by colour"
            )
        vectors, bandwidth = feature_space(name, features, len(paths), chosen, self.backbone, self.args.seed)
        found = label_components(
            name, vectors, features["area"][:, 0], image_of, len(paths), bandwidth, chosen
        )
        for index, folder in enumerate(ProgressBar(folders, desc=f"{name}: write label maps", unit="image")):
            own, components_map = image_of == index, clustered_map(folder, chosen)
            save_label_map(folder / "cluster_map.png", paint(components_map, found.clusters[own]))
            save_label_map(folder / "filtered_cluster_map.png", paint(components_map, found.labels[own]))
        used = self.used()
        save_info(labels.info, used, features, vectors, image_of, bandwidth, found)
        replace(self.finished, [*folders, labels.info])
        self.record(used).finish()
        shutil.rmtree(labels.root)
        print(
            f"{name}: {found.filtered_histogram.shape[1]} labels, {len(found.trusted)} of {len(paths)} images "
            f"trusted, {found.kinds.max() + 1} kinds of images{note(used)}"
        )


def choose_proposer(
    category: str, chosen: settings.PseudoLabelSettings, folder: Path, device: torch.device, download: bool
) -> Proposer:
    """The proposer that the settings ask for; ``auto`` says what it takes, and how to get the method's own.

    Args:
        folder: where checkpoints lie.
        download: fetch those that are missing.

    Raises:
        UserError: a checkpoint is missing, or the prompt that Grounding DINO needs.
    """
    sam, grounding_dino = checkpoints.SAM[chosen.sam], checkpoints.GROUNDING_DINO[chosen.grounding_dino]
    kind = chosen.proposer
    if kind == "auto":
        needed = [sam, grounding_dino] if chosen.text_prompt else [sam]
        missing = [] if download else [one for one in needed if not (folder / one.file).exists()]
        if not missing:
            kind = "grounded_sam" if chosen.text_prompt else "sam"
            print(f"{category}: proposals by {kind}")
        else:
            kind = "classical" if sam in missing else "sam"
            print(
                f"{category}: proposals by {'the classical stand-in' if kind == 'classical' else 'SAM-HQ alone'} instead "
                f"of {'SAM-HQ and Grounding DINO' if chosen.text_prompt else 'SAM-HQ'}; to have those, put "
                f"{' and '.join(one.file for one in missing)} into {folder}, or let --download do it "
                f"({sum(one.megabytes for one in missing):g} MB)"
            )
    if kind != "grounded_sam" and (chosen.no_sam or chosen.inside_grounding):
        print(
            f"{category}: no_sam and inside_grounding are for Grounding DINO and do not apply to {kind} proposals"
        )
    if kind == "classical":
        return ClassicalProposer(chosen.container)
    if kind == "sam":
        return SamProposer(chosen, downloads.obtain(sam, folder, download), device, bool(chosen.text_prompt))
    if not chosen.text_prompt:
        raise UserError(
            f"{category}: Grounding DINO has to be told what the parts are called; say so with "
            "--pseudo_labels.text_prompt 'screw . nut .' or in the category's file, or take --proposer sam"
        )
    return GroundedSamProposer(
        chosen,
        downloads.obtain(sam, folder, download),
        downloads.obtain(grounding_dino, folder, download),
        checkpoints.obtain_text_encoder(folder, download),
        device,
    )


def refuse_unknown_files(record: records.Record, folders: list[Path], overwrite: bool) -> None:
    """Do not mix with files of unknown origin that are too few to be used as they are.

    Raises:
        UserError: there are some.
    """
    missing = [path for path in record.outputs if not path.exists()]
    if overwrite or record.path.exists() or not missing:
        return
    unknown = [path for folder in folders for path in folder.glob("*.png")]
    if unknown:
        raise UserError(
            f"{unknown[0]} was made by something else, and {missing[0]} is missing; complete those "
            "pseudo-labels, or make new ones with --overwrite"
        )


def replace(finished: PseudoLabels, folders: list[Path]) -> None:
    """Put new folders in the place of old ones; label maps of test images, which stage 2 made, stay."""
    finished.root.mkdir(parents=True, exist_ok=True)
    for folder in folders:
        place = finished.root / folder.name
        if place.exists():
            shutil.rmtree(place)
        folder.rename(place)


def describe(
    pictures: list[np.ndarray], label_maps: list[np.ndarray], embedding: CropEmbedding | None
) -> list[dict[str, np.ndarray]]:
    """For each image the features of its components, each (n, ...), in the order of their indices in the label map."""
    described, crops = zip(
        *(one_picture.describe(picture, labels) for picture, labels in zip(pictures, label_maps))
    )
    if embedding is not None:
        deep = embedding(torch.from_numpy(np.concatenate(crops)).permute(0, 3, 1, 2)).cpu().numpy()
        for features, own in zip(described, np.split(deep, np.cumsum([len(one) for one in crops])[:-1])):
            features["cnn_image"] = own
    return list(described)


def feature_space(
    category: str,
    features: dict[str, np.ndarray],
    images: int,
    chosen: settings.PseudoLabelSettings,
    backbone: Backbone,
    seed: int,
) -> tuple[np.ndarray, float]:
    """The vectors (components, D) to cluster, and MeanShift's bandwidth among them.

    The published network's cnn_image is projected as published; a configured bandwidth is in units of that, and belongs to
    the weights that the published code takes for it. Anything else is brought to units of its own, in which the bandwidth
    is 1.
    """
    if backbone.name == PUBLISHED and chosen.features == ["cnn_image"]:
        deep = features["cnn_image"]
        vectors = deep @ random_projection(deep.shape[1], seed)
        if chosen.bandwidth != "auto" and backbone.has_published_crops:
            return vectors, chosen.bandwidth
        bandwidth = beyond_clustering.estimate_bandwidth(vectors, images)
        reason = (
            "no bandwidth is set for MeanShift"
            if chosen.bandwidth == "auto"
            else (
                f"bandwidth {chosen.bandwidth} belongs to cnn_image by {CROP_WEIGHTS}, not to that by {backbone.deepest_origin}"
            )
        )
        print(f"{category}: {reason}; estimated {bandwidth:.3g}")
        return vectors, bandwidth
    print(
        f"{category}: clustering {', '.join(chosen.features)} with bandwidth {beyond_clustering.UNIT_BANDWIDTH} in units of "
        "their own; a configured one is for wide_resnet50_2's cnn_image alone"
    )
    return beyond_clustering.comparable(
        {name: features[name] for name in chosen.features}
    ), beyond_clustering.UNIT_BANDWIDTH


def label_components(
    category: str,
    vectors: np.ndarray,
    areas: np.ndarray,
    image_of: np.ndarray,
    images: int,
    bandwidth: float,
    chosen: settings.PseudoLabelSettings,
) -> clustering.SemanticLabels:
    """`clustering.semantic_labels` of the published method, or with what the settings add; says how many clusters there are.

    Raises:
        UserError: no label is left, or more than a label map can hold.
    """
    arguments = vectors, areas, image_of, images, bandwidth, chosen.one_histogram_cluster
    found = (
        beyond_clustering.semantic_labels(*arguments, chosen.variants, chosen.lookalikes)
        if (chosen.variants or chosen.lookalikes)
        else clustering.semantic_labels(*arguments)
    )
    if not found.filtered_histogram.shape[1]:
        raise UserError(
            f"{category}: clustering the {len(vectors)} components left no label (bandwidth {bandwidth:.3g}); "
            "try a larger --pseudo_labels.bandwidth or other --pseudo_labels.features"
        )
    if found.clusters.max() > masks.MOST_LABELS:
        raise UserError(
            f"{category}: the components fall into {found.clusters.max()} clusters (bandwidth {bandwidth:.3g}), and "
            f"a label map holds {masks.MOST_LABELS}; try a larger --pseudo_labels.bandwidth"
        )
    count = found.number_of_clusters
    advice = (
        "; where pictures show several kinds of parts, try a smaller --pseudo_labels.bandwidth"
        if count == 1
        else (
            "; if pictures show fewer kinds of parts, try a larger --pseudo_labels.bandwidth"
            if count > MOST_CLUSTERS
            else ""
        )
    )
    print(
        f"{category}: {'warning: ' if advice else ''}{len(vectors)} components make {count} "
        f"cluster{'s' * (count != 1)}{advice}"
    )
    return found


def paint(labels: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Replace the components of a label map (H, W), in ascending order, by their numbers; the rest is 0; (H, W) uint8."""
    table = np.zeros(256, np.uint8)
    table[masks.components_in_sight(labels)] = numbers
    return table[labels]


def note(used: dict) -> str:
    return f" (stand-ins: {', '.join(used['stand_ins'])})" if used["stand_ins"] else ""


if __name__ == "__main__":
    run_script(main)
