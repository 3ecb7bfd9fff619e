"""What stage 2 reads of stage 1 (docs/method.md sections 1 and 2), and whether it fits the data set."""

from __future__ import annotations

from pathlib import Path

from csad.data import files, image_files, images, layouts, records
from csad.data.listing import count as counted
from csad.data.workspace import PseudoLabels, Workspace
from csad.errors import UserError
from csad.progress import ProgressBar
from csad.training.logical_synthesis import label_parts
from csad.training.segmentor_step import TrainingData
from csad.training.targets import fill_class_holes

import numpy as np
from PIL import Image
from torch import Tensor

MADE_BY = "pseudo_label.py"
SQUEEZED = (images.SIZE, images.SIZE)  # size of maps by a proposer that does not see native pictures


def read_stage_1(category: layouts.Category, workspace: Workspace) -> tuple[np.ndarray, int]:
    """Indices of the trusted images (into the sorted training images) and number of classes with background;
    UserError if a file is missing or does not fit the data set."""
    labels = workspace.pseudo_labels(category.name)
    trusted_file, histogram_file = labels.trusted, labels.histogram
    trusted = files.read_array(files.require(trusted_file, MADE_BY))
    histogram = files.read_array(files.require(histogram_file, MADE_BY))
    count = len(category.train)
    if trusted.ndim != 1 or len(trusted) == 0 or trusted.dtype.kind not in "iu":
        raise UserError(f"{trusted_file} should hold a list of image numbers; run {MADE_BY} --overwrite")
    if trusted.min() < 0 or trusted.max() >= count:
        stray = trusted[(trusted < 0) | (trusted >= count)][0]
        raise UserError(
            f"{trusted_file} names image number {stray}, but {category.root / 'train'} has {counted(count, 'image')}; "
            f"run {MADE_BY} --overwrite on these images"
        )
    if histogram.ndim != 2 or histogram.shape[1] == 0:
        raise UserError(
            f"{histogram_file} should have one row per image and one column per component, found shape "
            f"{histogram.shape}; run {MADE_BY} --overwrite"
        )
    return np.unique(trusted), histogram.shape[1] + 1


def require_own_pseudo_labels(
    category: layouts.Category, labels: PseudoLabels, trusted: np.ndarray, train_images_digest: str
) -> None:
    """UserError unless stage 1 saw these training images, and wrote the trusted label maps."""
    folders = [labels.image(category.key(category.train[index])) for index in trusted]
    maps = [path for folder in folders if (path := folder / "filtered_cluster_map.png").exists()]
    records.require_current(labels.record, {"train_images": train_images_digest}, maps, MADE_BY)


def digest_of_label_maps(category: layouts.Category, workspace: Workspace, trusted: np.ndarray) -> str:
    """A digest of the contents that `training_data` reads of the trusted images: label maps, refined masks and backgrounds,
    whoever made them.

    Raises:
        UserError: a label map is missing.
    """
    listing = []
    for index in trusted:
        maps = _maps_of(category, workspace, index)
        digests = [records.digest(path) if path.exists() else None for path in maps]
        listing.append(" ".join(map(str, (category.key(category.train[index]), *digests))))
    return records.digest_lines(listing)


def stand_ins_of_stage_1(category: layouts.Category, workspace: Workspace) -> list[str]:
    """What stage 1 used instead of the real thing; pseudo-labels made by others bring no record and count as real."""
    record = workspace.pseudo_labels(category.name).record
    return records.read_record(record)["used"]["stand_ins"] if record.exists() else []


def training_data(
    category: layouts.Category,
    workspace: Workspace,
    train_images: Tensor,
    trusted: np.ndarray,
    classes: int,
    fill_holes: bool,
) -> TrainingData:
    """Read the trusted pseudo-labels, resized to the images by nearest neighbour.

    A map has the native size of its image, or 256x256; the maps of one category are all of the one kind or the other.
    Where background.jpg was left out, what has no label counts as background; where refined_masks.png was,
    logical synthesis pastes connected parts of labels. Both are said.

    Args:
        fill_holes: fill the holes of each class, before resizing.

    Raises:
        UserError: a label map is missing, unreadable, of another size, or has a label that is no class.
    """
    side = train_images.shape[-1]
    labels = np.zeros((len(train_images), side, side), np.uint8)
    instances, backgrounds = np.zeros(labels.shape, np.uint16), np.zeros(labels.shape, bool)
    without_background = without_instances = 0
    squeezed: Path | None = None
    native: Path | None = None
    for index in ProgressBar(trusted, desc=f"{category.name}: read pseudo-labels", unit="image", leave=False):
        path, refined, background = _maps_of(category, workspace, index)
        label_map = images.read_mask(path)
        if label_map.max() >= classes:
            raise UserError(
                f"{path} has label {label_map.max()}, but filtered_component_histogram.npy knows "
                f"{counted(classes - 1, 'component')}; run {MADE_BY} --overwrite"
            )
        own_size = image_files.displayed_size(category.train[index])[::-1]
        require_size(path, label_map, own_size, SQUEEZED)
        if own_size != SQUEEZED:
            native, squeezed = (native, path) if label_map.shape == SQUEEZED else (path, squeezed)
        if native and squeezed:
            raise UserError(
                f"pseudo-labels of mixed sizes: {native} has the size of its image, but {squeezed} is "
                f"{SQUEEZED[1]}x{SQUEEZED[0]}; run {MADE_BY} --overwrite"
            )
        labels[index] = to_side(fill_class_holes(label_map) if fill_holes else label_map, side)
        if refined.exists():
            masks = images.read_mask(refined)
            require_size(refined, masks, label_map.shape)
            instances[index] = to_side(masks, side)
        else:
            without_instances += 1
            instances[index] = label_parts(labels[index])
        if background.exists():
            values = images.read_rgb(background)[..., 0]
            require_size(background, values, label_map.shape)
            backgrounds[index] = to_side(values, side) > 0  # as published, the JPEG's halo counts, too
        else:
            without_background += 1
            backgrounds[index] = labels[index] == 0
    if without_background:
        print(
            f"{category.name}: {without_background} of {len(trusted)} trusted images have no background.jpg; what their "
            "pseudo-label leaves out is taken as background"
        )
    if without_instances:
        print(
            f"{category.name}: {without_instances} of {len(trusted)} trusted images have no refined_masks.png; "
            "logical synthesis pastes connected parts of their pseudo-labels"
        )
    unlabelled = np.setdiff1d(np.arange(len(train_images)), trusted)
    unlabelled = unlabelled if len(unlabelled) else trusted
    return TrainingData(train_images, labels, instances, backgrounds, trusted, unlabelled)


def _maps_of(category: layouts.Category, workspace: Workspace, index: int) -> tuple[Path, Path, Path]:
    """What stage 1 says of a training image: label map, refined masks, background; the last two may be missing."""
    folder = workspace.pseudo_labels(category.name).image(category.key(category.train[index]))
    label_map = files.require(folder / "filtered_cluster_map.png", MADE_BY)
    return label_map, folder / "refined_masks.png", folder / "background.jpg"


def require_size(path: Path, values: np.ndarray, *sizes: tuple[int, int]) -> None:
    """UserError unless a map (H, W) about an image has one of the sizes (H, W) that it may have."""
    if values.shape not in sizes:
        expected = " or ".join(f"{width}x{height}" for height, width in dict.fromkeys(sizes))
        raise UserError(
            f"{path} is {values.shape[1]}x{values.shape[0]}, expected {expected}, the size of its image; "
            f"run {MADE_BY} --overwrite"
        )


def to_side(picture: np.ndarray, side: int) -> np.ndarray:
    """A map (H, W) uint8 of any size -> (side, side), by nearest neighbour as Pillow has it, as published."""
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST))
