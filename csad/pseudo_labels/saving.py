"""The files that stage 1 writes about a whole category; those about each picture are written by `one_picture`."""

from __future__ import annotations

from pathlib import Path

from csad.data import files, label_colours
from csad.pseudo_labels import clustering

import cv2
import numpy as np

PICTURE = 640  # side of feature.png


def save_info(
    info: Path,
    provenance: dict,
    features: dict[str, np.ndarray],
    vectors: np.ndarray,
    image_of: np.ndarray,
    bandwidth: float,
    semantic: clustering.SemanticLabels,
) -> None:
    """Write what is known about the whole category; what the next stage reads comes last."""
    images_in_all = len(semantic.groups)
    counts = np.bincount(image_of, minlength=images_in_all)
    most_common = int(np.bincount(counts).argmax())  # the smaller number in a draw
    side = provenance["picture_size"]
    size = f"{side}x{side}, whatever that of the pictures" if side else "native"
    components = {"image": image_of, "cluster": semantic.clusters, "label": semantic.labels}
    files.write_arrays(info / "all_component_feats.npz", **components, **features)
    files.write_array(info / "raw_component_histogram.npy", semantic.raw_histogram)
    files.write_array(info / "component_num_mode.npy", np.array(most_common))
    files.write_image(info / "feature.png", draw_clusters(vectors, semantic.labels))
    lines = [
        f"proposer: {provenance['proposer']}",
        f"size of proposals, features and maps: {size}",
        f"checkpoints: {sorted(provenance['checkpoints'])}",
        f"backbone: {provenance['backbone']}",
        f"stand_ins: {provenance['stand_ins']}",
        f"components: {len(image_of)}",
        f"components in most images: {most_common}",
        f"bandwidth: {bandwidth:.6g}",
        f"clusters: {semantic.number_of_clusters}",
        f"labels: {semantic.filtered_histogram.shape[1]}",
        f"images of each kind: {np.bincount(semantic.groups[semantic.groups >= 0]).tolist()}",
        f"trusted images: {len(semantic.trusted)} of {images_in_all}",
    ]
    files.write_text(info / "info.txt", "\n".join(lines) + "\n")
    files.write_array(info / "filtered_component_histogram.npy", semantic.filtered_histogram)
    files.write_array(info / "filtered_histogram_indices.npy", semantic.trusted)


def draw_clusters(vectors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Scatter plot of the components on their first two principal axes, coloured by label; no label is grey."""
    centred = vectors - vectors.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    flat = np.zeros((len(vectors), 2))
    flat[:, : min(2, len(axes))] = centred @ axes[:2].T
    low, high = flat.min(0), flat.max(0)
    positions = (20 + (flat - low) / np.maximum(high - low, 1e-9) * (PICTURE - 40)).astype(int)
    colours = label_colours.colour_labels(labels.astype(np.uint8))
    colours[labels == 0] = 200
    picture = np.full((PICTURE, PICTURE, 3), 255, np.uint8)
    for position, colour in zip(positions.tolist(), colours.tolist()):
        cv2.circle(picture, position, 3, colour, cv2.FILLED, cv2.LINE_AA)
    return picture
