"""The files that stage 1 writes: about each image, and about the whole category."""

from __future__ import annotations

from pathlib import Path

from csad.data import files, images
from csad.pseudo_labels import clustering, masks
from csad.pseudo_labels.proposers import Proposals

import cv2
import numpy as np

PICTURE = 640  # side of feature.png
GROUNDING = "grounding_mask.png"
REFINED = "refined_masks.png"  # per image, written last of the masks: where it lies, they are all there


def grounding_map(instances: masks.PackedMasks) -> np.ndarray:
    """Instances -> label map (H, W) with the 255 largest of them, small ones on top."""
    return masks.merge(masks.largest(instances))


def save_masks(folder: Path, proposals: Proposals, candidates: masks.PackedMasks | None, refined: np.ndarray) -> None:
    if proposals.grounding is not None:
        save_label_map(folder / GROUNDING, grounding_map(proposals.grounding))
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
    images_in_all = len(found.kinds)
    usual = clustering.usual_number(np.bincount(image_of, minlength=images_in_all))
    size = f"{used['picture_size']}x{used['picture_size']}, whatever that of the pictures" if used["picture_size"] else "native"
    files.write_arrays(info / "all_component_feats.npz", image=image_of, cluster=found.clusters, label=found.labels,
                       **features)
    files.write_array(info / "raw_component_histogram.npy", found.raw_histogram)
    files.write_array(info / "component_num_mode.npy", np.array(usual))
    files.write_image(info / "feature.png", draw_clusters(vectors, found.labels))
    files.write_text(info / "info.txt", "\n".join([
        f"proposer: {used['proposer']}", f"size of proposals, features and maps: {size}",
        f"checkpoints: {sorted(used['checkpoints'])}",
        f"backbone: {used['backbone']}", f"stand_ins: {used['stand_ins']}",
        f"components: {len(image_of)}", f"components in most images: {usual}", f"bandwidth: {bandwidth:.6g}",
        f"clusters: {found.number_of_clusters}", f"labels: {found.filtered_histogram.shape[1]}",
        f"images of each kind: {np.bincount(found.kinds[found.kinds >= 0]).tolist()}",
        f"trusted images: {len(found.trusted)} of {images_in_all}"]) + "\n")
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
