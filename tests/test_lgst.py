"""LGST's networks, losses and draws."""

import numpy as np
import pytest
import torch

import settings
from errors import UserError
from models.lgst import LGST, Autoencoder, Differences, Student
from training.lgst import PenaltyImages, draw_batch, hard_mean, jitter_colour, losses

CHANNELS = (6, 8, 10)


class Encoder(torch.nn.Module):
    """Average pools the image: three maps of the right sizes, with gradients switched off elsewhere."""

    def forward(self, images):
        return tuple(torch.nn.functional.avg_pool2d(images, f).repeat(1, c // 2, 1, 1)[:, :c]
                     for c, f in zip(CHANNELS, (4, 8, 16)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LGST(CHANNELS, 16, 12).eval()


def test_maps_are_64_by_64():
    images = torch.randn(2, 3, 256, 256)
    local, global_ = Student(16, 12)(images)
    assert local.shape == global_.shape == Autoencoder(12)(images).shape == (2, 12, 64, 64)


def test_hard_mean_is_the_mean_at_or_over_the_quantile():
    values = torch.randn(3, 5, 16, 16, generator=torch.Generator().manual_seed(1))
    threshold = torch.quantile(values, 0.999)
    torch.testing.assert_close(hard_mean(values, 0.999), values[values >= threshold].mean())
    assert hard_mean(values, 0.0) == pytest.approx(values.mean().item(), abs=1e-6)


def test_losses_are_the_paper_equations(model):
    chosen = settings.load("none", "quick").lgst
    images = torch.randint(0, 255, (3, 3, 256, 256), dtype=torch.uint8)
    batch = draw_batch(images, PenaltyImages("rendered"), chosen, step=5, category="c", seed=0)
    encoder = Encoder()
    found = losses(model, encoder, batch, 0.999)

    from loco.images import normalise
    originals, twins, penalty = (normalise(part) for part in batch)
    difference = (model.teach(encoder(originals)) - model.local_st(originals)[0]).square()
    hard = difference[difference >= torch.quantile(difference, 0.999)]
    assert found["local"].item() == pytest.approx(hard.mean().item(), rel=1e-4)
    assert found["penalty"].item() == pytest.approx(model.local_st(penalty)[0].square().mean().item(), rel=1e-4)
    decoded = model.autoencoder(twins)
    assert found["autoencoder"].item() == pytest.approx((model.teach(encoder(twins)) - decoded).square().mean().item(), rel=1e-4)
    assert found["global"].item() == pytest.approx((decoded - model.local_st(twins)[1]).square().mean().item(), rel=1e-4)


def test_draws_depend_on_seed_and_step_only():
    chosen = settings.load("none", "quick").lgst
    images = torch.randint(0, 255, (5, 3, 256, 256), dtype=torch.uint8)
    penalties = PenaltyImages("rendered")
    first = draw_batch(images, penalties, chosen, 3, "c", 0)
    draw_batch(images, penalties, chosen, 9, "c", 0)
    again, other = draw_batch(images, penalties, chosen, 3, "c", 0), draw_batch(images, penalties, chosen, 3, "c", 1)
    for a, b in zip(first, again):
        assert torch.equal(a, b)
    assert not torch.equal(first.twins, other.twins)
    assert first.penalty.shape == (1, 3, 256, 256)


def test_every_image_is_drawn_once_per_epoch():
    chosen = settings.load("none", "quick", {"lgst.batch_size": 2, "lgst.penalty_every": 100}).lgst
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 256, 256)
    penalties = PenaltyImages("rendered")
    seen = [int(value) for step in range(3)
            for value in draw_batch(images, penalties, chosen, step, "c", 0).images[:, 0, 0, 0]]
    assert sorted(seen) == list(range(6))


def test_jitter_changes_at_most_a_fifth():
    image = torch.full((3, 8, 8), 100.0)
    for seed in range(20):
        twin = jitter_colour(image, np.random.default_rng(seed))
        assert 79 <= twin.min() and twin.max() <= 121


def test_map_normalisation_puts_the_quantiles_at_0_and_a_tenth(model):
    maps = torch.rand(7, 64, 64, generator=torch.Generator().manual_seed(2))
    model.fit_map_normalisation(Differences(maps, 3 * maps))
    assert model.q_st_start.item() == pytest.approx(torch.quantile(maps, 0.9).item(), rel=1e-5)
    assert model.q_ae_end.item() == pytest.approx(3 * torch.quantile(maps, 0.995).item(), rel=1e-5)
    at_end = Differences(model.q_st_end.expand(1, 64, 64), model.q_ae_start.expand(1, 64, 64))
    assert model.anomaly_map(at_end).max().item() == pytest.approx(0.1, rel=1e-5)


def test_constant_validation_maps_do_not_divide_by_zero(model):
    maps = torch.ones(2, 64, 64)
    model.fit_map_normalisation(Differences(maps, maps))
    model.fit_teacher_normalisation(torch.zeros(12), torch.zeros(12))
    assert torch.isfinite(model.anomaly_map(Differences(maps, 2 * maps))).all()
    assert (model.teacher_std == 1).all()


def test_penalty_folder_without_pictures_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="no pictures"):
        PenaltyImages(str(tmp_path))
