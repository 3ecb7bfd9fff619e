"""Stage 1: turn the training images of each category into semantic pseudo-labels.

A proposer cuts every image into masks of parts; mask algebra makes one clean set of components of them; features of all
components are clustered, so that the same part gets the same label in every image. Images are grouped by how much of
each label they show, and the most ordinary ones of each group are trusted.

Writes datasets/masks/{category}/{image}/ (filtered_cluster_map.png is the pseudo-label map) and
datasets/masks/{category}/info/. Interrupted, it continues with the image at which it stopped. Pseudo-labels made by
others are used as they are. docs/METHOD.md section 1; proposals and maps have 256x256 pixels, like what the networks see.

--proposer says where the masks come from: grounded_sam (Grounding DINO and SAM-HQ, the method's own), sam (SAM-HQ alone),
classical (image processing, no download), or auto: the first of them for which prompt and checkpoints are there.
"""

from __future__ import annotations

import argparse
import shutil
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

import settings
from command_line import common_options, select
from data import files, images, layouts, records
from data.checks import quick_check
from data.workspace import PseudoLabels, Workspace
from errors import UserError, run_script
from models.backbone import Backbone
from models.device import choose_device
from pseudo_labels import checkpoints, clustering, components, masks
from pseudo_labels.grounded_sam import GroundedSamProposer, SamProposer
from pseudo_labels.proposers import Proposals, Proposer
from standins.classical import ClassicalProposer
from training.stage import agreed_backbone, run_jobs, view_of

PICTURE = 640  # side of feature.png
REFINED = "refined_masks.png"  # per image, written last of the masks: where it lies, they are all there
COMPONENTS = "components.npz"  # per image, its features: where it lies, the image is done
IMAGES_AT_ONCE = 16  # whose components are described together on a GPU; a CPU gains nothing from more than one


def main() -> None:
    parser = common_options(__doc__)
    own = parser.add_argument_group("options of this stage")
    own.add_argument("--proposer", dest="pseudo_labels.proposer", default=argparse.SUPPRESS, metavar="NAME",
                     help="auto, grounded_sam, sam or classical; the same as --pseudo_labels.proposer")
    own.add_argument("--save_all_masks", dest="pseudo_labels.save_all_masks", action="store_const", const="true",
                     default=argparse.SUPPRESS, help="write all_masks.png also where it is not needed, which takes long")
    own.add_argument("--download", action="store_true", help="fetch missing checkpoints into WORKSPACE/ckpt")
    args = parser.parse_args()
    workspace, _, categories, chosen = select(args)
    device = choose_device(args.device)
    with workspace.lock():
        # Only cnn_image costs time; its network is left out where nobody asked for it.
        with_deepest = any("cnn_image" in one.pseudo_labels.features for one in chosen.values())
        backbone = agreed_backbone(args, workspace, with_deepest).to(device)
        run_jobs({category.name: partial(label_category, category, workspace, chosen[category.name], backbone, device, args)
                  for category in categories})


def label_category(category: layouts.Category, workspace: Workspace, all_settings: settings.Settings, backbone: Backbone,
                   device: torch.device, args: argparse.Namespace) -> None:
    print(category.layout_line)
    for warning in quick_check(category):
        print(f"{category.name}: {warning}")
    chosen = all_settings.pseudo_labels
    proposer = choose_proposer(category.name, chosen, workspace.downloads, device, args.download)
    paths, view = category.train, view_of(category, all_settings)
    used = {"settings": chosen.model_dump(), "images": view.record, "proposer": proposer.name,
            "checkpoints": proposer.checkpoints, **records.inputs(
                paths, args.seed, backbone, [f"proposer {proposer.name}"] if proposer.is_stand_in else [])}
    finished = workspace.pseudo_labels(category.name)
    outputs = [*(finished.image(category.key(path)) / "filtered_cluster_map.png" for path in paths), finished.histogram,
               finished.trusted]
    record = records.Record(finished.record, used, outputs)
    # Beside what is there, so that nothing finished is harmed before the new is complete.
    labels = workspace.unfinished_pseudo_labels(category.name)
    folders = [labels.image(category.key(path)) for path in paths]
    begun = labels.root / "begun.json"
    changes = records.difference(files.read_json(begun, keys=("settings",)), records.as_json(used)) if begun.exists() else []
    if changes or not begun.exists() or record.path.exists():
        refuse_unknown_files(record, [finished.image(folder.name) for folder in folders], args.overwrite)
        if record.begin(args.overwrite) == records.SKIP:
            print(f"{category.name}: pseudo-labels are there already, skipped (--overwrite starts over)")
            return
    if changes:
        if not args.overwrite:
            raise UserError(f"{labels.root} holds work begun with something else ({'; '.join(changes[:4])}); --overwrite starts "
                            "over, another --workspace keeps both")
        shutil.rmtree(labels.root)
    proposer.load()  # a bad checkpoint leaves everything as it was
    files.write_json(begun, used)
    embedding = components.CropEmbedding(backbone.deepest, chosen.rotations).to(device) if (
        "cnn_image" in chosen.features) else None
    at_once = 1 if device.type == "cpu" else IMAGES_AT_ONCE
    with tqdm(total=len(paths), desc=f"{category.name}: find components", unit="image") as bar:
        # Always the same images together, so that a resumed run repeats the very same numbers.
        for first in range(0, len(paths), at_once):
            group = slice(first, first + at_once)
            if not all((folder / COMPONENTS).exists() for folder in folders[group]):
                pictures = [picture.transpose(1, 2, 0) for picture in view.read_small(paths[group])]
                label_maps = [refined_masks(picture, folder, proposer, chosen)
                              for picture, folder in zip(pictures, folders[group])]
                for folder, features in zip(folders[group], describe(pictures, label_maps, embedding)):
                    files.write_arrays(folder / COMPONENTS, **features)
            bar.update(len(folders[group]))

    refined_maps = [images.read_mask(folder / REFINED) for folder in folders]
    described = [files.read_arrays(folder / COMPONENTS) for folder in folders]
    image_of = np.repeat(np.arange(len(paths)), [len(one["area"]) for one in described])
    features = {name: np.concatenate([one[name] for one in described]) for name in described[0]}
    if not len(image_of):
        raise UserError(f"{category.name}: no parts were found in any training image; parts should stand out from "
                        "their background by colour")
    vectors, bandwidth = feature_space(category.name, features, len(paths), chosen, backbone, args.seed)
    found = clustering.semantic_labels(vectors, features["area"][:, 0], image_of, len(paths), bandwidth,
                                       chosen.one_histogram_cluster and not chosen.variants, chosen.variants,
                                       chosen.lookalikes)
    if not found.filtered_histogram.shape[1]:
        raise UserError(f"{category.name}: clustering the {len(image_of)} components left no label (bandwidth "
                        f"{bandwidth:.3g}); try a larger --pseudo_labels.bandwidth or other --pseudo_labels.features")

    for index, folder in enumerate(tqdm(folders, desc=f"{category.name}: write label maps", unit="image")):
        own = image_of == index
        save_label_map(folder / "cluster_map.png", paint(refined_maps[index], found.clusters[own]))
        save_label_map(folder / "filtered_cluster_map.png", paint(refined_maps[index], found.labels[own]))
    save_info(labels.info, used, features, vectors, image_of, bandwidth, found)
    replace(finished, [*folders, labels.info])
    record.finish()
    shutil.rmtree(labels.root)
    print(f"{category.name}: {found.filtered_histogram.shape[1]} labels, {len(found.trusted)} of {len(paths)} images "
          f"trusted, {found.kinds.max() + 1} kinds of images{note(used)}")


def choose_proposer(category: str, chosen: settings.PseudoLabelSettings, folder: Path, device: torch.device,
                    download: bool) -> Proposer:
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
            print(f"{category}: proposals by {'the classical stand-in' if kind == 'classical' else 'SAM-HQ alone'} instead "
                  f"of {'SAM-HQ and Grounding DINO' if chosen.text_prompt else 'SAM-HQ'}; to have those, put "
                  f"{' and '.join(one.file for one in missing)} into {folder}, or let --download do it "
                  f"({sum(one.megabytes for one in missing):g} MB)")
    if kind != "grounded_sam" and (chosen.no_sam or chosen.inside_grounding):
        print(f"{category}: no_sam and inside_grounding are for Grounding DINO and do not apply to {kind} proposals")
    if kind == "classical":
        return ClassicalProposer(chosen.container)
    if kind == "sam":
        return SamProposer(chosen, checkpoints.obtain(sam, folder, download), device, bool(chosen.text_prompt))
    if not chosen.text_prompt:
        raise UserError(f"{category}: Grounding DINO has to be told what the parts are called; say so with "
                        "--pseudo_labels.text_prompt 'screw . nut .' or in the category's file, or take --proposer sam")
    return GroundedSamProposer(chosen, checkpoints.obtain(sam, folder, download),
                               checkpoints.obtain(grounding_dino, folder, download),
                               checkpoints.obtain_text_encoder(folder, download), device)


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
        raise UserError(f"{unknown[0]} was made by something else, and {missing[0]} is missing; complete those "
                        "pseudo-labels, or make new ones with --overwrite")


def replace(finished: PseudoLabels, folders: list[Path]) -> None:
    """Put new folders in the place of old ones; label maps of test images, which stage 2 made, stay."""
    finished.root.mkdir(parents=True, exist_ok=True)
    for folder in folders:
        place = finished.root / folder.name
        if place.exists():
            shutil.rmtree(place)
        folder.rename(place)


def refined_masks(image: np.ndarray, folder: Path, proposer: Proposer, chosen: settings.PseudoLabelSettings) -> np.ndarray:
    """The label map (H, W) of an image's components: the one made before, or else proposed now and saved."""
    if (folder / REFINED).exists():
        return images.read_mask(folder / REFINED)
    proposals = proposer.propose(image)
    candidates, refined = refine(proposals, chosen)
    save_masks(folder, proposals, candidates, refined)
    return refined


def refine(proposals: Proposals, chosen: settings.PseudoLabelSettings) -> tuple[np.ndarray | None, np.ndarray]:
    """The order of operations of docs/METHOD.md: proposals -> candidate masks (N, H, W), if any, and label map (H, W)."""
    candidates = None
    if proposals.masks is not None:
        candidates = masks.split_components(proposals.masks)
        if proposals.grounding is not None and chosen.inside_grounding:
            candidates = masks.inside_grounding(candidates, proposals.grounding.any(0))
        candidates = masks.without_background(candidates, proposals.background)
        if proposals.grounding_background is not None:
            candidates = masks.without_background(candidates, proposals.grounding_background)
        candidates = masks.largest(candidates)
    if proposals.grounding is not None and chosen.no_sam:
        instances = masks.split_components(masks.label_masks(grounding_map(proposals.grounding)))
        return candidates, masks.merge(masks.combine(masks.largest(instances)))
    return candidates, masks.merge(masks.combine(candidates))


def grounding_map(instances: np.ndarray) -> np.ndarray:
    """Instances (M, H, W) -> label map (H, W) with the 255 largest of them, small ones on top."""
    return masks.merge(masks.largest(instances))


def describe(pictures: list[np.ndarray], label_maps: list[np.ndarray],
             embedding: components.CropEmbedding | None) -> list[dict[str, np.ndarray]]:
    """For each image the features of its components, each (n, ...), in the order of their indices in the label map."""
    described, crops = zip(*(components.shallow_features(picture, masks.label_masks(labels))
                             for picture, labels in zip(pictures, label_maps)))
    if embedding is not None:
        deep = embedding(torch.from_numpy(np.concatenate(crops)).permute(0, 3, 1, 2)).cpu().numpy()
        for features, own in zip(described, np.split(deep, np.cumsum([len(one) for one in crops])[:-1])):
            features["cnn_image"] = own
    return list(described)


def feature_space(category: str, features: dict[str, np.ndarray], images: int, chosen: settings.PseudoLabelSettings,
                  backbone: Backbone, seed: int) -> tuple[np.ndarray, float]:
    """The vectors (components, D) to cluster, and MeanShift's bandwidth among them.

    The published network's cnn_image is projected as published, and a configured bandwidth is in units of that. Anything
    else is brought to units of its own, in which the bandwidth is 1.
    """
    if not backbone.is_stand_in and chosen.features == ["cnn_image"]:
        deep = features["cnn_image"]
        vectors = deep @ components.random_projection(deep.shape[1], seed)
        if chosen.bandwidth != "auto":
            return vectors, chosen.bandwidth
        bandwidth = clustering.estimate_bandwidth(vectors, images)
        print(f"{category}: no bandwidth is set for MeanShift, estimated {bandwidth:.3g}")
        return vectors, bandwidth
    print(f"{category}: clustering {', '.join(chosen.features)} with bandwidth {clustering.UNIT_BANDWIDTH} in units of "
          "their own; a configured one is for wide_resnet50_2's cnn_image alone")
    return clustering.comparable({name: features[name] for name in chosen.features}), clustering.UNIT_BANDWIDTH


def paint(refined: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Replace the indices that occur in a label map (H, W), in ascending order, by their labels; (H, W) uint8."""
    table = np.zeros(256, np.uint8)
    indices = np.unique(refined)
    table[indices[indices > 0]] = labels
    return table[refined]


def save_masks(folder: Path, proposals: Proposals, candidates: np.ndarray | None, refined: np.ndarray) -> None:
    if proposals.grounding is not None:
        save_label_map(folder / "grounding_mask.png", grounding_map(proposals.grounding))
    if proposals.grounding_background is not None:
        files.write_image(folder / "grounding_background.png", proposals.grounding_background.astype(np.uint8) * 255)
    if candidates is not None:
        save_label_map(folder / "all_masks.png", masks.merge(candidates))
    files.write_image(folder / "background.jpg", proposals.background.astype(np.uint8) * 255)
    save_label_map(folder / REFINED, refined)


def save_label_map(path: Path, labels: np.ndarray) -> None:
    """Write a label map, and before it its preview in colour."""
    files.write_image(path.with_name(f"{path.stem}_color.png"), images.colour_labels(labels))
    files.write_image(path, labels)


def save_info(info: Path, used: dict, features: dict[str, np.ndarray], vectors: np.ndarray, image_of: np.ndarray,
              bandwidth: float, found: clustering.SemanticLabels) -> None:
    """Write what is known about the whole category; what the next stage reads comes last."""
    labels = found.filtered_histogram.shape[1]
    modes = clustering.usual_numbers(found.labels, image_of, found.trusted, len(found.kinds), labels)
    files.write_arrays(info / "all_component_feats.npz", image=image_of, cluster=found.clusters, label=found.labels,
                       **features)
    files.write_array(info / "raw_component_histogram.npy", found.raw_histogram)
    files.write_array(info / "component_num_mode.npy", modes)
    files.write_image(info / "feature.png", draw_clusters(vectors, found.labels))
    files.write_text(info / "info.txt", "\n".join([
        f"proposer: {used['proposer']}", f"checkpoints: {sorted(used['checkpoints'])}",
        f"backbone: {used['backbone']}", f"stand_ins: {used['stand_ins']}",
        f"components: {len(image_of)}", f"bandwidth: {bandwidth:.6g}", f"clusters: {found.raw_histogram.shape[1]}",
        f"labels: {labels}", f"usual number of each label: {modes.tolist()}",
        f"images of each kind: {np.bincount(found.kinds[found.kinds >= 0]).tolist()}",
        f"trusted images: {len(found.trusted)} of {len(found.kinds)}"]) + "\n")
    files.write_array(info / "filtered_component_histogram.npy", found.filtered_histogram)
    files.write_array(info / "filtered_histogram_indices.npy", found.trusted)


def draw_clusters(vectors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Scatter plot of the components on their first two principal axes, coloured by label; no label is grey."""
    centred = vectors - vectors.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    flat = np.zeros((len(vectors), 2))
    flat[:, :min(2, len(axes))] = centred @ axes[:2].T
    low, high = flat.min(0), flat.max(0)
    places = (20 + (flat - low) / np.maximum(high - low, 1e-9) * (PICTURE - 40)).astype(int)
    colours = images.colour_labels(labels.astype(np.uint8))
    colours[labels == 0] = 200
    picture = np.full((PICTURE, PICTURE, 3), 255, np.uint8)
    for place, colour in zip(places.tolist(), colours.tolist()):
        cv2.circle(picture, place, 3, colour, cv2.FILLED, cv2.LINE_AA)
    return picture


def note(used: dict) -> str:
    return f" (stand-ins: {', '.join(used['stand_ins'])})" if used["stand_ins"] else ""


if __name__ == "__main__":
    run_script(main)
