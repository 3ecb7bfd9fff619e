"""The patch memory and the evidence of the patch histogram: plain forms, what they promise, and mistakes."""

import numpy as np
import pytest
import torch
from test_train_segmentor import TinyEncoder, job_for

import patch_memory
import settings
from data import files, layouts
from data.workspace import Workspace
from errors import UserError
from models.backbone import Backbone, fingerprint
from models.histogram_evidence import HistogramEvidence, fit_evidence
from models.patch_memory import PatchMemory, greedy_k_centre, smooth

CATEGORY = "discs"


def reach(candidates, rows):
    """How far the farthest candidate is from its nearest row."""
    return torch.cdist(candidates, candidates[rows]).amin(1).max().item()


def test_k_centre_covers_better_than_chance_and_nearly_as_well_as_one_by_one():
    generator = torch.Generator().manual_seed(0)
    candidates = torch.randn(3000, 8, generator=generator)
    chosen = greedy_k_centre(candidates, 300, torch.Generator().manual_seed(1))
    assert len(set(chosen.tolist())) == 300
    assert torch.equal(chosen, greedy_k_centre(candidates, 300, torch.Generator().manual_seed(1)))
    plain = [int(chosen[0])]
    nearest = torch.cdist(candidates, candidates[plain])[:, 0]
    for _ in range(299):
        plain.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, (candidates - candidates[plain[-1]]).norm(dim=1))
    assert reach(candidates, chosen) < 1.15 * reach(candidates, plain)
    assert reach(candidates, chosen) < 0.9 * reach(candidates, torch.randperm(3000, generator=generator)[:300])


def test_all_candidates_may_be_chosen_and_copies_do_no_harm():
    candidates = torch.cat([torch.zeros(20, 3), torch.eye(3)])
    assert sorted(greedy_k_centre(candidates, 23, torch.Generator().manual_seed(0)).tolist()) == list(range(23))


@pytest.fixture
def memory():
    torch.manual_seed(0)
    made = PatchMemory(5, 40, 8, 0.05)
    made.rows.normal_()
    return made


def test_distances_are_those_to_the_nearest_row(memory):
    embedded = torch.randn(2, 5, 8, 8)
    flat = embedded.flatten(2).transpose(1, 2)
    torch.testing.assert_close(memory.distances(embedded).flatten(1), torch.cdist(flat, memory.rows[None]).amin(2),
                               atol=1e-4, rtol=1e-4)
    left_out = torch.arange(40) < 30
    torch.testing.assert_close(memory.distances(embedded, left_out).flatten(1),
                               torch.cdist(flat, memory.rows[None, 30:]).amin(2), atol=1e-4, rtol=1e-4)


def test_a_score_is_the_mean_of_the_largest_values(memory):
    maps = torch.arange(64.0).view(1, 8, 8)
    assert memory.score(maps).item() == pytest.approx((63 + 62 + 61) / 3)


def test_smoothing_keeps_what_is_even_and_spreads_what_is_not():
    torch.testing.assert_close(smooth(torch.full((1, 8, 8), 3.0), 1.0), torch.full((1, 8, 8), 3.0))
    spot = torch.zeros(1, 16, 16)
    spot[0, 8, 8] = 1
    spread = smooth(spot, 1.0)
    assert spread.sum().item() == pytest.approx(1, abs=1e-4) and spread.max() < 0.2


def test_map_normalisation_puts_the_quantiles_at_0_and_1(memory):
    maps = torch.rand(6, 8, 8)
    memory.fit_map_normalisation(maps)
    inside = memory.scaled(maps)
    assert inside.shape == (6, 64, 64)
    flat = torch.tensor([[memory.q_start, memory.q_end]]).view(1, 1, 2).expand(1, 2, 2)
    assert memory.scaled(flat)[0, 0, 0] == 0 and memory.scaled(flat)[0, 0, -1] == pytest.approx(1, abs=1e-6)
    memory.fit_map_normalisation(torch.ones(2, 8, 8))
    assert torch.isfinite(memory.scaled(torch.ones(1, 8, 8))).all()


@pytest.fixture
def category(make_dataset):
    return layouts.Category(make_dataset(train=6, validation=2, test=2) / CATEGORY)


def fit(category, workspace, overwrite=False, **more):
    chosen = settings.load(CATEGORY, "quick", {"images.size": 256, "memory.rows": 30} | more)
    encoder = TinyEncoder().eval()
    patch_memory.fit_category(job_for(category, workspace, Backbone("tiny", encoder, fingerprint(encoder)), chosen,
                                      overwrite=overwrite))


def test_the_stage_writes_repeats_skips_and_notices(category, tmp_path, capsys):
    first, second = Workspace(tmp_path / "1"), Workspace(tmp_path / "2")
    fit(category, first)
    fit(category, second)
    assert first.memory(CATEGORY).read_bytes() == second.memory(CATEGORY).read_bytes()
    for part, count in (("logi", 4), ("struc", 4), ("val", 2)):
        assert files.read_array(first.scores(CATEGORY, "memory", part)).shape == (count,)
    maps = files.read_arrays(first.anomaly_maps(CATEGORY, "memory"))
    assert {name: values.shape for name, values in maps.items()} == {
        name: (2, 64, 64) for name in ("val", *layouts.SPLITS)}
    scores = files.read_array(first.scores(CATEGORY, "memory", "struc"))
    assert scores[2:].min() > scores[:2].max()  # scratched
    fit(category, first)
    assert "skipped" in capsys.readouterr().out
    with pytest.raises(UserError, match="rows: 30 -> 20"):
        fit(category, first, **{"memory.rows": 20})


def test_more_rows_than_patches_get_a_sentence(category, tmp_path):
    with pytest.raises(UserError, match="6 training images have 6144 patches, fewer than the 7000 rows.*--memory.rows"):
        fit(category, Workspace(tmp_path), **{"memory.rows": 7000})


def arrangement(missing=False, moved=False, seed=0):
    """Two components: a square on the left, one on the right, each jittered by a few pixels."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((256, 256), np.uint8)
    for component, left in ((1, 40), (2, 160)):
        if component == 2 and missing:
            continue
        top, left = 100 + rng.integers(-4, 5), left + rng.integers(-4, 5)
        if component == 2 and moved:
            top = 10
        labels[top:top + 50, left:left + 50] = component
    return labels


def test_evidence_is_drawn_where_a_component_is_missing_or_too_many():
    train, validation = (torch.from_numpy(np.stack([arrangement(seed=seed) for seed in seeds]))
                         for seeds in (range(30), range(30, 45)))
    evidence = HistogramEvidence(3)
    evidence.load_parameters(fit_evidence(train, validation, 3))
    good, missing, moved = (evidence(torch.from_numpy(arrangement(seed=99, **changes))[None])[0]
                            for changes in ({}, {"missing": True}, {"moved": True}))
    assert good.max() < 0.5 * min(missing.max(), moved.max())
    row, column = divmod(int(missing.argmax()), 64)
    assert 22 <= row <= 40 and 37 <= column <= 56  # where the right square usually is
    row, column = divmod(int(moved.argmax()), 64)
    assert column >= 37 and (row < 16 or 22 <= row <= 40)  # where it is now, or was
    with pytest.raises(ValueError, match="another number of classes"):
        HistogramEvidence(4).load_parameters(fit_evidence(train, validation, 3))


def test_evidence_of_identical_training_images_is_finite():
    labels = torch.from_numpy(np.stack([arrangement()] * 3))
    evidence = HistogramEvidence(3)
    evidence.load_parameters(fit_evidence(labels, labels, 3))
    found = evidence(torch.from_numpy(np.stack([arrangement(), arrangement(missing=True)])))
    assert torch.isfinite(found).all() and found[1].max() > found[0].max()
