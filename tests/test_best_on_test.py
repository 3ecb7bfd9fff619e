"""--checkpoint best_on_test: what is kept, that a resumed training keeps the same, and that everything made with it says so."""

import importlib
import json
import math
import runpy
import shutil
import sys
from pathlib import Path

from csad import settings
from csad.data import files, layouts
from csad.data.workspace import Workspace
from csad.errors import UserError, run_script
from csad.evaluation.scores import reservations
from csad.training import lgst_scores, segmentor_scores
from csad.training.best_on_test import CHOSEN_ON_TEST, BestOnTest, mean_auroc
from csad.training.loop import TrainingLoop

import numpy as np
import pytest
import torch
from conftest import job_for, make_discs, tiny_backbone
from torch import nn

import CSAD


class Counting(nn.Linear):
    """Its one weight is the number of its training step."""

    def __init__(self):
        super().__init__(1, 1, bias=False)

    def at(self, step):
        self.weight.data.fill_(step)


@pytest.mark.parametrize(
    "aurocs, kept", [((50, 70, 60), 4), ((70, 70, 60), 2), ((50, 60, 70), 5), ((math.nan, 60, 50), 4)]
)
def test_the_best_evaluation_is_kept_the_earliest_of_equals(aurocs, kept, capsys):
    values, network = dict(zip((2, 4, 5), aurocs)), Counting().train()
    best = BestOnTest(2, 5, lambda one: math.nan if one.training else values[int(one.weight.item())])
    for step in range(1, 6):
        network.at(step)
        best.after(step, network)
        assert network.training
    np.testing.assert_array_equal(
        best.evaluations, [list(one) for one in values.items()]
    )  # the last step, too
    best.restore(network, "cup")
    assert network.weight.item() == kept == best.noted()["selected_step"]
    assert f"after step {kept} " in capsys.readouterr().out


def test_scores_that_are_no_numbers_are_never_the_best():
    assert math.isnan(mean_auroc({layouts.GOOD: np.zeros(2), layouts.LOGICAL: np.array([1, np.nan])}))
    good = np.array([0.0, 1])
    assert (
        mean_auroc({layouts.GOOD: good, layouts.STRUCTURAL: good + 2}) == 100
    )  # of the kinds that there are
    assert mean_auroc({layouts.GOOD: good, layouts.LOGICAL: good, layouts.STRUCTURAL: good + 2}) == 75
    network = Counting()
    network.at(1)
    best = BestOnTest(1, 1, lambda one: math.nan)
    best.after(1, network)
    best.restore(network, "cup")
    assert network.weight.item() == 1


OVERRIDES = {
    "LGST": {"student": "pixels", "width": 8, "teacher_channels": 8, "steps": 6, "batch_size": 1, "lr": 0.01},
    "LGST on features": {"student": "features", "width": 8, "teacher_channels": 8, "steps": 6, "lr": 0.01},
}


@pytest.fixture
def category(make_dataset):
    return layouts.Category(make_dataset(train=4, validation=3, test=3) / "discs")


def train(category, workspace, kind="LGST", checkpoint="best_on_test"):
    chosen = settings.load(
        "discs",
        "quick",
        {"images.size": 256, "lgst.checkpoint": checkpoint}
        | {f"lgst.{key}": value for key, value in OVERRIDES[kind].items()},
    )
    CSAD.train_category(job_for(category, workspace, tiny_backbone(), chosen))


def written(workspace):
    return {path.name: path.read_bytes() for path in workspace.root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", OVERRIDES)
def test_lgst_keeps_the_step_with_the_best_auroc_and_resumes_to_the_same_bytes(
    kind, category, tmp_path, monkeypatch
):
    monkeypatch.setattr(lgst_scores, "EVALUATED_EVERY", 2)
    monkeypatch.setattr("csad.training.loop.SAVE_EVERY_SECONDS", 0)
    whole, broken, last = (Workspace(tmp_path / name) for name in ("whole", "broken", "last"))
    train(category, whole, kind)
    saved = files.read_state(whole.checkpoint("discs", "LGST"))
    meta, scored = (
        saved["meta"],
        {part: files.read_array(whole.scores("discs", "LGST", part)) for part in ("logi", "struc")},
    )
    assert [step for step, _ in meta["evaluations"]] == [2, 4, 6]
    assert meta["selected_step"] == max(meta["evaluations"], key=lambda one: one[1])[0]
    good = len(category.test(layouts.GOOD))
    again = mean_auroc(
        {
            layouts.GOOD: scored["logi"][:good],
            layouts.LOGICAL: scored["logi"][good:],
            layouts.STRUCTURAL: scored["struc"][good:],
        }
    )
    assert again == pytest.approx(
        dict(map(tuple, meta["evaluations"]))[meta["selected_step"]]
    )  # its scores are those written
    assert meta["selection"] == CHOSEN_ON_TEST
    assert files.read_json(whole.record("discs", "LGST"))["used"]["selection"] == CHOSEN_ON_TEST

    # The plug is pulled after an evaluation; the best so far is part of the progress.
    real, calls = BestOnTest.after, []

    def stop(self, step, network):
        calls.append(step)
        if step == 5 and calls.count(5) == 1:
            raise SystemExit
        return real(self, step, network)

    monkeypatch.setattr(BestOnTest, "after", stop)
    with pytest.raises(SystemExit):
        train(category, broken, kind)
    train(category, broken, kind)
    assert calls.count(2) == 1 and calls.count(5) == 2
    assert written(broken) == written(whole)

    train(category, last, kind, "last")
    meta = files.read_state(last.checkpoint("discs", "LGST"))["meta"]
    assert not {"selection", "selected_on", "evaluations"} & meta.keys()
    with pytest.raises(UserError, match="checkpoint: last -> best_on_test"):
        train(category, last, kind)


def test_evaluating_changes_nothing_of_the_training(category, tmp_path, monkeypatch):
    """The last step's weights are those of a training that never looked at a test image."""
    seen = {}
    real = TrainingLoop.__init__

    def watch(self, *arguments, **parts):
        seen[parts.get("best") is not None] = parts["model"]
        real(self, *arguments, **parts)

    monkeypatch.setattr(TrainingLoop, "__init__", watch)
    monkeypatch.setattr(BestOnTest, "restore", lambda *_: None)
    monkeypatch.setattr(lgst_scores, "EVALUATED_EVERY", 2)
    for checkpoint in ("last", "best_on_test"):
        train(category, Workspace(tmp_path / checkpoint), checkpoint=checkpoint)
    for key, value in seen[False].state_dict().items():
        torch.testing.assert_close(value, seen[True].state_dict()[key], rtol=0, atol=0, msg=key)


def test_without_anomalous_test_images_it_is_one_sentence_before_any_training(category, tmp_path):
    for missing in (("logical_anomalies", "structural_anomalies"), ("good",)):
        other = layouts.Category(shutil.copytree(category.root, tmp_path / missing[0] / "discs"))
        for split in missing:
            shutil.rmtree(other.root / "test" / split)
        workspace = Workspace(tmp_path / "work")
        with pytest.raises(
            UserError, match="best_on_test chooses by good and anomalous test images, and there are none"
        ):
            train(other, workspace)
        assert not [path for path in workspace.root.rglob("*") if path.is_file()]


def test_weights_chosen_by_other_images_are_noticed(category, tmp_path):
    workspace = Workspace(tmp_path / "work")
    train(category, workspace)
    category.test(layouts.LOGICAL)[0].unlink()
    with pytest.raises(UserError, match="selected_on.logical_anomalies"):
        train(category, workspace)


def test_everything_made_with_it_says_so(tmp_path, monkeypatch, capsys):
    work, dataset = tmp_path / "work", make_discs(tmp_path / "data", train=8, validation=4, test=2)
    monkeypatch.setattr(segmentor_scores, "EVALUATED_EVERY", 1)
    options = {
        "pseudo_label": ("--pseudo_labels.rotations", "1"),
        "train_segmentor": (
            "--checkpoint",
            "best_on_test",
            "--segmentor.epochs",
            "3",
            "--segmentor.width",
            "8",
            "--segmentor.unsupervised_from_epoch",
            "1",
        ),
        "CSAD": (
            "--checkpoint",
            "best_on_test",
            "--lgst.steps",
            "2",
            "--lgst.width",
            "8",
            "--lgst.teacher_channels",
            "8",
        ),
        "export_model": (),
        "benchmark_performance": (),
    }
    common = (
        "--workspace",
        str(work),
        "--dataset_root",
        str(dataset),
        "--preset",
        "quick",
        "--backbone",
        "efficientnet_lite0",
        "--device",
        "cpu",
        "--images.size",
        "256",
    )
    for stage, own in options.items():
        fused = (
            ()
            if stage in ("pseudo_label", "train_segmentor", "CSAD")
            else ("--branches", "patchhist", "LGST")
        )
        monkeypatch.setattr(sys, "argv", [f"{stage}.py", *common, *own, *fused])
        run_script(importlib.import_module(stage).main)
    assert "the best of 3 evaluations on test images" in capsys.readouterr().out
    assert len(files.read_state(work / "ckpt/segmentor_discs_256.pth")["meta"]["evaluations"]) == 3

    line = "weights of patchhist, LGST: chosen on test images, as published; not an estimate of performance"
    chosen = {"stand_ins": [], "chosen_on_test": ["patchhist", "LGST"]}
    assert reservations([chosen]) == [line] and reservations([]) == []
    assert line in (work / "score_combine_result.txt").read_text().splitlines()
    assert line in (work / "export_report.md").read_text().splitlines()
    exported = json.loads((work / "anomaly_score/discs_torch_scores.json").read_text())["model"]
    assert exported["chosen_on_test"] == ["patchhist", "LGST"]
    assert exported["training"]["LGST"]["selection"] == CHOSEN_ON_TEST
    monkeypatch.setattr(sys, "argv", ["report.py", *common, "--branches", "patchhist", "LGST"])
    runpy.run_path(
        str(Path(__file__).parent.parent / "report.py"), run_name="__main__"
    )  # the package has its name, too
    assert (
        "<strong>Weights of patchhist, LGST:</strong> chosen on test images"
        in (work / "report.html").read_text()
    )
