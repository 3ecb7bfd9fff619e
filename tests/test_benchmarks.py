"""Label maps against the truth, on files made by hand."""

import json
import sys

import benchmark_labels
import numpy as np
import pytest

from data import files, layouts
from data.workspace import Workspace
from errors import UserError
from standins.rendered.writer import components_root


def test_maps_are_compared_with_the_truth_of_the_same_image(make_dataset, tmp_path, monkeypatch, capsys):
    root = make_dataset(train=4, test=2)
    category, workspace = layouts.Dataset(root).select(None)[0], Workspace(tmp_path / "work")
    monkeypatch.setattr(sys, "argv", ["benchmark_labels.py", "--workspace", str(workspace.root), "--dataset_root", str(root)])
    with pytest.raises(UserError, match="true label maps are missing"):
        benchmark_labels.main()

    rng = np.random.default_rng(0)
    truth = {}
    for path in [*category.train, *category.test(layouts.GOOD)]:
        truth[path] = rng.integers(0, 3, (64, 64)).astype(np.uint8)
        files.write_image(components_root(root) / path.relative_to(root), truth[path])
    files.write_array(workspace.info(category.name) / "filtered_histogram_indices.npy", np.array([1, 3]))
    with pytest.raises(UserError, match="pseudo_label.py"):
        benchmark_labels.main()
    # Trusted maps with other names for the same classes; the segmentor's right in one image of two, empty in the other.
    for index in (1, 3):
        path = category.train[index]
        files.write_image(workspace.image_masks(category.name, path) / "filtered_cluster_map.png",
                          (2 - truth[path]).repeat(2, 0).repeat(2, 1))
    for path, share in zip(category.test(layouts.GOOD), (1, 0)):
        files.write_image(workspace.segmentation_output(category.name, layouts.GOOD, path),
                          (share * truth[path]).repeat(2, 0).repeat(2, 1))
    benchmark_labels.main()

    found = json.loads((workspace.root / "label_quality.json").read_text())["discs"]
    assert found["pseudo-labels"]["mean_iou"] == 1
    np.testing.assert_allclose([found["segmentor"]["per_class"][name] for name in ("1", "2")], 0.5, atol=0.05)
    assert "| discs | 1.000 |" in capsys.readouterr().out
    sys.argv += ["--lgst.steps", "banana"]
    with pytest.raises(UserError, match="lgst.steps"):
        benchmark_labels.main()
