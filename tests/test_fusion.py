"""Fusion: trimmed z, how branches are added, and the one threshold (docs/method.md sections 2 and 4, docs/beyond.md)."""

import math

from csad.evaluation.thresholds import choose_threshold

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import fused
from models.fusion import (
    EXPORTED_STD_FLOOR,
    apply_z,
    contribution,
    fit_normalisation,
    fit_trimmed_z,
    fit_upper_z,
    fit_z,
    fuse,
    fused_map,
)

scores = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60)


# Trimmed z


def test_trimmed_z_matches(reference):
    expected = reference("fusion")
    fused = 0
    for branch in ("lgst", "patchhist"):
        normalised = apply_z(expected[f"{branch}_test"], *fit_trimmed_z(expected[f"{branch}_val"]))
        np.testing.assert_allclose(normalised, expected[f"{branch}_normalized"], rtol=0, atol=1e-9)
        fused = fused + normalised
    np.testing.assert_allclose(fused, expected["fused"], rtol=0, atol=1e-9)


def test_trimmed_z_ignores_outliers():
    scores = np.arange(10.0)
    assert fit_trimmed_z(scores) == fit_trimmed_z(np.r_[-1e6, scores[1:9], 1e6])


@pytest.mark.parametrize("scores", [[3.0], [3.0, 3.0, 3.0, 3.0]])
def test_trimmed_z_without_spread_divides_by_one(scores):
    assert fit_trimmed_z(scores) == (3.0, 1.0)


def test_the_exported_model_takes_a_tiny_spread_for_none():
    scores = 5 + 1e-4 * np.arange(20)
    assert fit_trimmed_z(scores)[1] < 1e-3
    assert fit_trimmed_z(scores, EXPORTED_STD_FLOOR)[1] == 1


@pytest.mark.parametrize("fit", [fit_trimmed_z, fit_upper_z, fit_z])
@pytest.mark.parametrize("scores", [[], [1.0, np.nan]])
def test_z_refuses_what_it_cannot_use(scores, fit):
    with pytest.raises(ValueError, match="at least one validation score"):
        fit(scores)


def test_softplus_normalises_by_all_scores_and_the_sum_by_those_in_the_middle():
    """Of few validation images the middle ones lie close together by chance, which must not make a branch loud."""
    few = np.array([0.0, 1.9, 2.0, 2.1, 2.2, 9.0])
    assert fit_normalisation(few, "memory", "sum") == fit_trimmed_z(few)
    mean, std = fit_normalisation(few, "memory", "softplus")
    assert mean == pytest.approx(few.mean() + 1.5 * few.std()) and std == pytest.approx(few.std() / 3)
    assert std > 5 * fit_trimmed_z(few)[1]


def test_the_histogram_is_silent_where_good_images_scores_are_and_rises_as_the_others_do():
    """At the weight 1/2 that stage 4 gives it: noise of label maps must not hide what the memory finds."""
    good = np.random.default_rng(0).normal(5, 2, 200)

    def added(branch, weight, z):
        mean, std = (fit_upper_z if branch == "patchhist" else fit_z)(good)
        return weight * contribution(
            apply_z(mean + z * std, *fit_normalisation(good, branch, "softplus")), "softplus"
        )

    assert added("patchhist", 0.5, 1) < 0.01 < 0.2 < added("memory", 1, 1)
    assert added("patchhist", 0.5, 12) - added("patchhist", 0.5, 10) == pytest.approx(6, abs=1e-6)
    assert added("memory", 1, 12) - added("memory", 1, 10) == pytest.approx(6, abs=1e-6)


def test_a_few_held_out_images_far_out_do_not_hide_what_the_histogram_finds():
    """Of 200, four lie ten standard deviations off, as they do on development sets."""
    usual = np.random.default_rng(0).normal(5, 2, 196)
    good = np.r_[usual, [25.0] * 4]
    median, std = fit_upper_z(good)
    assert median == pytest.approx(5, abs=0.3) and 1.8 < std < 2.2 < 3 < good.std()
    counted_from = {name: fit_normalisation(good, name, "softplus")[0] for name in ("patchhist", "memory")}
    assert counted_from["patchhist"] < 5 + 2.6 * 2 and counted_from["memory"] > 5 + 2.6 * 2
    assert fit_normalisation(good, "patchhist", "sum") == fit_trimmed_z(good)


def test_where_nearly_all_scores_are_the_same_the_rest_still_have_a_spread():
    """One component alone: its label map is whole in 95 of 100 images. A tiny std would let the others shout."""
    good = np.r_[np.zeros(95), np.full(5, 4.0)]
    assert fit_upper_z(good) == (0, pytest.approx(good.std() / 2))
    assert fit_upper_z([4.0, 4.0]) == (4, 1)


def test_z_of_all_scores_that_are_equal_has_a_spread():
    assert fit_z([4.0, 4.0]) == (4, 1)


@given(st.lists(st.integers(-1000, 1000), min_size=1, max_size=60), st.sampled_from([0.25, 2, 64]))
def test_the_units_of_a_branch_do_not_matter(values, unit):
    values = np.array(values, float)
    (mean, std), (scaled_mean, scaled_std) = fit_trimmed_z(values), fit_trimmed_z(unit * values)
    if std != 1 or scaled_std != 1:  # there is a spread
        np.testing.assert_allclose(
            apply_z(unit * values, scaled_mean, scaled_std), apply_z(values, mean, std)
        )
    else:
        assert (scaled_mean, scaled_std) == (unit * mean, 1)


# Fusion


def test_the_sum_adds_and_softplus_forgets_what_is_all_too_usual():
    branches = {
        "patchhist": np.array([5.0, -50.0]),
        "memory": np.array([1.0, 3.0]),
        "LGST": np.array([9.0, 9.0]),
    }
    np.testing.assert_allclose(fuse(branches, {"patchhist": 1, "memory": 1}, "sum"), [6, -47])
    np.testing.assert_allclose(fuse(branches, {"memory": 0.5, "LGST": 2}, "sum"), [18.5, 19.5])
    found = fuse(branches, {"patchhist": 1, "memory": 1}, "softplus")
    np.testing.assert_allclose(
        found, [math.log1p(math.exp(5)) + math.log1p(math.exp(1)), math.log1p(math.exp(3))]
    )


@given(st.lists(st.floats(-700, 700), min_size=2, max_size=20))
def test_softplus_keeps_the_order_of_one_branch(values):
    values = np.sort(np.array(values))
    found = contribution(values, "softplus")
    assert (np.diff(found) >= 0).all() and (found >= np.maximum(values, 0)).all() and np.isfinite(found).all()


# The threshold


@given(scores, st.floats(0, 1))
def test_the_threshold_is_the_order_statistic_of_split_conformal_prediction(values, rate):
    found = choose_threshold(np.array(values), rate)
    n = len(values)
    rank = int(np.searchsorted(np.sort(values), found.value, side="right"))  # of equal ones the last
    assert found.value in values and found.images == n and found.target_fpr == rate
    wanted = math.ceil((n + 1) * (1 - rate) - 1e-9)
    if wanted > n:
        assert (
            found.value == max(values)
            and not found.is_met
            and found.guaranteed_fpr == pytest.approx(1 / (n + 1))
        )
    else:
        assert found.is_met and rank >= wanted
        assert found.value == np.sort(values)[max(wanted, 1) - 1]
    assert 1 / (n + 1) - 1e-12 <= found.guaranteed_fpr < 1


@settings(max_examples=12, deadline=None)
@given(
    n=st.integers(5, 150),
    rate=st.sampled_from([0.01, 0.05, 0.1, 0.3]),
    seed=st.integers(0, 2**32 - 1),
    heavy=st.booleans(),
)
def test_of_good_images_no_more_lie_over_it_than_promised(n, rate, seed, heavy):
    """In expectation over the choice of validation images, whatever the scores' distribution: a small simulation."""
    rng = np.random.default_rng(seed)
    drawn = rng.standard_cauchy((1500, n + 1)) if heavy else rng.normal(size=(1500, n + 1))
    found = [choose_threshold(validation, rate) for validation in drawn[:, :-1]]
    over = np.mean(drawn[:, -1] > [one.value for one in found])
    promised = found[0].guaranteed_fpr
    assert promised <= max(rate, 1 / (n + 1)) + 1e-12
    # Five standard deviations of the simulation, above and below: it keeps its word and is not overcautious either.
    assert abs(over - promised) < 5 * math.sqrt(promised * (1 - promised) / len(drawn)) + 1e-9


def test_words_say_what_is_promised_and_what_it_would_take():
    few = choose_threshold(np.arange(10.0), 0.01)
    assert (few.value, few.is_met) == (9, False)
    assert few.description == (
        "about 1 good part in 11 may be rejected; 99 good validation pictures would allow 1 in 100"
    )
    assert choose_threshold(np.arange(99.0), 0.01).is_met
    assert choose_threshold(np.arange(99.0), 0.01).description == "about 1 good part in 100 may be rejected"
    assert "no number of good validation pictures" in choose_threshold(np.arange(10.0), 0).description
    assert choose_threshold(np.arange(2.0), 0.01).description.startswith("about 1 good part in 3 may")
    assert choose_threshold(np.arange(9.0), 0.4).description == "about 40 good parts in 100 may be rejected"
    assert choose_threshold(np.arange(2.0), 0.25).description.endswith(
        "; 3 good validation pictures would allow 1 in 4"
    )


@pytest.mark.parametrize(
    "values, rate",
    [
        ([], 0.1),
        ([1.0, np.nan], 0.1),
        ([1.0, np.inf], 0.1),
        ([1.0], -0.1),
        ([1.0], 1.1),
        ([1.0], float("nan")),
    ],
)
def test_a_threshold_of_nothing_is_refused(values, rate):
    with pytest.raises(ValueError):
        choose_threshold(np.array(values), rate)


# The fused map


def test_a_branch_that_adds_little_does_not_paint_over_the_others():
    """DFM's map is three times as high, but the score is the memory's: what the memory points at stays the highest."""
    memory, dfm = [[9.0, 0.0]], [[0.0, 27.0]]
    drawn = fused_map(np.array([[memory, dfm]]), np.array([[20.0, 0.01]]), "softplus")[0, 0]
    assert drawn[0] == pytest.approx(20**0.1 * 9**0.25) and drawn[1] == pytest.approx(0.01**0.1 * 27**0.25)
    assert drawn[0] > drawn[1]


def test_what_is_usual_in_good_images_is_not_made_higher():
    maps = np.array([[[[0.2, -3.0]]]])
    np.testing.assert_allclose(fused_map(maps, np.array([[1.0]]), "softplus"), [[[0.2, 0]]])


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.sampled_from(["sum", "softplus"]))
@settings(deadline=None, max_examples=30)
def test_the_model_and_stage_5_fuse_maps_alike(seed, branches, rule):
    rng = np.random.default_rng(seed)
    maps = rng.normal(0, 3, (2, branches, 5, 4)).astype(np.float32)
    contributions = contribution(rng.normal(0, 5, (2, branches)), rule).astype(np.float32)
    of_model = fused.fused_map(torch.from_numpy(maps), torch.from_numpy(contributions), rule)
    np.testing.assert_allclose(of_model, fused_map(maps, contributions, rule), rtol=1e-5)
