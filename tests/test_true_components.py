"""From the built-in data set's true components, with merges, splits and noise, through clustering to pseudo-labels."""

from argparse import Namespace

from csad import settings
from csad.data import files, images, layouts
from csad.data.workspace import Workspace
from csad.evaluation.label_matching import match_labels
from csad.pseudo_labels import masks
from csad.pseudo_labels.proposers import Proposals
from csad.synthetic import CATEGORIES
from csad.synthetic.writer import Settings, components_root, write_dataset

import cv2
import numpy as np
import pytest
import torch
from torch import nn

import pseudo_label
from models.backbone import Backbone

MERGED, SPLIT = 0.1, 0.05  # of the images, of the components
SPECKS = 2


class TrueComponents:
    """Proposes the true components of images it knows, as badly as a good proposer would."""

    name, is_stand_in, checkpoints, working_size = "true", True, {}, 256

    def __init__(self, paths, label_paths):
        self.labels = {
            images.read_rgb(path, 256).tobytes(): true_labels(label_path)
            for path, label_path in zip(paths, label_paths)
        }

    def load(self):
        pass

    def propose(self, image):
        labels = self.labels[image.tobytes()]
        rng = np.random.default_rng(int(labels.sum()))
        parts = list(masks.split_components(masks.label_masks(labels)))
        if rng.random() < MERGED and len(parts) > 1:
            one, other = rng.choice(len(parts), 2, replace=False)
            parts[one] = parts[one] | parts[other]
            del parts[other]
        for index in np.flatnonzero(rng.random(len(parts)) < SPLIT):
            rows, columns = np.nonzero(parts[index])
            half = np.zeros_like(parts[index])
            half[rows[columns < np.median(columns)], columns[columns < np.median(columns)]] = True
            parts.append(parts[index] & ~half)
            parts[index] = half
        parts = [ragged(part, rng) for part in parts]
        for x, y in rng.integers(10, 246, (SPECKS, 2)).tolist():
            parts.append(cv2.circle(np.zeros((256, 256), np.uint8), (x, y), 6, 1, -1) != 0)
        return Proposals(masks.PackedMasks.pack(parts, labels.shape), background=labels == 0)


def ragged(part, rng):
    """A mask with a border that wavers by half a pixel."""
    near = cv2.GaussianBlur(part.astype(np.float32), (0, 0), 1)
    waver = cv2.GaussianBlur(rng.normal(0, 1, part.shape).astype(np.float32), (0, 0), 3)
    return near > 0.5 + 0.1 * waver / waver.std()


def true_labels(path):
    return cv2.resize(images.read_mask(path), (256, 256), interpolation=cv2.INTER_NEAREST_EXACT)


def label_true_components(category, components, workspace, seed=0):
    """Run the stage; returns mean IoU over the trusted images."""
    paths = category.train
    label_paths = [components / category.name / "train" / "good" / path.name for path in paths]
    chosen = settings.load(category.name, "quick", {"images.size": 256})
    backbone = Backbone("none", nn.Identity(), "")
    proposer = TrueComponents(paths, label_paths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pseudo_label, "choose_proposer", lambda *_: proposer)
        pseudo_label.PseudoLabelStage(
            category,
            workspace,
            chosen,
            backbone,
            torch.device("cpu"),
            Namespace(download=False, seed=seed, overwrite=False),
        ).run()
    made = workspace.pseudo_labels(category.name)
    trusted = files.read_array(made.trusted)
    predicted = [
        images.read_mask(made.image(paths[index].stem) / "filtered_cluster_map.png") for index in trusted
    ]
    return match_labels(predicted, [true_labels(label_paths[index]) for index in trusted])


@pytest.mark.parametrize("name", sorted(CATEGORIES))
def test_pseudo_labels_agree_with_the_truth(name, tmp_path):
    root = tmp_path / "loco"
    write_dataset(
        root,
        [name],
        Settings(
            image_size=256, train=60, validation=1, test_good=0, test_logical=0, test_structural=0, seed=5
        ),
    )
    match = label_true_components(
        layouts.Category(root / name), components_root(root), Workspace(tmp_path / "work")
    )
    assert match.mean_iou > 0.85, match
