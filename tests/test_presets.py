"""What the presets say, and that the one for a machine with a GPU and the real weights runs whole."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

from csad import settings
from csad.errors import run_script

ROOT = Path(__file__).parent.parent
STAGES = ("pseudo_label", "train_segmentor", "CSAD", "patch_memory", "export_model", "benchmark_performance")
PUBLISHED = ("pseudo_labels", "lgst", "memory")  # sections in which the full preset is the paper's


def test_the_full_preset_is_the_published_stages_and_what_section_6_adds():
    full, paper, quick = (settings.load("none", name) for name in ("full", "paper", "quick"))
    for section in PUBLISHED:
        assert getattr(full, section) == getattr(paper, section)
    assert full.segmentor == paper.segmentor.model_copy(update={"evidence": True, "reliability": True})
    assert full.images == quick.images and full.images.size == 512 and full.fusion == quick.fusion
    for category in ("breakfast_box", "juice_bottle", "pushpins", "screw_bag", "splicing_connectors"):
        assert settings.load(category, "full").pseudo_labels == settings.load(category, "paper").pseudo_labels


def test_the_full_preset_runs_whole(make_dataset, tmp_path, monkeypatch):
    work, dataset = tmp_path / "work", make_dataset(train=8, validation=4, test=2)
    tiny = {
        "pseudo_label": ("--pseudo_labels.rotations", "1"),
        "train_segmentor": (
            "--segmentor.epochs",
            "1",
            "--segmentor.unsupervised_from_epoch",
            "0",
            "--segmentor.width",
            "8",
        ),
        "CSAD": ("--lgst.steps", "1", "--lgst.width", "8", "--lgst.teacher_channels", "8"),
        "patch_memory": ("--memory.rows", "20"),
    }
    common = (
        "--workspace",
        str(work),
        "--dataset_root",
        str(dataset),
        "--preset",
        "full",
        "--backbone",
        "efficientnet_lite0",
        "--device",
        "cpu",
    )
    monkeypatch.setattr("csad.export.weighing.SYNTHETIC_DEFECTS", 6)
    for stage in STAGES:
        monkeypatch.setattr(sys, "argv", [f"{stage}.py", *common, *tiny.get(stage, ())])
        run_script(importlib.import_module(stage).main)
    subprocess.run([sys.executable, "report.py", *common], cwd=ROOT, check=True)
    exported = json.loads((work / "anomaly_score/discs_torch_scores.json").read_text())
    assert exported["model"]["input_size"] == 512 and exported["model"]["fusion_rule"] == "softplus"
    assert exported["branches"]
    decided = json.loads((work / "anomaly_score/discs_branches.json").read_text())
    for kind in ("structural", "logical"):
        assert {"patchhist", "LGST", "memory", "DFM"} <= decided["auroc_on_synthetic_defects"][kind].keys()
    result = (work / "score_combine_result.txt").read_text()
    assert re.search(r"\('memory',\) AUC: \d", result) and "(softplus)" in result
    assert (work / "anomaly_score/discs_patchhist_maps.npz").exists() and (work / "report.html").exists()
