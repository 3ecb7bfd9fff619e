"""LGST's networks, losses and draws."""

from csad import settings
from csad.errors import UserError
from csad.standins.penalty_pictures import PenaltyPictures
from csad.training import feature_cache
from csad.training.draws import shuffled_epochs
from csad.training.lgst_step import Batches, draw_sample, jitter_colour
from csad.training.schedules import cosine, step_decay, warm_cosine

import numpy as np
import pytest
import torch
from conftest import draw_parts, initialise_by_he
from torchvision.transforms import functional as TF

from models.device import autocast
from models.lgst import LGST, Autoencoder, Differences, Student, TrainingFeatures, ViewFeatures, losses
from models.lgst_on_features import FeatureLGST, averaged
from models.statistics import channel_covariance, quantile

CHANNELS = (6, 8, 10)


class Encoder(torch.nn.Module):
    """Average pools the image: three maps of the right sizes, with gradients switched off elsewhere."""

    def forward(self, images):
        images = (images.float() - 115) / 58
        return tuple(
            torch.nn.functional.avg_pool2d(images, f).repeat(1, c // 2, 1, 1)[:, :c]
            for c, f in zip(CHANNELS, (4, 8, 16))
        )


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LGST(CHANNELS, 16, 12).eval()


def test_maps_are_64_by_64():
    images = torch.randn(2, 3, 256, 256)
    local, global_ = Student(16, 12)(images)
    assert local.shape == global_.shape == Autoencoder(12)(images).shape == (2, 12, 64, 64)


def test_losses_are_the_papers():
    draw = np.random.default_rng(0)
    teacher, local, penalty, augmented_teacher, decoded, global_ = (
        draw.standard_normal((2, 5, 64, 64)).astype(np.float32) for _ in range(6)
    )
    of_views = ViewFeatures(*map(torch.from_numpy, (augmented_teacher, decoded, global_)))
    features = TrainingFeatures(*map(torch.from_numpy, (teacher, local, penalty)), of_views)
    found = losses(features, 0.999)
    difference = (teacher - local) ** 2
    assert {name: value.item() for name, value in found.items()} == pytest.approx(
        {
            "local": difference[difference >= np.quantile(difference, 0.999)].mean(),
            "penalty": (penalty**2).mean(),
            "autoencoder": ((augmented_teacher - decoded) ** 2).mean(),
            "global": ((decoded - global_) ** 2).mean(),
        },
        rel=1e-5,
    )
    local_step = losses(TrainingFeatures(features.teacher, features.local))
    assert local_step.keys() == {"local"}
    assert local_step["local"].item() == pytest.approx(difference.mean(), rel=1e-5)


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.999, 1.0])
def test_quantile_is_numpys(fraction):
    values = np.random.default_rng(1).standard_normal((3, 7, 11)).astype(np.float32)
    assert quantile(torch.from_numpy(values), fraction).item() == pytest.approx(
        np.quantile(values, fraction), abs=1e-6
    )


@pytest.fixture
def pictures():
    return torch.randint(
        0, 255, (5, 3, 256, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)
    )


def new_model(chosen):
    torch.manual_seed(0)
    model = LGST(CHANNELS, chosen.width, chosen.teacher_channels)
    initialise_by_he(model.local_st, model.autoencoder)
    return model.train()


def step_losses(model, batch, chosen, precision="fp32"):
    with autocast(torch.device("cpu"), precision):
        features = model.training_features(*batch)
    return losses(features, chosen.hard_quantile)


def relative_difference(found, expected):
    return ((found - expected).norm() / expected.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("kept", [True, False])
def test_kept_teacher_features_are_those_of_a_fresh_pass(pictures, kept, monkeypatch):
    """And the three networks see what they should: original, augmented and penalty images."""
    if not kept:
        monkeypatch.setattr(feature_cache, "CACHE_BYTES", 0)
    chosen = settings.load(
        "none", "paper", {"lgst.width": 8, "lgst.teacher_channels": 12, "lgst.global_every": 2}
    ).lgst
    encoder, penalties, model = Encoder(), PenaltyPictures("bundled"), new_model(chosen).eval()
    batches = Batches(pictures, model, encoder, torch.device("cpu"), "fp32", "teacher")
    batches.fit_teacher_normalisation()
    features = model.teacher(*encoder(pictures.float())[1:]).double()
    torch.testing.assert_close(
        model.teacher_mean.flatten(), features.mean((0, 2, 3)).float(), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        model.teacher_std.flatten(), features.std((0, 2, 3), correction=0).float(), rtol=1e-4, atol=1e-4
    )
    sample = draw_sample(len(pictures), penalties, chosen, 0, "c", 0)
    batch = batches.batch(sample)
    assert torch.equal(batch.images, pictures[sample.indices].float())
    torch.testing.assert_close(
        batch.teacher, model.teacher_features(encoder(batch.images)), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        batch.augmented_teacher, model.teacher_features(encoder(batch.augmented)), rtol=1e-4, atol=1e-4
    )
    compared = model.training_features(*batch)
    torch.testing.assert_close(compared.local, model.local_st(model.normalise(batch.images))[0])
    torch.testing.assert_close(compared.penalty, model.local_st(model.normalise(batch.penalty))[0])
    torch.testing.assert_close(compared.views.global_, model.local_st(model.normalise(batch.augmented))[1])
    torch.testing.assert_close(compared.views.decoded, model.autoencoder(model.normalise(batch.augmented)))
    local_step = batches.batch(draw_sample(len(pictures), penalties, chosen, 1, "c", 0))
    assert local_step.augmented is None and step_losses(model, local_step, chosen).keys() == {
        "local",
        "penalty",
    }


def test_projecting_before_enlarging_changes_nothing(model):
    eighth, sixteenth = torch.randn(2, CHANNELS[1], 32, 32), torch.randn(2, CHANNELS[2], 16, 16)
    enlarged = [
        torch.nn.functional.interpolate(maps, size=(64, 64), mode="bilinear") for maps in (eighth, sixteenth)
    ]
    plain = model.teacher.proj(torch.nn.functional.avg_pool2d(torch.cat(enlarged, 1), 3, stride=1, padding=1))
    torch.testing.assert_close(model.teacher(eighth, sixteenth), plain, rtol=1e-4, atol=1e-5)


def test_bf16_losses_and_gradients_stay_near_those_of_fp32(pictures):
    chosen = settings.load("none", "paper", {"lgst.width": 8, "lgst.teacher_channels": 12}).lgst
    encoder = Encoder()
    chosen = chosen.model_copy(update={"hard_quantile": 0.9})
    model = new_model(
        chosen
    ).eval()  # dropout draws in the order in which memory lies, which channels last changes
    gradients, values = {}, {}
    for precision in ("fp32", "bf16"):
        batches = Batches(pictures, model, encoder, torch.device("cpu"), precision, "teacher")
        batches.fit_teacher_normalisation()
        batch = batches.batch(draw_sample(len(pictures), PenaltyPictures("bundled"), chosen, 0, "c", 0))
        model.zero_grad()
        parts = step_losses(model, batch, chosen, precision)
        assert all(part.dtype == torch.float32 for part in parts.values())
        sum(parts.values()).backward()
        values[precision] = sum(parts.values()).item()
        gradients[precision] = torch.cat(
            [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        )
    assert values["bf16"] != values["fp32"]  # it really multiplied in bf16
    assert values["bf16"] == pytest.approx(values["fp32"], rel=2e-2)
    assert relative_difference(gradients["bf16"], gradients["fp32"]) < 5e-2


def test_bf16_learns_as_much_as_fp32_in_as_many_steps():
    chosen = settings.load(
        "none",
        "paper",
        {
            "lgst.width": 8,
            "lgst.teacher_channels": 8,
            "lgst.lr": 0.001,
            "lgst.steps": 100,
            "lgst.batch_size": 1,
            "lgst.hard_quantile": 0.9,
        },
    ).lgst
    rng = np.random.default_rng(0)
    pictures = torch.from_numpy(np.stack([draw_parts(rng, 4, 256)[0] for _ in range(5)])).permute(0, 3, 1, 2)
    encoder, penalties = Encoder(), PenaltyPictures("bundled")
    curves = {}
    for precision in ("fp32", "bf16"):
        model = new_model(chosen).eval()  # without dropout, which channels last draws in another order
        batches = Batches(pictures, model, encoder, torch.device("cpu"), precision, "teacher")
        batches.fit_teacher_normalisation()
        optimizer = torch.optim.Adam(
            [one for one in model.parameters() if one.requires_grad], lr=chosen.lr, fused=True
        )
        curves[precision] = []
        for step in range(12):
            batch = batches.batch(draw_sample(len(pictures), penalties, chosen, step, "c", 0))
            loss = sum(step_losses(model, batch, chosen, precision).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curves[precision].append(loss.item())
    first, last = slice(None, 4), slice(-4, None)
    assert np.mean(curves["fp32"][last]) < np.mean(curves["fp32"][first])
    # Single steps differ more: which differences are the hardest is a matter of rounding.
    for part in (first, last):
        assert np.mean(curves["bf16"][part]) == pytest.approx(np.mean(curves["fp32"][part]), rel=0.1)


def test_draws_depend_on_seed_and_step_only(pictures):
    chosen = settings.load("none", "quick", {"lgst.global_every": 1}).lgst
    penalties = PenaltyPictures("bundled")

    def drawn(step, seed):
        return draw_sample(5, penalties, chosen, step, "c", seed)

    first = drawn(3, 0)
    drawn(9, 0)
    again, other = drawn(3, 0), drawn(3, 1)
    assert all(torch.equal(torch.as_tensor(one), torch.as_tensor(two)) for one, two in zip(first, again))
    assert not torch.equal(first.factors, other.factors)
    assert first.dropout_seed != other.dropout_seed
    assert first.penalty.shape == (1, 3, 256, 256)


@pytest.mark.parametrize(
    "schedule, expected",
    [
        (step_decay, [1, 1, 1, 0.1]),
        (cosine, [1, 0.5, 0.00886, 0.000247]),
        (warm_cosine, [0.02, 0.5, 0.00886, 0.000247]),
    ],
)
def test_learning_rate_falls(schedule, expected):
    assert [schedule(step, 100) for step in (0, 50, 94, 99)] == pytest.approx(expected, rel=0.01)
    assert step_decay(0, 1) == 1


def test_jitter_is_torchvisions(pictures):
    images = pictures[:3].float()
    factors = torch.tensor([1.2, 0.85, 0.8])
    found = jitter_colour(images, torch.tensor([0, 1, 2]), factors)
    adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)
    for index in range(3):
        expected = 255 * adjust[index](images[index] / 255, factors[index].item())
        torch.testing.assert_close(found[index], expected, rtol=0, atol=1e-3)


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
        PenaltyPictures(str(tmp_path))


def test_penalty_pictures_are_photographs_cut_and_sometimes_grey():
    pictures = [PenaltyPictures("bundled").draw(np.random.default_rng(seed)) for seed in range(12)]
    assert all(one.shape == (1, 3, 256, 256) and 0 <= one.min() and one.max() <= 255 for one in pictures)
    grey = [(one[0, 0] == one[0, 1]).all() for one in pictures]
    assert any(grey) and not all(grey)
    assert len({one.tobytes() for one in pictures}) == len(pictures)


def test_indices_are_shuffled_epochs():
    seen = torch.cat([shuffled_epochs(6, 4, step, "c", 0) for step in range(3)]).tolist()
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))


class Frozen(torch.nn.Module):
    """Maps of the sizes that a 512 view has."""

    @staticmethod
    def maps(count):
        generator = torch.Generator().manual_seed(4)
        return tuple(
            torch.randn(count, channels, side, side, generator=generator) * 3 + 1
            for channels, side in zip(CHANNELS, (128, 64, 32))
        )


def test_the_whitened_teacher_gives_features_of_variance_one():
    maps = Frozen.maps(3)
    model = FeatureLGST(CHANNELS, 8, 64)
    model.teacher.fit(*channel_covariance([averaged(maps)]))
    features = model.teacher(maps)
    assert features.shape == (3, CHANNELS[1] + CHANNELS[2], 64, 64)  # no more than there are directions
    mean, covariance = channel_covariance([features])
    torch.testing.assert_close(mean.float(), torch.zeros(len(mean)), atol=1e-3, rtol=0)
    torch.testing.assert_close(covariance.float(), torch.eye(len(mean)), atol=0.02, rtol=0)


def test_the_student_on_features_learns_and_its_maps_are_64_by_64():
    maps = Frozen.maps(2)
    torch.manual_seed(0)
    model = FeatureLGST(CHANNELS, 8, 8)
    model.teacher.fit(*channel_covariance([averaged(maps)]))
    teacher = model.teacher(maps).detach()
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=0.003)
    totals = []
    for step in range(12):
        parts = losses(model.training_features(maps[0], teacher, maps[2] if step % 2 == 0 else None))
        assert parts.keys() == ({"local", "autoencoder", "global"} if step % 2 == 0 else {"local"})
        totals.append(parts["local"].item())
        optimizer.zero_grad()
        sum(parts.values()).backward()
        optimizer.step()
    assert totals[-1] < totals[0]
    found = model.differences(maps)
    assert found.local.shape == found.global_.shape == (2, 64, 64)
