"""What stage 1 does with one picture by itself: its masks, their algebra, the components' shallow features, and its files.

PyTorch stays away from here: processes that are started for this work are ready in half a second without it.
"""

from __future__ import annotations

from pathlib import Path

from csad.data import files, images, label_colours
from csad.pseudo_labels import components, masks
from csad.pseudo_labels.proposers import Proposals, Proposer
from csad.settings import PseudoLabelSettings

import numpy as np

GROUNDING = "grounding_mask.png"
REFINED = "refined_masks.png"  # written last of the masks: where it lies, they are all there
COMPONENTS = "components.npz"  # the features: where it lies, the picture is done


def find_components(
    picture: tuple[Path, Path],
    proposer: Proposer,
    view: images.View,
    settings: PseudoLabelSettings,
    with_features: bool,
) -> None:
    """Propose the components of one picture and, ``with_features``, describe them by the shallow ones.

    Args:
        picture: its path, and the folder of its files.
    """
    path, folder = picture
    pixels = read(path, view, proposer.working_size)
    propose(pixels, folder, proposer, settings)
    if with_features:
        files.write_arrays(folder / COMPONENTS, **describe(pixels, clustered_map(folder, settings))[0])


def read(path: Path, view: images.View, size: int | None) -> np.ndarray:
    """A picture (H, W, 3) uint8, squeezed to (size, size) or at its native size."""
    return view.read_native(path) if size is None else view.read([path], size=size)[0].transpose(1, 2, 0)


def describe(picture: np.ndarray, labels: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """`components.shallow_features` of the components in a label map (H, W), in the order of their indices."""
    return components.shallow_features(picture, masks.label_masks(labels, masks.components_in_sight(labels)))


def propose(image: np.ndarray, folder: Path, proposer: Proposer, settings: PseudoLabelSettings) -> None:
    """Propose and refine the masks of an image (H, W, 3), and save them; where that is done already, nothing happens."""
    if not (folder / REFINED).exists():
        proposals = proposer.propose(image)
        save_masks(folder, proposals, *refine(proposals, settings))


def clustered_map(folder: Path, settings: PseudoLabelSettings) -> np.ndarray:
    """The label map (H, W) whose components are clustered.

    With ``no_sam`` it holds Grounding DINO's instances as they are; split and combined, they are for logical synthesis.
    """
    grounding = folder / GROUNDING
    return images.read_mask(grounding if settings.no_sam and grounding.exists() else folder / REFINED)


def refine(
    proposals: Proposals, settings: PseudoLabelSettings
) -> tuple[masks.PackedMasks | None, np.ndarray]:
    """The order of operations of docs/method.md: proposals -> candidate masks, if any, and label map (H, W)."""
    candidates = None
    if proposals.masks is not None:
        candidates = masks.split_components(proposals.masks)
        if proposals.grounding is not None and settings.inside_grounding:
            candidates = masks.inside_grounding(candidates, proposals.grounding.union())
        candidates = masks.without_background(candidates, proposals.background)
        if proposals.grounding_background is not None:
            candidates = masks.without_background(candidates, proposals.grounding_background)
        candidates = masks.largest(candidates)
    if proposals.grounding is not None and settings.no_sam:
        instances = masks.split_components(masks.label_masks(grounding_map(proposals.grounding)))
        return candidates, masks.merge(masks.combine(masks.largest(instances)))
    assert candidates is not None  # a proposer leaves them out only where instances take their place
    return candidates, masks.merge(masks.combine(candidates))


def grounding_map(instances: masks.PackedMasks) -> np.ndarray:
    """Instances -> label map (H, W) with the 255 largest of them, small ones on top."""
    return masks.merge(masks.largest(instances))


def save_masks(
    folder: Path, proposals: Proposals, candidates: masks.PackedMasks | None, refined: np.ndarray
) -> None:
    if proposals.grounding is not None:
        save_label_map(folder / GROUNDING, grounding_map(proposals.grounding))
    if proposals.grounding_background is not None:
        mask = proposals.grounding_background.astype(np.uint8) * 255
        files.write_image(folder / "grounding_background.png", mask)
    if candidates is not None:
        save_label_map(folder / "all_masks.png", masks.merge(candidates))
    files.write_image(folder / "background.jpg", proposals.background.astype(np.uint8) * 255)
    save_label_map(folder / REFINED, refined)


def save_label_map(path: Path, labels: np.ndarray) -> None:
    """Write a label map, and before it its preview in colour."""
    files.write_image(path.with_name(f"{path.stem}_color.png"), label_colours.colour_labels(labels))
    files.write_image(path, labels)
