"""Stage 3 end to end on a tiny data set and with a tiny encoder: what it writes, and mistakes told in a sentence."""

import shutil

from csad import settings
from csad.data import files, layouts
from csad.data.workspace import Workspace
from csad.errors import UserError

import pytest
import torch
from conftest import job_for, tiny_backbone

import CSAD

CATEGORY = "discs"


@pytest.fixture
def category(make_dataset):
    return layouts.Category(make_dataset(train=4, validation=2, test=2) / CATEGORY)


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "work")


def train(category, workspace, overwrite=False, **more):
    overrides = {"student": "pixels", "width": 8, "teacher_channels": 8, "steps": 2, "batch_size": 1} | more
    chosen = settings.load(
        CATEGORY, "quick", {"images.size": 256} | {f"lgst.{key}": value for key, value in overrides.items()}
    )
    CSAD.train_category(job_for(category, workspace, tiny_backbone(), chosen, overwrite=overwrite))


def scores(workspace):
    return {
        path.name: len(files.read_array(path)) for path in (workspace.root / "anomaly_score").glob("*.npy")
    }


@pytest.mark.parametrize("missing", ["test", "test/good"])
def test_without_test_images_the_rest_is_written_and_they_may_come_later(
    category, workspace, tmp_path, capsys, monkeypatch, missing
):
    (category.root / missing).rename(tmp_path / "elsewhere")
    train(category, workspace)
    assert scores(workspace) == {"discs_LGST_val_score.npy": 2, "discs_CSAD_val_score.npy": 2}
    assert "no test scores" in capsys.readouterr().out
    train(category, workspace)
    assert "skipped" in capsys.readouterr().out
    (tmp_path / "elsewhere").rename(category.root / missing)
    monkeypatch.setattr(CSAD, "train", None)
    train(category, workspace)
    assert len(scores(workspace)) == 6
    assert workspace.anomaly_maps(CATEGORY, "LGST").exists()


def test_an_empty_test_folder_is_noticed_before_training(category, workspace):
    for path in category.test(layouts.GOOD):
        path.unlink()
    with pytest.raises(UserError, match="no images in .*good"):
        train(category, workspace)
    assert not workspace.checkpoint(CATEGORY, "LGST").exists()


def test_changed_validation_and_test_images_are_scored_without_training(
    category, workspace, monkeypatch, capsys
):
    train(category, workspace)
    before = files.read_state(workspace.checkpoint(CATEGORY, "LGST"))["state"]
    monkeypatch.setattr(CSAD, "train", None)
    shutil.copy(category.test(layouts.STRUCTURAL)[0], category.validation[0].with_name("new.png"))
    train(category, workspace)
    assert scores(workspace)["discs_LGST_val_score.npy"] == 3
    after = files.read_state(workspace.checkpoint(CATEGORY, "LGST"))["state"]
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"q_st_start", "q_st_end", "q_ae_start", "q_ae_end"}

    checkpoint = workspace.checkpoint(CATEGORY, "LGST").read_bytes()
    category.test(layouts.LOGICAL)[0].unlink()
    train(category, workspace)
    assert scores(workspace)["discs_CSAD_logi_score.npy"] == 3
    assert workspace.checkpoint(CATEGORY, "LGST").read_bytes() == checkpoint
    assert "skipped" not in capsys.readouterr().out
    train(category, workspace)
    assert "skipped" in capsys.readouterr().out


def test_a_checkpoint_without_a_record_is_no_blank_cheque(category, workspace, monkeypatch):
    train(category, workspace)
    record = workspace.checkpoint(CATEGORY, "LGST").with_suffix(".json")
    noted = record.read_bytes()
    record.unlink()
    workspace.scores(CATEGORY, "LGST", "val").unlink()
    with pytest.raises(UserError, match="best_discs.pth was made .*steps: 2 -> 5"):
        train(category, workspace, steps=5)
    assert not record.exists()
    monkeypatch.setattr(CSAD, "train", None)
    train(category, workspace)
    assert record.read_bytes() == noted and len(scores(workspace)) == 6


def test_diverged_training_says_so_and_leaves_nothing_behind(category, workspace):
    with pytest.raises(UserError, match="diverged.* lower --lgst.lr"):
        train(category, workspace, lr=1e30)
    assert not list(workspace.root.rglob("*"))
    train(category, workspace)
    assert len(scores(workspace)) == 6


def test_the_student_on_features_is_trained_scored_and_repeated(category, workspace, tmp_path):
    train(category, workspace, student="features")
    again = Workspace(tmp_path / "again")
    train(category, again, student="features")
    assert len(scores(workspace)) == 6
    assert (
        workspace.checkpoint(CATEGORY, "LGST").read_bytes() == again.checkpoint(CATEGORY, "LGST").read_bytes()
    )
    with pytest.raises(UserError, match="student: features -> pixels"):
        train(category, workspace)
