"""The components of many pictures, proposed and described picture by picture (`one_picture`), or some of them together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from csad.data import files, images
from csad.processes import map_pictures
from csad.progress import ProgressBar
from csad.pseudo_labels import one_picture
from csad.pseudo_labels.crop_embedding import CropEmbedding
from csad.pseudo_labels.one_picture import COMPONENTS, REFINED, clustered_map, propose
from csad.pseudo_labels.proposers import Proposer
from csad.settings import PseudoLabelSettings

import numpy as np
import torch

# Whose components are described together on a GPU; a CPU gains nothing from more than one.
IMAGES_AT_ONCE = 16


def find_missing(
    category: str,
    paths: Sequence[Path],
    folders: Sequence[Path],
    view: images.View,
    proposer: Proposer,
    embedding: CropEmbedding | None,
    settings: PseudoLabelSettings,
    device: torch.device,
    workers: int,
) -> None:
    """Propose and describe the components of images that have none yet.

    Args:
        folders: of each image's files.
        embedding: gives cnn_image, where it is among the features.
        workers: processes that look at pictures where no network proposes.
    """
    if not proposer.checkpoints:  # no network, which would use all cores by itself, or the GPU
        _find_in_processes(category, paths, folders, view, proposer, settings, workers, embedding is None)
        if embedding is None:
            return
    at_once = 1 if device.type == "cpu" else IMAGES_AT_ONCE
    what = "find components" if proposer.checkpoints else "describe components"
    with ProgressBar(total=len(paths), desc=f"{category}: {what}", unit="image") as bar:
        # Always the same images together, so that a resumed run repeats the very same numbers.
        for first in range(0, len(paths), at_once):
            group = slice(first, first + at_once)
            if not all((folder / COMPONENTS).exists() for folder in folders[group]):
                pictures = [one_picture.read(path, view, proposer.working_size) for path in paths[group]]
                for picture, folder in zip(pictures, folders[group]):
                    propose(picture, folder, proposer, settings)
                label_maps = [clustered_map(folder, settings) for folder in folders[group]]
                for folder, features in zip(folders[group], describe(pictures, label_maps, embedding)):
                    files.write_arrays(folder / COMPONENTS, **features)
            bar.update(len(folders[group]))


def _find_in_processes(
    category: str,
    paths: Sequence[Path],
    folders: Sequence[Path],
    view: images.View,
    proposer: Proposer,
    settings: PseudoLabelSettings,
    workers: int,
    with_features: bool,
) -> None:
    """`one_picture.find_components` of those pictures of which that is not done yet."""
    last_written = COMPONENTS if with_features else REFINED
    work = partial(
        one_picture.find_components,
        proposer=proposer,
        view=view,
        settings=settings,
        with_features=with_features,
    )
    pending = [(path, folder) for path, folder in zip(paths, folders) if not (folder / last_written).exists()]
    with ProgressBar(
        total=len(paths),
        initial=len(paths) - len(pending),
        desc=f"{category}: find components",
        unit="image",
    ) as bar:
        map_pictures(work, pending, workers, bar)


def describe(
    pictures: list[np.ndarray], label_maps: list[np.ndarray], embedding: CropEmbedding | None
) -> list[dict[str, np.ndarray]]:
    """For each image the features of its components, each (n, ...), in the order of their indices in the label map."""
    described, crops = zip(
        *(one_picture.describe(picture, labels) for picture, labels in zip(pictures, label_maps))
    )
    if embedding is not None:
        deep = embedding(torch.from_numpy(np.concatenate(crops)).permute(0, 3, 1, 2)).cpu().numpy()
        for features, of_image in zip(described, np.split(deep, np.cumsum([len(cut) for cut in crops])[:-1])):
            features["cnn_image"] = of_image
    return list(described)
