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
from csad.pseudo_labels.one_picture import COMPONENTS, REFINED
from csad.pseudo_labels.proposers import Proposer
from csad.settings import PseudoLabelSettings

import numpy as np
import torch

# Whose components are described together on a GPU; a CPU gains nothing from more than one.
IMAGES_AT_ONCE = 16


def find_missing(
    category: str,
    pictures: Sequence[tuple[Path, Path]],
    proposer: Proposer,
    view: images.View,
    settings: PseudoLabelSettings,
    embedding: CropEmbedding | None,
    device: torch.device,
    workers: int,
) -> None:
    """Propose and describe the components of pictures that have none yet.

    Args:
        pictures: the path of each, and the folder of its files.
        embedding: gives cnn_image, where it is among the features.
        workers: processes that look at pictures where no network proposes.
    """
    networks = bool(proposer.checkpoints)  # they use all cores by themselves, or the GPU
    if not networks:
        last_written = COMPONENTS if embedding is None else REFINED
        pending = [(path, folder) for path, folder in pictures if not (folder / last_written).exists()]
        work = partial(
            one_picture.find_components,
            proposer=proposer,
            view=view,
            settings=settings,
            with_features=embedding is None,
        )
        done = len(pictures) - len(pending)
        what = f"{category}: find components"
        with ProgressBar(total=len(pictures), initial=done, desc=what, unit="image") as bar:
            map_pictures(work, pending, workers, bar)
        if embedding is None:
            return
    at_once = 1 if device.type == "cpu" else IMAGES_AT_ONCE
    what = f"{category}: {'find' if networks else 'describe'} components"
    with ProgressBar(total=len(pictures), desc=what, unit="image") as bar:
        # Always the same images together, so that a resumed run repeats the very same numbers.
        for first in range(0, len(pictures), at_once):
            paths, folders = zip(*pictures[first : first + at_once])
            if not all((folder / COMPONENTS).exists() for folder in folders):
                shown = [one_picture.read(path, view, proposer.working_size) for path in paths]
                for picture, folder in zip(shown, folders):
                    one_picture.propose(picture, folder, proposer, settings)
                label_maps = [one_picture.clustered_map(folder, settings) for folder in folders]
                for folder, features in zip(folders, describe(shown, label_maps, embedding)):
                    files.write_arrays(folder / COMPONENTS, **features)
            bar.update(len(folders))


def describe(
    pictures: list[np.ndarray], label_maps: list[np.ndarray], embedding: CropEmbedding | None
) -> list[dict[str, np.ndarray]]:
    """For each image the features of its components, each (n, ...), in the order of their indices in the label map."""
    described, crops = zip(*map(one_picture.describe, pictures, label_maps))
    if embedding is not None:
        deep = embedding(torch.from_numpy(np.concatenate(crops)).permute(0, 3, 1, 2)).cpu().numpy()
        ends = np.cumsum([len(of_image) for of_image in crops])[:-1]
        for features, of_image in zip(described, np.split(deep, ends)):
            features["cnn_image"] = of_image
    return list(described)
