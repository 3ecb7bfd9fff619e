"""demo.sh with a stand-in for Python that only notes what it was asked to do."""

import shutil
import subprocess
from pathlib import Path

import pytest

DEMO = Path(__file__).parent.parent / "demo.sh"


@pytest.mark.skipif(shutil.which("bash") is None, reason="demo.sh needs bash")
def test_a_workspace_may_have_a_space_in_its_name(tmp_path):
    shutil.copy(DEMO, tmp_path)
    note = tmp_path / "note"
    note.write_text('#!/bin/sh\n(IFS="|"; echo "$*") >> asked\n')
    note.chmod(0o755)
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci/setup_environment.sh").write_text("python=./note\n")
    (tmp_path / "my folder").mkdir()
    (tmp_path / "my folder/score_combine_result.txt").touch()
    subprocess.run(
        ["bash", tmp_path / "demo.sh", "--small", "--workspace", "my folder", "--seed", "3"], check=True
    )
    asked = [line.split("|") for line in (tmp_path / "asked").read_text().splitlines()]
    assert [line[0] for line in asked] == [
        "make_synthetic_loco.py",
        "pseudo_label.py",
        "train_segmentor.py",
        "CSAD.py",
        "patch_memory.py",
        "export_model.py",
        "benchmark_performance.py",
        "report.py",
    ]
    for line in asked[1:]:
        assert line[1:11] == [
            "--workspace",
            "my folder",
            "--dataset_root",
            "my folder/datasets/synthetic_loco",
            "--categories",
            "pushpins",
            "--preset",
            "quick",
            "--seed",
            "3",
        ]
