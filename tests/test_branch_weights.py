"""How much each branch counts: the decision by synthetic defects, and who keeps to it."""

from types import SimpleNamespace

from csad import settings
from csad.data import files
from csad.data.workspace import Workspace
from csad.errors import UserError
from csad.evaluation import branch_weights
from csad.evaluation.branch_weights import Defects, choose
from csad.evaluation.metrics import auroc
from csad.export import weighing
from csad.settings import FusionSettings

import numpy as np
import pytest

WEIGHED = FusionSettings(
    branches=["patchhist", "memory"], optional=["LGST", "DFM"], rule="softplus", weights="synthetic_defects"
)
BRANCHES = ["patchhist", "LGST", "memory", "DFM"]
GOOD, DEFECTS = 60, 60


def drawn(structural, logical, seed=0, noise=(1, 1, 1, 1)):
    """Good images' contributions and defects that lift each branch by strength times so much."""
    rng, kinds = np.random.default_rng(seed), {}
    good = np.abs(rng.normal(size=(GOOD, 4))) * noise
    for kind, lifts in (("structural", structural), ("logical", logical)):
        strengths = rng.random(DEFECTS)
        kinds[kind] = Defects(
            np.abs(rng.normal(size=(DEFECTS, 4))) * noise + np.outer(strengths, lifts), strengths
        )
    return good, kinds


@pytest.mark.parametrize("seed", range(4))
def test_a_branch_that_sees_nothing_and_is_loud_is_left_out(seed):
    """Whatever it is: noise in one branch must not hide what another one sees."""
    for loud in (0, 1, 3):
        noise = np.ones(4)
        noise[loud] = 8
        decision = choose(*drawn([0, 0, 4, 0], [0, 0, 4, 0], seed, noise), BRANCHES, WEIGHED.branches)
        assert decision.weights.get(BRANCHES[loud], 0) == 0, BRANCHES[loud]
        assert decision.weights["memory"] == 1
        for by_sum in decision.aurocs.values():
            assert by_sum["fused"] > by_sum["equal weights"] + 3


@pytest.mark.parametrize("seed", range(4))
def test_branches_that_see_different_things_are_all_taken(seed):
    decision = choose(*drawn([0, 0, 5, 0], [0, 0, 0, 5], seed), BRANCHES, WEIGHED.branches)
    assert {"memory", "DFM"} <= decision.weights.keys()
    assert max(decision.weights.values()) == 1 and set(decision.weights.values()) <= set(
        branch_weights.WEIGHTS
    )
    for kind, seeing in (("structural", "memory"), ("logical", "DFM")):
        assert (
            decision.aurocs[kind]["fused"] > decision.aurocs[kind][seeing] - 12
        )  # on both kinds something is found
        assert decision.aurocs[kind]["fused"] > 75


@pytest.mark.parametrize("seed", range(4))
def test_what_chance_says_for_an_optional_branch_does_not_count(seed):
    """It sees what the memory sees, and no more: with few defects one of both is ahead by chance."""
    good, kinds = drawn([0, 4, 4, 0], [0, 4, 4, 0], seed)
    few = {
        kind: Defects(of_kind.contributions[:24], of_kind.strengths[:24]) for kind, of_kind in kinds.items()
    }
    weights = choose(good[:12], few, BRANCHES, WEIGHED.branches).weights
    assert weights["memory"] == 1 and not {"LGST", "DFM"} & weights.keys()


def test_the_histogram_need_not_add_anything_as_long_as_it_costs_next_to_nothing():
    quiet = choose(*drawn([0, 0, 5, 0], [0, 0, 5, 0], noise=(0.1, 1, 1, 1)), BRANCHES, WEIGHED.branches)
    assert quiet.weights["patchhist"] == 0.5  # with its sharpness what 1 is to the others
    assert "LGST" not in quiet.weights or "DFM" not in quiet.weights


def test_a_histogram_that_costs_more_gets_a_smaller_weight_and_not_none():
    """A histogram without a weight is blind to wrong numbers, which no synthetic defect shows."""
    weights = []
    for noise in (0.1, 0.6, 1.0, 1.6, 30.0):
        decision = choose(
            *drawn([0, 0, 5, 0], [0, 0, 5, 0], noise=(noise, 1, 1, 1)), BRANCHES, WEIGHED.branches
        )
        weights.append(decision.weights.get("patchhist", 0))
    assert weights == sorted(weights, reverse=True) and weights[0] == 0.5 and weights[-1] == 0
    assert 0 < weights[3] < 0.5, weights


def test_a_histogram_alone_counts_whatever_it_finds():
    good, kinds = drawn([0, 0, 5, 0], [0, 0, 5, 0])
    alone = {
        kind: Defects(of_kind.contributions[:, :1], of_kind.strengths) for kind, of_kind in kinds.items()
    }
    assert choose(good[:, :1], alone, ["patchhist"], ["patchhist"]).weights == {"patchhist": 0.5}


def test_what_the_histogram_notices_is_measured_on_training_images_held_out():
    rng = np.random.default_rng(0)
    held_out, far, near = rng.normal(4, 1, 90), rng.normal(9, 1, 90), rng.normal(4, 1, 90)
    parameters = {f"{name}_held_out_score": held_out for name in ("hist", "patch_hist")}
    for incomplete, least, most in ((far, 99, 100), (near, 40, 60)):
        more = {f"{name}_incomplete_score": incomplete for name in ("hist", "patch_hist")}
        assert least <= branch_weights.parts_noticed(parameters | more) <= most
    assert branch_weights.parts_noticed({}) is None  # as of published parameter files


def test_the_best_branch_finds_about_nine_of_ten_of_the_defects_that_count():
    """Too easy ones say nothing about the difference between branches, and too faint ones nothing at all."""
    for lift in (40, 1.5):
        good, kinds = drawn([0, 0, lift, 0], [0, 0, lift, 0])
        decision = choose(good, kinds, BRANCHES, WEIGHED.branches)
        for kind, of_kind in kinds.items():
            all_of_them = auroc(good[:, 2], of_kind.contributions[:, 2])
            assert abs(decision.aurocs[kind]["memory"] - 90) < abs(all_of_them - 90)
            assert 0.2 < np.ptp(decision.strengths[kind]) < 0.8


@pytest.mark.parametrize("branches", [["memory"], ["patchhist"], ["patchhist", "DFM"]])
def test_few_branches_are_weighed_too(branches):
    good, kinds = drawn([0, 0, 5, 0], [0, 0, 5, 0])
    columns = [BRANCHES.index(branch) for branch in branches]
    decision = choose(
        good[:, columns],
        {kind: Defects(one.contributions[:, columns], one.strengths) for kind, one in kinds.items()},
        branches,
        WEIGHED.branches,
    )
    assert decision.weights and decision.weights.keys() <= set(branches)
    assert "fuses " in decision.description and "on synthetic defects: structural" in decision.description


# Who keeps to it


@pytest.fixture
def workspace(tmp_path):
    """One in which all stages have run, as far as the choice looks."""
    made = Workspace(tmp_path)
    for branch in BRANCHES:
        made.checkpoint("discs", branch).parent.mkdir(exist_ok=True)
        made.checkpoint("discs", branch).touch()
        files.write_array(made.scores("discs", branch, "val"), np.arange(4.0))
    return made


def test_what_was_decided_holds_for_these_scores_and_settings_only(workspace):
    def decided(fusion=WEIGHED):
        weights, undecided = branch_weights.read("discs", workspace, fusion)
        assert bool(undecided) == (weights == equal and fusion.weights != "equal")
        return weights

    equal, weights = {"patchhist": 1.0, "memory": 1.0}, {"patchhist": 0.25, "memory": 1.0, "DFM": 0.5}
    assert decided() == equal  # nothing is decided yet
    branch_weights.write("discs", workspace, WEIGHED, branch_weights.Decision(weights, {}, {}))
    assert decided() == weights and list(decided()) == ["patchhist", "memory", "DFM"]
    assert decided(WEIGHED.model_copy(update={"rule": "sum"})) == equal
    assert decided(WEIGHED.model_copy(update={"weights": "equal"})) == equal
    assert decided(FusionSettings(branches=["memory"])) == {"memory": 1.0}
    files.write_array(workspace.scores("discs", "LGST", "val"), np.arange(4.0) + 1)
    assert decided() == equal


def test_a_branch_whose_stage_was_not_run_is_no_candidate(workspace):
    assert branch_weights.candidates("discs", workspace, WEIGHED) == BRANCHES
    workspace.checkpoint("discs", "LGST").unlink()
    assert branch_weights.candidates("discs", workspace, WEIGHED) == ["patchhist", "memory", "DFM"]


def test_who_names_branches_gets_these_and_the_paper_weighs_nothing():
    quick = settings.load("discs", "quick").fusion
    assert quick.optional == ["LGST", "DFM"] and quick.weights == "synthetic_defects"
    assert settings.load("discs", "quick", {"fusion.branches": ["memory"]}).fusion.optional == []
    named = settings.load("discs", "quick", {"fusion.branches": ["memory"], "fusion.optional": ["LGST"]})
    assert named.fusion.optional == ["LGST"]
    paper = settings.load("discs").fusion
    assert (paper.optional, paper.weights, paper.rule) == ([], "equal", "sum")


@pytest.mark.parametrize("part", ["good", "structural", "logical"])
def test_branches_are_not_weighed_by_what_is_no_number(part, tmp_path, monkeypatch):
    """No comparison with NaN is true: the branch that could not be computed would get a weight as if it found nothing."""
    branches = ["patchhist", "memory"]
    drawn = {name: np.ones((4, 2)) for name in ("good", "structural", "logical")}
    drawn[part][2, 1] = np.nan
    defects = {kind: Defects(drawn[kind], np.linspace(0, 1, 4)) for kind in ("structural", "logical")}
    monkeypatch.setattr(branch_weights, "candidates", lambda *_: branches)
    monkeypatch.setattr(weighing, "with_optional_branches", lambda *_: ({}, branches))
    monkeypatch.setattr(weighing, "TorchEngine", lambda *_: SimpleNamespace(branches=branches))
    monkeypatch.setattr(weighing, "contributions_on_defects", lambda *_: (drawn["good"], defects))
    fusion = FusionSettings(branches=branches, weights="synthetic_defects")
    workspace, discs = Workspace(tmp_path), SimpleNamespace(name="discs")
    with pytest.raises(UserError, match="discs: .*not finite.*train the stages again"):
        weighing.decide(discs, workspace, fusion, None, 0, "cpu")
    assert not workspace.branch_weights("discs").exists()
