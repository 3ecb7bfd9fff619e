"""Each benchmark on tiny input: it runs, by the name that the README gives it, and measures what it says."""

import json
import re
import subprocess
import sys
from pathlib import Path

from csad.data import data_sets, files, layouts
from csad.data.workspace import Workspace
from csad.errors import UserError
from csad.synthetic.writer import components_root

import numpy as np
import pytest
import torch

from benchmarks import label_quality, speed, training_speed
from benchmarks.speed_variants import FORMAT_OF
from models import fused

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_each_runs_as_a_module_and_needs_no_tests(name):
    assert not re.search(
        r"^ *(from|import) (tests|conftest)", (ROOT / f"benchmarks/{name}.py").read_text(), re.MULTILINE
    )
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


def test_maps_are_compared_with_the_truth_of_the_same_image(make_dataset, tmp_path, monkeypatch, capsys):
    root = make_dataset(train=4, test=2)
    category, workspace = data_sets.Dataset(root).select(None)[0], Workspace(tmp_path / "work")
    monkeypatch.setattr(
        sys, "argv", ["label_quality", "--workspace", str(workspace.root), "--dataset_root", str(root)]
    )
    with pytest.raises(UserError, match="true label maps are missing"):
        label_quality.main()

    rng = np.random.default_rng(0)
    truth = {}
    for path in [*category.train, *category.test(layouts.GOOD)]:
        truth[path] = rng.integers(0, 3, (64, 64)).astype(np.uint8)
        files.write_image(components_root(root) / path.relative_to(root), truth[path])
    files.write_array(workspace.pseudo_labels(category.name).trusted, np.array([1, 3]))
    with pytest.raises(UserError, match="pseudo_label.py"):
        label_quality.main()
    # Trusted maps with other names for the same classes; the segmentor's right in one image of two, empty in the other.
    for index in (1, 3):
        path = category.train[index]
        files.write_image(
            workspace.pseudo_labels(category.name).image(path.stem) / "filtered_cluster_map.png",
            (2 - truth[path]).repeat(2, 0).repeat(2, 1),
        )
    for path, share in zip(category.test(layouts.GOOD), (1, 0)):
        files.write_image(
            workspace.segmentation_output(category.name, layouts.GOOD, path.stem),
            (share * truth[path]).repeat(2, 0).repeat(2, 1),
        )
    label_quality.main()

    found = json.loads((workspace.root / "label_quality.json").read_text())["discs"]
    assert found["pseudo-labels"]["mean_iou"] == 1
    np.testing.assert_allclose([found["segmentor"]["per_class"][name] for name in ("1", "2")], 0.5, atol=0.05)
    assert "| discs | 1.000 |" in capsys.readouterr().out
    sys.argv += ["--lgst.steps", "banana"]
    with pytest.raises(UserError, match="lgst.steps"):
        label_quality.main()


@pytest.mark.parametrize("stage", ["lgst", "segmentor"])
def test_training_steps_are_timed(stage, tmp_path, monkeypatch, capsys):
    options = (
        f"--stage {stage} --timed_steps 1 --workspace {tmp_path} --backbone efficientnet_lite0 --device cpu "
        "--lgst.width 8 --lgst.teacher_channels 8 --lgst.batch_size 1 --segmentor.width 8 --segmentor.batch_size 2"
    )
    monkeypatch.setattr(sys, "argv", ["training_speed", *options.split()])
    training_speed.main()
    found = json.loads((tmp_path / f"benchmark_training_{stage}.json").read_text())["variants"]
    assert {"plain fp32", "fast fp32"} <= found.keys()
    assert all(one["ms_per_step"] > 0 and one["multiply_adds"] > 0 for one in found.values())


def test_exported_models_are_timed_beside_the_published_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "PAPER_SIZE", {"width": 16, "classes": 3, "student": 16, "channels": 16})
    monkeypatch.setattr(speed, "PUBLISHED", "efficientnet_lite0")
    state = speed.random_state()
    fused.attach_metadata(state, {"backbone": "efficientnet_lite0", "category": "discs"})
    monkeypatch.setattr(speed, "random_state", lambda: state)
    report = {"category": "discs", "format": "onnx", "precision": "fp32", "auroc_mean": 87.5}
    files.write_json(Workspace(tmp_path).export_report, [report])
    compile = torch.compile  # without a C++ compiler here
    monkeypatch.setattr(torch, "compile", lambda model, mode: compile(model, backend="eager"))
    options = f"--workspace {tmp_path} --turns 1 --batches 1 --device cpu --precisions fp32"
    monkeypatch.setattr(sys, "argv", ["speed", *options.split(), "--runtimes", *FORMAT_OF])
    speed.main()
    rows = json.loads((tmp_path / "speed.json").read_text())["results"]
    assert {(row["graph"], row["runtime"], row["auroc_mean"]) for row in rows} == {
        (graph, runtime, 87.5 if runtime == "onnxruntime" else None)
        for graph in ("published", "ours")
        for runtime in ("torch", "torch.compile", "onnxruntime", "openvino")
    }
    assert all(row["ms_per_image"] > 0 for row in rows)
    assert (tmp_path / "benchmark_speed.svg").read_bytes().startswith(b"<?xml")
