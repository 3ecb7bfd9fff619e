"""The components of many pictures, proposed and described picture by picture (`one_picture`), or some of them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Search:
    """The pictures of a category, whose components are to be proposed and described."""

    category: str
    paths: Sequence[Path]
    folders: Sequence[Path]  # of each picture's files
    view: images.View
    proposer: Proposer
    settings: PseudoLabelSettings

    def find_missing(self, embedding: CropEmbedding | None, device: torch.device, workers: int) -> None:
        """Propose and describe the components of pictures that have none yet.

        Args:
            embedding: gives cnn_image, where it is among the features.
            workers: processes that look at pictures where no network proposes.
        """
        networks = bool(self.proposer.checkpoints)  # they use all cores by themselves, or the GPU
        if not networks:
            self._find_in_processes(workers, with_features=embedding is None)
            if embedding is None:
                return
        at_once = 1 if device.type == "cpu" else IMAGES_AT_ONCE
        what = f"{self.category}: {'find' if networks else 'describe'} components"
        with ProgressBar(total=len(self.paths), desc=what, unit="image") as bar:
            # Always the same images together, so that a resumed run repeats the very same numbers.
            for first in range(0, len(self.paths), at_once):
                group = slice(first, first + at_once)
                folders = self.folders[group]
                if not all((folder / COMPONENTS).exists() for folder in folders):
                    size = self.proposer.working_size
                    pictures = [one_picture.read(path, self.view, size) for path in self.paths[group]]
                    for picture, folder in zip(pictures, folders):
                        propose(picture, folder, self.proposer, self.settings)
                    label_maps = [clustered_map(folder, self.settings) for folder in folders]
                    for folder, features in zip(folders, describe(pictures, label_maps, embedding)):
                        files.write_arrays(folder / COMPONENTS, **features)
                bar.update(len(folders))

    def _find_in_processes(self, workers: int, with_features: bool) -> None:
        """`one_picture.find_components` of those pictures of which that is not done yet."""
        last_written = COMPONENTS if with_features else REFINED
        both = zip(self.paths, self.folders)
        pending = [(path, folder) for path, folder in both if not (folder / last_written).exists()]
        work = partial(
            one_picture.find_components,
            proposer=self.proposer,
            view=self.view,
            settings=self.settings,
            with_features=with_features,
        )
        done, what = len(self.paths) - len(pending), f"{self.category}: find components"
        with ProgressBar(total=len(self.paths), initial=done, desc=what, unit="image") as bar:
            map_pictures(work, pending, workers, bar)


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
