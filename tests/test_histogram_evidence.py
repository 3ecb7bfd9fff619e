"""Where the arrangement is wrong: evidence on made-up label maps, against a plain computation."""

from csad.inference.overlays import explaining_map

import numpy as np
import pytest
import torch

from models.histogram_evidence import GRIDS, HistogramEvidence, fit_evidence

CLASSES = 3


def label_maps(count, seed=0):
    """A square of 1 in the top left and one of 2 in the bottom right quarter, with sides that vary a little."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((count, 256, 256), np.uint8)
    for one in labels:
        side, other = rng.integers(56, 72, 2)
        one[32 : 32 + side, 32 : 32 + side] = 1
        one[160 : 160 + other, 160 : 160 + other] = 2
    return torch.from_numpy(labels)


@pytest.fixture(scope="module")
def parameters():
    return fit_evidence(label_maps(30), label_maps(8, seed=1), CLASSES)


@pytest.fixture(scope="module")
def evidence(parameters):
    model = HistogramEvidence(CLASSES)
    model.load_parameters(parameters)
    return model


def test_scores_are_normalised_by_training_images_held_out_too():
    train, validation = label_maps(12), label_maps(4, seed=1)
    parameters = fit_evidence(train, validation, CLASSES, (train, train))
    first = torch.arange(12) % 5 == 0
    others = HistogramEvidence(CLASSES)
    others.load_parameters(fit_evidence(train[~first], validation, CLASSES, (train, train)))
    means = others(train[first]).mean((1, 2))
    np.testing.assert_allclose(parameters["held_out_score"][first], means.numpy(), rtol=1e-5)
    model = HistogramEvidence(CLASSES)
    model.load_parameters(parameters)
    good = torch.cat([model(validation).mean((1, 2)), torch.from_numpy(parameters["held_out_score"])])
    assert float(model.val_mean) == pytest.approx(float(good.mean()), rel=1e-5)
    torch.testing.assert_close(model.score(model(validation)), model.normalised(good[:4]))


def test_good_images_have_next_to_none_and_a_batch_is_its_images(evidence):
    found = evidence(label_maps(4, seed=2))
    assert found.shape == (4, 64, 64) and (found >= 0).all()
    torch.testing.assert_close(found, torch.cat([evidence(one[None]) for one in label_maps(4, seed=2)]))
    missing = label_maps(1, seed=2)
    missing[missing == 1] = 0
    assert found.amax((1, 2)).max() < 0.2 * evidence(missing).max()


def test_what_is_missing_is_drawn_where_it_usually_is(evidence):
    labels = label_maps(1, seed=3)
    labels[labels == 2] = 0
    found = evidence(labels)[0]
    row, column = divmod(int(found.argmax()), 64)
    assert 40 <= row < 58 and 40 <= column < 58
    assert found[:32, :32].max() < 0.05 * found.max()  # the other part is as always


def test_too_much_is_drawn_on_its_own_pixels(evidence):
    labels = label_maps(1, seed=3)
    labels[0, 20:60, 190:230] = 1  # one too many, top right
    found = evidence(labels)[0]
    row, column = divmod(int(found.argmax()), 64)
    assert 5 <= row < 15 and 47 <= column < 58
    outside = found.clone()
    outside[4:16, 46:59] = 0
    assert outside.max() < 0.5 * found.max()


def test_the_score_is_the_normalised_mean_of_the_map(evidence):
    good = evidence.score(evidence(label_maps(8, seed=1)))
    assert abs(good.mean()) < 1e-4 and good.std(correction=0) == pytest.approx(
        1, abs=1e-4
    )  # those it was normalised on
    labels = label_maps(1, seed=3)
    labels[labels == 2] = 0
    found = evidence(labels)
    torch.testing.assert_close(
        evidence.score(found), (found.mean((1, 2)) - evidence.val_mean) / evidence.val_std
    )
    assert evidence.score(found) > 10


def test_deviations_are_what_all_other_shares_leave_open(parameters):
    """By definition: a regression of each share on all others, on the finest grid that a test can afford."""
    grid = 2
    labels = label_maps(30).numpy()
    shares = np.stack(
        [
            [
                (one[row : row + 128, column : column + 128] == part).mean()
                for part in (1, 2)
                for row in (0, 128)
                for column in (0, 128)
            ]
            for one in labels
        ]
    )
    np.testing.assert_allclose(parameters[f"mean_{grid}"], shares.mean(0), atol=1e-6)
    covariance = np.cov(shares, rowvar=False) + (0.001 * grid) ** 2 * np.eye(shares.shape[1])
    given = np.stack(
        [
            [
                (one[row : row + 128, column : column + 128] == part).mean()
                for part in (1, 2)
                for row in (0, 128)
                for column in (0, 128)
            ]
            for one in label_maps(8, seed=1).numpy()
        ]
    ) - shares.mean(0)
    plain = np.empty_like(given)
    for one in range(given.shape[1]):
        others = np.arange(given.shape[1]) != one
        weights = np.linalg.solve(covariance[np.ix_(others, others)], covariance[others, one])
        left = covariance[one, one] - covariance[one, others] @ weights
        plain[:, one] = (given[:, one] - given[:, others] @ weights) / np.sqrt(left)
    plain /= np.abs(plain).max(1).mean()
    np.testing.assert_allclose(
        given @ parameters[f"deviation_{grid}"].astype(np.float64), plain, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("count", [1, 2])
def test_few_images_and_a_part_that_never_is_there_are_enough_to_go_on(count):
    found = fit_evidence(label_maps(count), label_maps(0), CLASSES + 1)
    assert all(np.isfinite(values).all() for values in found.values())
    model = HistogramEvidence(CLASSES + 1)
    model.load_parameters(found)
    assert model.score(model(label_maps(1))).isfinite().all()


def test_parameters_for_other_classes_are_refused(parameters):
    with pytest.raises(ValueError, match="another number of classes"):
        HistogramEvidence(CLASSES + 1).load_parameters(parameters)
    with pytest.raises(ValueError, match=f"deviation_{GRIDS[-1]} is missing"):
        HistogramEvidence(CLASSES).load_parameters(
            {name: values for name, values in parameters.items() if name != f"deviation_{GRIDS[-1]}"}
        )


def test_of_several_deviations_the_farthest_is_drawn(evidence):
    labels = label_maps(1, seed=3)
    labels[labels == 2] = 0  # missing, and elsewhere a little too much of the other part
    labels[0, 40:70, 108:124] = 1
    found = evidence(labels)[0].numpy()
    drawn = explaining_map({"patchhist": found}, {"patchhist": 9.0})
    row, column = divmod(int(found.argmax()), 64)
    farthest, other = (slice(32, 64), slice(32, 64)), (slice(0, 32), slice(0, 32))
    assert row >= 32 and column >= 32 and found[other].max() > 0
    assert drawn[row, column] == found.max() and drawn[farthest].sum() > 0.3 * found[farthest].sum()
    assert (drawn[other] == 0).all()
