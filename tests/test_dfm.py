"""DFM: a PCA of pooled maps, what it cannot explain, and the stage that fits it."""

import shutil

from csad import settings
from csad.data import files, layouts
from csad.data.workspace import Workspace
from csad.errors import UserError

import numpy as np
import pytest
import torch
from conftest import job_for, tiny_backbone
from sklearn.decomposition import PCA

import patch_memory
from models import dfm
from models.constants import MAP_QUANTILES

CATEGORY = "discs"


def drawn(
    count: int, seed: int = 0, channels: int = 3, directions: int = 4, noise: float = 0.1
) -> torch.Tensor:
    """Pooled maps (N, C, 8, 8) that vary in a few directions, and a little in all."""
    basis = torch.randn(directions, channels * 64, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, directions, generator=generator) @ basis + 2
    return (values + noise * torch.randn(values.shape, generator=generator)).view(count, channels, 8, 8)


def test_it_is_the_reconstruction_error_of_a_pca():
    train, test = drawn(40), drawn(5, seed=1, noise=1.0)
    model = dfm.fit(train, 3)
    expected = PCA(dfm.VARIANCE, svd_solver="full").fit(train.flatten(1).double().numpy())
    assert len(model.components) == expected.n_components_
    features = test.flatten(1).double().numpy()
    residual = features - expected.inverse_transform(expected.transform(features))
    errors = model(test)
    np.testing.assert_allclose(errors, np.sqrt((residual.reshape(5, 3, 8, 8) ** 2).sum(1)), rtol=1e-3)
    np.testing.assert_allclose(model.score(errors), np.linalg.norm(residual, axis=1), rtol=1e-4)
    torch.testing.assert_close(
        model.components @ model.components.T, torch.eye(len(model.components)), atol=1e-5, rtol=0
    )


def test_the_map_is_largest_where_something_is_new():
    train, test = drawn(40), drawn(2, seed=1)
    test[1, :, 5, 2] += 4
    model = dfm.fit(train, 3)
    errors = model(test)
    assert model.score(errors)[1] > 2 * model.score(errors)[0]
    model.fit_map_normalisation(model(drawn(20, seed=2)))
    shown = model.scaled(errors)
    assert shown.shape == (2, 64, 64) and shown[1].max() > 1
    assert [int(index) // 8 for index in np.unravel_index(int(shown[1].argmax()), (64, 64))] == [5, 2]


class OnMps(torch.Tensor):
    """A tensor that says that it is on Apple's MPS, which has neither float64 nor eigh."""

    device = torch.device("mps")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.double, torch.linalg.eigh):
            raise TypeError("the MPS framework doesn't support float64")
        if function is torch.Tensor.to and args[1] == torch.device("cpu"):
            return args[0].as_subclass(torch.Tensor)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_it_is_fitted_on_a_device_without_float64(monkeypatch):
    moved, to = [], torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor,
        "to",
        lambda tensor, device: (
            moved.append(device) or (tensor if device == OnMps.device else to(tensor, device))
        ),
    )
    mean, components = dfm.fit_pca(drawn(5).as_subclass(OnMps))
    torch.testing.assert_close((mean, components), dfm.fit_pca(drawn(5)))
    assert moved[1:3] == [OnMps.device] * 2


def test_errors_of_held_out_images_are_those_of_other_good_images():
    """Of the images that a PCA was fitted to they are far smaller, which would pass for what is usual."""
    train, others = drawn(40, noise=1.0), drawn(60, seed=1, noise=1.0)
    model = dfm.fit(train, 3)
    fitted, new, held_out = (
        float(errors.square().sum((1, 2)).sqrt().mean())
        for errors in (model(train), model(others), dfm.held_out_errors(train))
    )
    assert fitted < 0.7 * new and held_out == pytest.approx(new, rel=0.25)
    torch.testing.assert_close(model.baseline, dfm.held_out_errors(train).mean(0, keepdim=True))


@pytest.mark.parametrize("train", [drawn(1), drawn(1).expand(6, -1, -1, -1), torch.zeros(3, 3, 8, 8)])
def test_few_or_equal_images_give_finite_numbers(train):
    model = dfm.fit(train, 3)
    model.fit_map_normalisation(model(train))
    errors = model(drawn(2, seed=1))
    assert all(
        values.isfinite().all() for values in (*model.state_dict().values(), errors, model.scaled(errors))
    )
    torch.testing.assert_close(model(train), torch.zeros(len(train), 8, 8), atol=1e-4, rtol=0)


def test_a_state_dict_gives_the_same_model():
    model = dfm.fit(drawn(10), 3)
    again = dfm.DeepFeatureModel(3, len(model.components))
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(drawn(3, seed=2)), model(drawn(3, seed=2)))


# The stage


@pytest.fixture
def category(make_dataset):
    return layouts.Category(make_dataset(train=8, validation=5, test=2) / CATEGORY)


def fit(category, root, overwrite=False):
    workspace = Workspace(root)
    chosen = settings.load(CATEGORY, "quick", {"images.size": 256, "memory.rows": 30})
    patch_memory.fit_dfm(job_for(category, workspace, tiny_backbone(), chosen, 0, overwrite))
    return workspace


def test_the_stage_writes_scores_and_maps(category, tmp_path):
    workspace = fit(category, tmp_path)
    scores = {
        part: files.read_array(workspace.scores(CATEGORY, "DFM", part)) for part in ("logi", "struc", "val")
    }
    assert [len(scores[part]) for part in ("logi", "struc", "val")] == [4, 4, 5]
    assert scores["struc"][2:].min() > scores["struc"][:2].max()  # scratched
    maps = files.read_arrays(workspace.anomaly_maps(CATEGORY, "DFM"))
    assert {split: values.shape for split, values in maps.items()} == {
        "val": (5, 64, 64),
        **{split: (2, 64, 64) for split in layouts.SPLITS},
    }
    # Comparable with other branches' maps, as those of the exported model are.
    np.testing.assert_allclose(np.quantile(maps["val"], MAP_QUANTILES), (0, 1), atol=1e-4)


@pytest.mark.parametrize("missing", [layouts.LOGICAL, layouts.STRUCTURAL])
def test_a_kind_of_anomaly_without_images_has_maps_of_none(category, tmp_path, missing):
    shutil.rmtree(category.root / "test" / missing)
    maps = files.read_arrays(fit(category, tmp_path).anomaly_maps(CATEGORY, "DFM"))
    assert {len(maps[split]) for split in layouts.SPLITS if split != missing} == {2}
    assert maps[missing].shape == (0, 64, 64)


def test_finished_work_is_skipped_and_scored_anew_for_other_validation_images(
    category, tmp_path, capsys, monkeypatch
):
    workspace = fit(category, tmp_path)
    before = files.read_state(workspace.checkpoint(CATEGORY, "DFM"))["state"]
    with monkeypatch.context() as patched:
        patched.setattr(dfm, "fit", None)
        fit(category, tmp_path)
    assert "skipped" in capsys.readouterr().out
    category.validation[0].unlink()
    fit(category, tmp_path)
    after = files.read_state(workspace.checkpoint(CATEGORY, "DFM"))["state"]
    assert {name for name in after if not torch.equal(before[name], after[name])} <= {"q_start", "q_end"}
    assert len(files.read_array(workspace.scores(CATEGORY, "DFM", "val"))) == 4


def test_errors_that_are_no_numbers_are_not_written(category, tmp_path, monkeypatch):
    monkeypatch.setattr(
        patch_memory,
        "pooled_maps",
        lambda job, paths, what: (
            torch.full((5, 8, 8, 8), 1.0)
            if "train" in what
            else torch.full((len(paths), 8, 8, 8), float("nan"))
        ),
    )
    with pytest.raises(UserError, match="errors that are not finite"):
        fit(category, tmp_path)
    assert not Workspace(tmp_path).checkpoint(CATEGORY, "DFM").exists()
