"""Which branches are fused where some are only offered: planted defects, the decision, and who keeps to it."""

from csad import settings
from csad.cli import common_options, with_branches, with_cluster, with_seeds
from csad.data import files
from csad.data.workspace import Workspace
from csad.evaluation import branch_choice
from csad.settings import FusionSettings
from csad.training.structural_synthesis import plant

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import export_model

OFFERING = FusionSettings(branches=["patchhist", "memory"], offered=["LGST"], rule="softplus")


@hypothesis_settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), side=st.sampled_from([64, 256, 512]), label=st.integers(0, 1))
def test_a_planted_defect_is_small_and_on_a_component(seed, side, label):
    image = np.random.default_rng(1).integers(60, 200, (side, side, 3), dtype=np.uint8)
    labels = np.zeros((64, 64), np.uint8)
    labels[20:30, 40:50] = label  # 0: nothing is labelled, so anywhere will do
    before = image.copy()
    found = plant(image, labels, np.random.default_rng(seed))
    assert found.shape == image.shape and found.dtype == np.uint8 and np.array_equal(image, before)
    assert np.array_equal(found, plant(image, labels, np.random.default_rng(seed)))
    changed = np.argwhere((found != image).any(2)) * 64 / side
    assert len(changed) < 0.25 * 64**2 * (side / 64)**2
    if label and len(changed):  # faint or tiny ones may round to nothing
        assert np.abs(changed - np.clip(changed, [20, 40], [30, 50])).max(1).min() < 12


def test_most_planted_defects_can_be_seen():
    image, labels = np.full((256, 256, 3), 120, np.uint8), np.ones((256, 256), np.uint8)
    image[::2] = 90
    strongest = [np.abs(plant(image, labels, np.random.default_rng(seed)).astype(int) - image).max() for seed in range(100)]
    assert np.mean(np.array(strongest) >= 5) > 0.9


def shares(of_memory, of_lgst):
    """(n, 3) in the order patchhist, LGST, memory; the histogram sees nothing."""
    return np.stack([np.zeros(len(of_memory)), of_lgst, of_memory], 1)


def test_an_offered_branch_is_fused_where_it_finds_more_and_only_there():
    rng = np.random.default_rng(0)
    noise, names = rng.normal(size=(2, 200)), ["patchhist", "LGST", "memory"]
    good = shares(*noise)
    for lift, expected in ((3.0, ["patchhist", "LGST", "memory"]), (0.0, ["patchhist", "memory"])):
        logical = shares(noise[0] + 2, noise[1])
        found = branch_choice.aurocs(good, shares(noise[0] + 1, noise[1][::-1] + lift), logical, names, OFFERING)
        assert list(found) == ["patchhist+memory", "patchhist+LGST+memory"]
        assert (found["patchhist+LGST+memory"] > found["patchhist+memory"]) == bool(lift)
        assert branch_choice.helpful(found, OFFERING) == expected
    assert branch_choice.helpful({"patchhist+memory": 90.0, "patchhist+LGST+memory": 90.0 + branch_choice.LEAST_GAIN / 2},
                                 OFFERING) == ["patchhist", "memory"]


@pytest.fixture
def workspace(tmp_path):
    """One in which all stages have run, as far as the choice looks."""
    found = Workspace(tmp_path)
    for branch in settings.BRANCHES:
        found.checkpoint("discs", branch).parent.mkdir(exist_ok=True)
        found.checkpoint("discs", branch).touch()
        files.write_array(found.scores("discs", branch, "val"), np.arange(4.0))
    return found


def test_scores_that_are_not_finite_are_never_the_better_ones():
    good, anomalous = np.zeros((4, 3)), np.ones((4, 3))
    wild = anomalous.copy()
    wild[0, 1] = np.inf
    for kinds in ((wild, anomalous), (anomalous, wild)):
        found = branch_choice.aurocs(good, *kinds, ["patchhist", "LGST", "memory"], OFFERING)
        assert np.isnan(found["patchhist+LGST+memory"]) and found["patchhist+memory"] == 100
        assert branch_choice.helpful(found, OFFERING) == ["patchhist", "memory"]
    wild[0, 0] = np.nan
    found = branch_choice.aurocs(good, wild, anomalous, ["patchhist", "LGST", "memory"], OFFERING)
    assert branch_choice.helpful(found, OFFERING) == ["patchhist", "memory"]  # which the export itself then refuses


def test_where_nothing_could_be_pasted_the_other_kind_decides():
    good, structural = np.zeros((4, 3)), np.ones((4, 3))
    found = branch_choice.aurocs(good, structural, np.zeros((0, 3)), ["patchhist", "LGST", "memory"], OFFERING)
    assert set(found.values()) == {100}


def test_a_failed_paste_is_no_anomaly_and_how_many_failed_is_said(make_dataset, monkeypatch, capsys):
    from csad.data.layouts import Category

    import export_model
    from models.prediction import Prediction
    category, chosen = Category(make_dataset() / "discs"), settings.load("discs", "quick", {"images.size": 256})
    calls = iter(range(1000))

    def every_third_fails(image, labels, *rest):
        return (image.copy(), labels.copy()) if next(calls) % 3 == 0 else (255 - image, labels)

    monkeypatch.setattr(export_model, "synthesise", every_third_fails)

    class Engine:
        size, metadata, branches = 256, {}, ["patchhist", "LGST", "memory"]

        def score(self, picture):
            return picture.mean((1, 2, 3))

        def predict(self, picture):
            share = np.repeat(picture.mean((1, 2, 3))[:, None], 3, 1)
            return Prediction(self.score(picture), share, None, None, np.ones((len(picture), 256, 256), np.uint8))

    check = export_model.make_check(category, Engine(), chosen, 0)
    assert check.good.sum() == 6 and len(check.good) == len(check.images) == len(check.scores) == 10
    assert "in 2 of 6 pictures no component could be pasted" in capsys.readouterr().out
    seen = []
    monkeypatch.setattr(branch_choice, "aurocs", lambda good, structural, logical, *rest: seen.append(
        (len(good), len(structural), len(logical))) or {})
    export_model.aurocs_on_planted_defects(Engine(), category, chosen, 0)
    assert seen == [(6, 48, 32)] and "in 16 of 48 pictures" in capsys.readouterr().out


def test_what_was_decided_holds_for_these_scores_and_settings_only(workspace):
    def decided(chosen=OFFERING):
        return branch_choice.fused_branches("discs", workspace, chosen)[0]

    def said(chosen=OFFERING):
        return branch_choice.fused_branches("discs", workspace, chosen)[1]

    everything = ["patchhist", "LGST", "memory"]
    assert decided() == ["patchhist", "memory"] and "has not decided yet whether LGST is fused" in said()
    branch_choice.write("discs", workspace, OFFERING, {}, everything)
    assert decided() == everything and not said()
    assert "other fusion settings" in said(OFFERING.model_copy(update={"rule": "sum"}))
    assert not said(FusionSettings(branches=["memory"]))  # nothing is optional
    assert decided(OFFERING.model_copy(update={"rule": "sum"})) == ["patchhist", "memory"]
    assert decided(FusionSettings(branches=["memory"])) == ["memory"]
    files.write_array(workspace.scores("discs", "LGST", "val"), np.arange(4.0) + 1)
    assert decided() == ["patchhist", "memory"]
    assert "other validation scores" in said() and "run export_model.py again" in said()


def test_a_branch_whose_stage_was_not_run_is_not_on_offer(workspace):
    assert branch_choice.on_offer("discs", workspace, OFFERING) == ["LGST"]
    workspace.checkpoint("discs", "LGST").unlink()
    assert branch_choice.on_offer("discs", workspace, OFFERING) == []


def test_with_seeds_each_decides_with_its_own(make_dataset, tmp_path):
    options = with_cluster(with_branches(with_seeds(common_options("")))).parse_args(
        ["--dataset_root", str(make_dataset(train=1)), "--workspace", str(tmp_path), "--device", "cpu", "--seeds", "3", "5"])
    seeds = {name: task.do.args[2].seed for name, task in export_model.jobs(options).items()}
    assert seeds == {"discs, seed 3": 3, "discs, seed 5": 5}


def test_who_names_branches_gets_these():
    assert settings.load("discs", "quick").fusion.offered == ["LGST"]
    assert settings.load("discs", "quick", {"fusion.branches": ["memory"]}).fusion.offered == []
    assert settings.load("discs", "quick", {"fusion.branches": ["memory"], "fusion.offered": ["LGST"]}).fusion.offered == ["LGST"]
    assert settings.load("discs").fusion.offered == []
