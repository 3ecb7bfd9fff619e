"""Pseudo-labels that others made, as stage 2 reads them."""

import numpy as np
import pytest
import torch

from data import files, layouts
from data.workspace import Workspace
from training.pseudo_label_files import read_stage_1, training_data


@pytest.mark.parametrize("with_background", [True, False])
def test_published_files_are_used_as_they_are(make_dataset, tmp_path, capsys, with_background):
    category = layouts.Category(make_dataset(train=4) / "discs")
    workspace = Workspace(tmp_path / "work")
    labels = np.zeros((40, 50), np.uint8)
    labels[10:20, 10:20], labels[30:, :] = 1, 2
    for path in category.train:
        folder = workspace.pseudo_labels("discs").image(path.stem)
        files.write_image(folder / "filtered_cluster_map.png", labels)
        if with_background:
            files.write_image(folder / "background.jpg", np.where(labels == 2, 255, 0).astype(np.uint8))
    files.write_array(workspace.pseudo_labels("discs").histogram, np.full((4, 2), 0.1, np.float32))
    files.write_array(workspace.pseudo_labels("discs").trusted, np.array([2, 0]))
    trusted, classes = read_stage_1(category, workspace)
    assert trusted.tolist() == [0, 2] and classes == 3
    data = training_data(category, workspace, torch.zeros(4, 3, 64, 64, dtype=torch.uint8), trusted, classes)
    assert set(np.unique(data.labels[0])) == {0, 1, 2}
    assert ("2 of 2 trusted images have no background.jpg" in capsys.readouterr().out) != with_background
    expected = data.labels[0] == (2 if with_background else 0)
    assert (data.backgrounds[0] == expected).mean() > 0.95
