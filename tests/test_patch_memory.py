"""The patch memory: which patches are remembered, how far others lie from them, and stage 3b on a tiny data set."""

import re

from csad import settings
from csad.data import files, layouts
from csad.data.workspace import Workspace
from csad.errors import UserError

import numpy as np
import pytest
import torch
from conftest import job_for, tiny_backbone
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import patch_memory
from models.patch_memory import (
    CONTEXT_WEIGHT,
    PatchMemory,
    RememberedPatches,
    greedy_k_centre,
    patches,
    smooth,
)

CATEGORY, CHANNELS = "discs", (4, 6, 8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def encoder_maps(count=2, side=256, seed=0):
    return tuple(
        torch.randn(count, channels, side // fraction, side // fraction, generator=seeded(seed))
        for channels, fraction in zip(CHANNELS, (4, 8, 16))
    )


def drawn_patches(rows=40, side=32):
    remembered = RememberedPatches(sum(CHANNELS[1:]), rows, side)
    remembered.rows.copy_(torch.randn(remembered.rows.shape, generator=seeded(1)))
    remembered.mean.uniform_(-0.2, 0.2, generator=seeded(2))
    remembered.std.uniform_(0.5, 1.5, generator=seeded(3))
    return remembered


def drawn_memory(side=32, score_share=0.01, tiles=1):
    memory = PatchMemory(CHANNELS[1:], 40, 20, side, score_share, tiles)
    memory.detail = drawn_patches(side=side)
    memory.context.rows.copy_(torch.randn(memory.context.rows.shape, generator=seeded(4)))
    return memory


# The choice of rows


def reach(candidates, rows):
    """How far the candidate lies that is farthest from its nearest row."""
    return torch.cdist(candidates, candidates[rows]).amin(1).max().item()


@hypothesis_settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), total=st.integers(1, 120), share=st.floats(0.02, 1))
def test_as_many_different_rows_as_asked_for(seed, total, share):
    count = max(int(share * total), 1)
    found = greedy_k_centre(torch.randn(total, 5, generator=seeded(seed)), count, seeded(seed))
    assert len(found) == len(set(found.tolist())) == count
    assert found.min() >= 0 and found.max() < total


def test_chosen_rows_cover_better_than_random_ones():
    candidates = torch.randn(3000, 6, generator=seeded())
    candidates[:30] += 12  # few, and far away: chance forgets them
    chosen = reach(candidates, greedy_k_centre(candidates, 100, seeded()))
    at_random = [reach(candidates, torch.randperm(3000, generator=seeded(seed))[:100]) for seed in range(5)]
    assert chosen < 0.8 * min(at_random)


def test_rounds_cover_nearly_as_well_as_one_row_after_the_other():
    candidates = torch.randn(1500, 6, generator=seeded())
    first = int(torch.randint(1500, (1,), generator=seeded()))
    one_by_one, nearest = [first], (candidates - candidates[first]).norm(dim=1)
    while len(one_by_one) < 200:
        one_by_one.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, (candidates - candidates[one_by_one[-1]]).norm(dim=1))
    assert reach(candidates, greedy_k_centre(candidates, 200, seeded())) < 1.2 * reach(
        candidates, torch.tensor(one_by_one)
    )


def test_the_seed_alone_decides_and_progress_adds_up():
    candidates, told = torch.randn(400, 4, generator=seeded()), []
    found = greedy_k_centre(candidates, 60, seeded(5), told.append)
    assert torch.equal(found, greedy_k_centre(candidates, 60, seeded(5)))
    assert not torch.equal(found, greedy_k_centre(candidates, 60, seeded(6)))
    assert sum(told) == 60 - 1  # the first one is drawn


def test_equal_candidates_are_no_trouble():
    assert sorted(greedy_k_centre(torch.ones(5, 3), 5, seeded()).tolist()) == list(range(5))


# Distances, maps and scores


def test_patches_lie_side_by_side_on_the_finer_grid():
    maps = encoder_maps()
    found = patches(maps)
    assert found.shape == (2, CHANNELS[1] + CHANNELS[2], 32, 32)
    assert torch.equal(found[:, : CHANNELS[1]], maps[1])
    torch.testing.assert_close(found[:, CHANNELS[1] :].mean((2, 3)), maps[2].mean((2, 3)), atol=0.05, rtol=0)


def test_distances_are_those_to_the_nearest_row():
    remembered = drawn_patches()
    embedded = remembered.embed(patches(encoder_maps()))
    vectors = embedded.flatten(2).transpose(1, 2)
    apart = torch.cdist(vectors, remembered.rows, compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(remembered.distances(embedded).flatten(1), apart.amin(2), atol=1e-4, rtol=1e-4)
    left_out = torch.zeros(len(remembered.rows), dtype=torch.bool)
    left_out[apart[0, 0].argmin()] = True
    torch.testing.assert_close(
        remembered.distances(embedded, left_out).flatten(1),
        apart[..., ~left_out].amin(2),
        atol=1e-4,
        rtol=1e-4,
    )


def test_a_remembered_patch_is_not_unusual():
    remembered = drawn_patches()
    embedded = remembered.embed(patches(encoder_maps(1)))
    remembered.rows.copy_(embedded[0].flatten(1).T[: len(remembered.rows)])
    distances = remembered.distances(embedded)[0].flatten()
    count = len(remembered.rows)
    assert distances[:count].max() < 0.01 < distances[count:].min()


def test_what_is_usual_at_a_place_is_taken_off():
    remembered = drawn_patches()
    features = patches(encoder_maps(1))
    before, own = remembered(features), remembered.distances(remembered.embed(features))
    remembered.fit_baseline([own[0], own[0]])
    after = remembered(features)
    assert (after < before).all()
    torch.testing.assert_close(before - after, smooth(remembered.usual, 1.0, "zeros"), atol=1e-4, rtol=1e-4)
    remembered.fit_baseline([torch.zeros(32, 32)])
    torch.testing.assert_close(remembered(features), before)


def test_the_same_distance_counts_less_at_the_border():
    remembered = drawn_patches()
    alike = remembered.deviations(torch.ones(1, 32, 32))
    assert alike[0, 4:-4, 4:-4].amin() > 0.99 > 0.75 > alike[0, 0].amax()
    remembered.border = "replicate"
    torch.testing.assert_close(remembered.deviations(torch.ones(1, 32, 32)), torch.ones(1, 32, 32))


def test_the_map_is_that_of_the_details_and_a_share_of_the_context():
    memory, large, small = drawn_memory(side=64), encoder_maps(side=512), encoder_maps()
    torch.testing.assert_close(memory(large, small), memory.detail(patches(large)))  # not fitted yet
    memory.context_scale.fill_(0.5)
    context = memory(large, small) - memory.detail(patches(large))
    # Blocks of 4x4 of what is enlarged from 16x16 to 64x64, away from the border, have the small map's values as means.
    means = torch.nn.functional.avg_pool2d(context, 4)[:, 2:-2, 2:-2]
    torch.testing.assert_close(means, 0.5 * memory.context(small[2])[:, 2:-2, 2:-2], atol=0.15, rtol=0.1)


@hypothesis_settings(max_examples=25, deadline=None)
@given(spread=st.floats(0.01, 100), context_spread=st.floats(0.01, 100))
def test_a_deviation_counts_by_how_far_good_images_scatter(spread, context_spread):
    memory = drawn_memory()
    distances = spread * torch.rand(6, 32, 32, generator=seeded())
    context_distances = context_spread * torch.rand(6, 16, 16, generator=seeded())
    memory.fit_context_scale(distances, context_distances)
    scattered = (memory.context_scale * memory.context.deviations(context_distances)).std()
    torch.testing.assert_close(scattered, CONTEXT_WEIGHT * memory.detail.deviations(distances).std())


def test_a_context_that_never_varies_does_not_count():
    memory = drawn_memory()
    memory.context.border = "replicate"
    memory.fit_context_scale(torch.rand(2, 32, 32), torch.zeros(2, 16, 16))
    assert memory.context_scale == 0


@pytest.mark.parametrize("border, scipys", [("replicate", "nearest"), ("zeros", "constant")])
@pytest.mark.parametrize("sigma", [1.0, 1.5])
def test_smoothing_is_scipys_gaussian(sigma, border, scipys):
    from scipy.ndimage import gaussian_filter

    maps = torch.rand(2, 20, 24, generator=seeded())
    expected = np.stack([gaussian_filter(one.numpy().astype(np.float64), sigma, mode=scipys) for one in maps])
    np.testing.assert_allclose(smooth(maps, sigma, border), expected, atol=1e-5)
    torch.testing.assert_close(smooth(torch.ones(1, 9, 9), sigma), torch.ones(1, 9, 9))


@hypothesis_settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), share=st.floats(1e-4, 1))
def test_the_score_is_the_mean_of_the_largest_values(seed, share):
    maps = torch.rand(2, 8, 8, generator=seeded(seed))
    count = max(round(share * 64), 1)
    expected = [sorted(one.flatten().tolist())[-count:] for one in maps]
    np.testing.assert_allclose(
        PatchMemory((1, 1), 1, 1, 8, share).score(maps), np.mean(expected, 1), rtol=1e-5
    )


@pytest.mark.parametrize("tiles, side", [(1, 32), (1, 64), (2, 128), (4, 256)])
def test_quantiles_of_the_validation_maps_become_0_and_1(tiles, side):
    """As they are shown: of a tiled image's map the maximum of each block is, and more of these are large."""
    memory = drawn_memory(side, tiles=tiles)
    validation = torch.rand(5, side, side, generator=seeded()).pow(4)
    memory.fit_map_normalisation(validation)
    found = memory.scaled(validation)
    assert found.shape == (5, 64, 64)
    assert (found > 0).float().mean().item() == pytest.approx(0.1, abs=0.001)
    assert (found > 1).float().mean().item() == pytest.approx(0.005, abs=0.0005)
    memory.fit_map_normalisation(torch.ones(2, side, side))
    assert memory.scaled(2 * torch.ones(1, side, side)).isfinite().all()


@pytest.mark.gpu
def test_a_gpu_gives_the_same_maps():
    memory, maps = drawn_memory(), encoder_maps()
    memory.context_scale.fill_(0.5)
    expected = memory(maps, maps)
    on_gpu = tuple(one.to("cuda") for one in maps)
    found = memory.to("cuda")(on_gpu, on_gpu).cpu()
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)  # TF32 may multiply


# The stage


@pytest.fixture
def category(make_dataset):
    return layouts.Category(make_dataset(train=4, validation=3, test=2) / CATEGORY)


def fit(category, root, seed=0, overwrite=False, **more):
    workspace = Workspace(root)
    chosen = settings.load(
        CATEGORY,
        "quick",
        {"images.size": 256} | {f"memory.{key}": value for key, value in ({"rows": 30} | more).items()},
    )
    patch_memory.fit_category(job_for(category, workspace, tiny_backbone(), chosen, seed, overwrite))
    return workspace


def contents(workspace):
    return {
        path.relative_to(workspace.root): path.read_bytes()
        for path in workspace.root.rglob("*")
        if path.is_file()
    }


def test_the_stage_writes_scores_and_maps_and_its_seed_decides_the_bytes(category, tmp_path):
    workspace = fit(category, tmp_path / "one")
    assert contents(fit(category, tmp_path / "two")) == contents(workspace)
    other = fit(category, tmp_path / "three", seed=1)
    assert (
        other.checkpoint(CATEGORY, "memory").read_bytes()
        != workspace.checkpoint(CATEGORY, "memory").read_bytes()
    )

    scores = {
        part: files.read_array(workspace.scores(CATEGORY, "memory", part))
        for part in ("logi", "struc", "val")
    }
    assert [len(scores[part]) for part in ("logi", "struc", "val")] == [4, 4, 3]
    assert scores["struc"][2:].min() > scores["struc"][:2].max()  # scratched
    maps = files.read_arrays(workspace.anomaly_maps(CATEGORY, "memory"))
    assert (maps["val"] > 1).mean() == pytest.approx(0.005, abs=0.001)  # as the exported model gives them
    assert {split: one.shape for split, one in maps.items()} == {
        "val": (3, 64, 64),
        **{split: (2, 64, 64) for split in layouts.SPLITS},
    }
    saved = files.read_state(workspace.checkpoint(CATEGORY, "memory"))
    assert saved["state"]["detail.rows"].shape == (30, 16) and saved["meta"]["stand_ins"] == ["backbone tiny"]
    assert len(saved["state"]["context.rows"]) == 15 and saved["state"]["context_scale"] > 0
    # The memory's own numbers, of all training images: nothing in it is of validation or test images.
    embedded = saved["state"]["detail.rows"].norm(dim=1)
    assert embedded.isfinite().all() and embedded.max() > 0


def test_finished_work_is_skipped_and_other_settings_are_noticed(category, tmp_path, capsys, monkeypatch):
    workspace = fit(category, tmp_path)
    before = contents(workspace)
    with pytest.raises(UserError, match="rows: 30 -> 31"):
        fit(category, tmp_path, rows=31)
    with pytest.raises(UserError, match="seed: 0 -> 1"):
        fit(category, tmp_path, seed=1)
    assert contents(workspace) == before
    fit(category, tmp_path, rows=31, overwrite=True)
    assert len(files.read_state(workspace.checkpoint(CATEGORY, "memory"))["state"]["detail.rows"]) == 31
    monkeypatch.setattr(patch_memory, "fit", None)
    fit(category, tmp_path, rows=31)
    assert "skipped" in capsys.readouterr().out


def test_other_validation_images_are_scored_with_the_same_memory(category, tmp_path, monkeypatch):
    workspace = fit(category, tmp_path)
    before = files.read_state(workspace.checkpoint(CATEGORY, "memory"))["state"]
    category.validation[0].unlink()
    monkeypatch.setattr(patch_memory, "fit", None)
    fit(category, tmp_path)
    after = files.read_state(workspace.checkpoint(CATEGORY, "memory"))["state"]
    assert {name for name in after if not torch.equal(before[name], after[name])} == {"q_start", "q_end"}
    assert len(files.read_array(workspace.scores(CATEGORY, "memory", "val"))) == 2


def test_fewer_patches_than_rows_get_a_sentence_before_anything_is_read(category, tmp_path):
    with pytest.raises(
        UserError, match=re.escape("4 training images have 4096 patches, fewer than the 4097 rows asked for")
    ):
        fit(category, tmp_path, rows=4097)
    assert not list(tmp_path.glob("ckpt/*"))
    fit(category, tmp_path, rows=4096)  # all of them
    state = files.read_state(Workspace(tmp_path).checkpoint(CATEGORY, "memory"))["state"]
    assert (len(state["detail.rows"]), len(state["context.rows"])) == (4096, 1024)  # of the context, too


def test_a_row_of_every_image_and_no_way_to_leave_one_out(make_dataset, tmp_path, monkeypatch):
    """With a single training image nothing is left to say what is usual; that is no reason to fail."""
    monkeypatch.setattr(layouts, "MIN_WITH_VALIDATION", 1)
    category = layouts.Category(make_dataset(train=1, validation=2, test=2) / CATEGORY)
    workspace = fit(category, tmp_path)
    state = files.read_state(workspace.checkpoint(CATEGORY, "memory"))["state"]
    assert all(values.isfinite().all() for values in state.values())


def test_distances_that_are_no_numbers_are_not_written(category, tmp_path, monkeypatch):
    monkeypatch.setattr(patch_memory, "anomaly_maps", lambda *_: torch.full((3, 32, 32), float("nan")))
    with pytest.raises(UserError, match="distances that are not finite"):
        fit(category, tmp_path)
    assert not Workspace(tmp_path).checkpoint(CATEGORY, "memory").exists()
