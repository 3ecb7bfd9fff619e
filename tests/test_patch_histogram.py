"""The patch histogram against the published values (docs/method.md section 2)."""

from csad.evaluation.areas import area_statistics
from csad.evaluation.deviations import area_fractions

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from models.patch_histogram import (
    PatchHistogramDetector,
    fit_parameters,
    fitted_detector,
    label_histograms,
    mahalanobis,
)
from models.statistics import regularised_covariance, sample_covariance

CLASSES = 5
label_maps = arrays(
    np.uint8, st.tuples(st.integers(1, 3), st.just(8), st.just(12)), elements=st.integers(0, CLASSES - 1)
)


@pytest.fixture(scope="module")
def published():
    from conftest import REFERENCE

    with np.load(REFERENCE / "patch_histogram.npz", allow_pickle=False) as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def fitted(published):
    return fit_parameters(
        *(torch.from_numpy(published[f"{part}_maps"]) for part in ("train", "val")), CLASSES
    )


@pytest.fixture(scope="module")
def test_maps(published):
    return torch.from_numpy(published["test_maps"])


def test_fitted_parameters_match(published, fitted):
    for name in ("hist_mean", "hist_invcov", "patch_hist_mean", "patch_hist_invcov"):
        assert fitted[name].dtype == np.float64
        np.testing.assert_allclose(
            fitted[name], published[name], rtol=1e-6, atol=1e-9 * np.abs(published[name]).max()
        )
    np.testing.assert_allclose(fitted["hist_val_score"], published["val_scores"][:, 0], rtol=1e-6)
    np.testing.assert_allclose(fitted["patch_hist_val_score"], published["val_scores"][:, 1], rtol=1e-6)


def test_scores_match(published, fitted, test_maps):
    detector = fitted_detector(fitted, CLASSES)
    for column, distances in enumerate(detector.distances(test_maps)):
        np.testing.assert_allclose(distances.numpy(), published["test_scores"][:, column], rtol=1e-6)
    np.testing.assert_allclose(detector(test_maps).numpy(), published["test_score_fused"], rtol=1e-6)
    validation_maps = torch.from_numpy(published["val_maps"])
    np.testing.assert_allclose(detector(validation_maps).numpy(), published["val_score_fused"], rtol=1e-6)


def test_background_changes_nothing_with_fitted_parameters(fitted, test_maps):
    assert not fitted["hist_invcov"][0].any() and not fitted["patch_hist_invcov"][:, ::CLASSES].any()
    exported = PatchHistogramDetector(CLASSES, background=True).double()
    exported.load_parameters(fitted, std_floor=0)
    torch.testing.assert_close(
        exported(test_maps), fitted_detector(fitted, CLASSES)(test_maps), rtol=1e-9, atol=1e-9
    )


def test_the_exported_detector_agrees_in_single_precision(fitted, test_maps):
    exported = PatchHistogramDetector(CLASSES)
    exported.load_parameters(fitted)
    exact = fitted_detector(fitted, CLASSES)(test_maps)
    torch.testing.assert_close(exported(test_maps).double(), exact, rtol=1e-3, atol=1e-3)


def test_background_counts_under_made_up_parameters(test_maps):
    scores = []
    for background in (False, True):
        detector = PatchHistogramDetector(CLASSES, background)
        detector.hist_invcov.copy_(torch.eye(CLASSES))
        scores.append(detector(test_maps))
    assert (scores[1] > scores[0]).all()


def test_a_batch_scores_like_its_images_one_by_one(fitted, test_maps):
    detector = fitted_detector(fitted, CLASSES)
    torch.testing.assert_close(detector(test_maps), torch.cat([detector(one[None]) for one in test_maps]))


def test_onnx_keeps_the_batch_apart(fitted, test_maps, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    detector = PatchHistogramDetector(CLASSES)
    detector.load_parameters(fitted)
    target = str(tmp_path / "detector.onnx")
    torch.onnx.export(
        detector.eval(),
        (test_maps[:2].long(),),
        target,
        input_names=["labels"],
        output_names=["score"],
        dynamic_axes={"labels": {0: "batch"}, "score": {0: "batch"}},
        dynamo=False,
    )
    session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    for few in (test_maps[:1], test_maps[:5]):
        (score,) = session.run(None, {"labels": few.long().numpy()})
        np.testing.assert_allclose(score, detector(few).numpy(), rtol=1e-4, atol=1e-4)


def test_quarters_follow_one_another_column_by_column():
    labels = torch.zeros(1, 4, 4, dtype=torch.uint8)
    labels[0, :2, :2], labels[0, 2:, :2], labels[0, :2, 2:], labels[0, 2:, 2:] = 1, 2, 3, 4
    _, quarters = label_histograms(labels, CLASSES)
    assert quarters.view(4, CLASSES).argmax(1).tolist() == [1, 2, 3, 4]
    assert quarters.sum() == 4


@given(label_maps)
def test_histograms_are_shares(labels):
    maps = torch.from_numpy(labels)
    whole, quarters = label_histograms(maps, CLASSES, background=True)
    torch.testing.assert_close(whole.sum(1), torch.ones(len(maps)))
    torch.testing.assert_close(quarters.view(-1, 4, CLASSES).sum(2), torch.ones(len(maps), 4))
    torch.testing.assert_close(quarters.view(-1, 4, CLASSES).mean(1), whole)
    for index, one in enumerate(labels):
        np.testing.assert_allclose(
            whole[index], np.bincount(one.ravel(), minlength=CLASSES) / one.size, rtol=1e-6
        )
    without, _ = label_histograms(maps, CLASSES)
    assert not without[:, 0].any()
    torch.testing.assert_close(without[:, 1:], whole[:, 1:])


@given(label_maps)
def test_turning_a_map_over_exchanges_its_quarters(labels):
    maps = torch.from_numpy(labels)
    quarters = label_histograms(maps, CLASSES)[1].view(-1, 4, CLASSES)
    upside_down = label_histograms(maps.flip(1), CLASSES)[1].view(-1, 4, CLASSES)
    torch.testing.assert_close(upside_down, quarters[:, [1, 0, 3, 2]])


@given(label_maps)
def test_areas_are_counted_alike_without_pytorch(labels):
    whole, quarters = label_histograms(torch.from_numpy(labels), CLASSES, background=True)
    for index, label_map in enumerate(labels):
        areas = area_fractions(label_map, CLASSES)
        np.testing.assert_allclose(areas[0], whole[index], atol=1e-6)
        np.testing.assert_allclose(areas[1:].ravel(), quarters[index], atol=1e-6)


def test_distance_is_euclidean_where_mahalanobis_is_no_number():
    histograms, mean = torch.tensor([[3.0, 4.0]]), torch.zeros(2, 1)
    assert mahalanobis(histograms, mean, -torch.eye(2)).item() == 5
    assert mahalanobis(histograms, mean, torch.full((2, 2), float("nan"))).item() == 5
    assert mahalanobis(histograms, mean, 4 * torch.eye(2)).item() == 10


def test_whitened_distances_are_the_same_distances(fitted, test_maps):
    plain, whitened = (fitted_detector(fitted, CLASSES) for _ in range(2))
    whitened.whiten()
    for expected, distances in zip(plain.distances(test_maps), whitened.distances(test_maps)):
        np.testing.assert_allclose(distances.detach().numpy(), expected.numpy(), rtol=1e-6)


def test_one_training_image_is_enough_to_go_on():
    parameters = fit_parameters(
        torch.ones(1, 8, 8, dtype=torch.uint8), torch.zeros(2, 8, 8, dtype=torch.uint8), 3
    )
    assert all(np.isfinite(values).all() for values in parameters.values())


@pytest.mark.parametrize("shape", [(CLASSES,), (CLASSES, 1)])
def test_means_load_in_either_shape(fitted, shape):
    detector = PatchHistogramDetector(CLASSES)
    detector.load_parameters(fitted | {"hist_mean": fitted["hist_mean"].reshape(shape)})
    np.testing.assert_allclose(detector.hist_mean.numpy().ravel(), fitted["hist_mean"], rtol=1e-6)


def test_parameters_for_another_number_of_classes_are_refused(fitted):
    with pytest.raises(ValueError, match="hist_mean has 5 values, expected 7 for 7 classes"):
        PatchHistogramDetector(7).load_parameters(fitted)
    with pytest.raises(ValueError, match="lack 'patch_hist_val_score'"):
        incomplete = {name: values for name, values in fitted.items() if name != "patch_hist_val_score"}
        PatchHistogramDetector(CLASSES).load_parameters(incomplete)


# What segmentation itself wavers by


def wavering_maps(count, seed, jitter):
    """Two components side by side in (N, 256, 256); the second one's edge lies anywhere within so many rows."""
    rng, maps = np.random.default_rng(seed), torch.zeros(count, 256, 256, dtype=torch.uint8)
    for label_map in maps:
        label_map[20 : int(100 + rng.integers(-2, 3)), 20:100] = 1
        label_map[140 : int(220 + rng.integers(-jitter, jitter + 1)), 140:220] = 2
    return maps


def test_a_deviation_that_segmentation_itself_wavers_by_is_no_score():
    train, validation = wavering_maps(60, 0, 2), wavering_maps(30, 1, 2)
    twice = (
        wavering_maps(60, 2, 0),
        wavering_maps(60, 3, 20),
    )  # of the same pictures the second component flickers
    flickers, missing = validation[:1].clone(), validation[:1].clone()
    flickers[:, 200:] = 0
    missing[:, :128] = 0
    plain, reliable = (
        fitted_detector(fit_parameters(train, validation, 3, 0.0005, pairs), 3, trimmed=False)
        for pairs in (None, twice)
    )

    def distance(detector, maps):
        return float(detector.distances(maps)[0])

    assert distance(reliable, flickers) < 3 < 0.4 * distance(plain, flickers)
    assert distance(reliable, missing) > 10  # the first component can be trusted as before


def test_distances_are_normalised_by_training_images_held_out_too():
    """Of few images, a covariance lies close to those that it was fitted to; where others lie, they cannot say."""
    train, validation = wavering_maps(12, 0, 12), wavering_maps(4, 1, 1)
    twice = wavering_maps(12, 2, 0), wavering_maps(12, 3, 1)
    parameters = fit_parameters(train, validation, 3, 0.0005, twice)
    held_out = parameters["hist_held_out_score"]
    assert held_out.shape == (12,)
    first = torch.arange(12) % 5 == 0
    others = fit_parameters(train[~first], train[first], 3, 0.0005, twice)
    np.testing.assert_allclose(held_out[first], others["hist_val_score"])
    detector = fitted_detector(parameters, 3, trimmed=False)
    good = np.concatenate([parameters["hist_val_score"], held_out])
    assert float(detector.hist_val_mean) == pytest.approx(good.mean())
    assert float(detector.hist_val_std) == pytest.approx(good.std())
    assert not any(
        "held_out" in name for name in fit_parameters(train, validation, 3, 0.0005)
    )  # as published


def test_findings_respect_it_too():
    train = wavering_maps(60, 0, 2)
    twice = wavering_maps(60, 2, 0), wavering_maps(60, 3, 20)
    stds = [
        area_statistics(fit_parameters(train, train, 3, 0.0005, pairs), 3)["std"] for pairs in (None, twice)
    ]
    assert stds[1][2] > 3 * stds[0][2] and stds[1][1] < 2 * stds[0][1]


def test_covariances_of_few_images_are_shrunk_by_what_is_likeliest_out_of_sample():
    rng, added = np.random.default_rng(0), 1e-3 * np.eye(8)
    correlated = rng.normal(size=(8, 8))

    def off_diagonal(samples):
        ratio = regularised_covariance(samples, added) - added
        plain = sample_covariance(samples)
        return ratio[0, 1] / plain[0, 1]

    independent = rng.normal(size=(20, 8))
    assert off_diagonal(independent) < 0.7  # what is correlated by chance
    assert off_diagonal(rng.normal(size=(45, 8)) @ correlated) > off_diagonal(independent)
    assert off_diagonal(rng.normal(size=(60, 8))) == 1  # enough images
    for count in (1, 3):
        assert np.isfinite(np.linalg.inv(regularised_covariance(rng.normal(size=(count, 8)), added))).all()
