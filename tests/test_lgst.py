"""LGST's networks, losses and draws."""

import copy

from csad import settings
from csad.errors import UserError
from csad.standins.penalty_pictures import PenaltyPictures
from csad.training import feature_cache
from csad.training import lgst_step as steps
from csad.training.lgst_step import Batches, draw_indices, draw_sample, hard_mean, jitter_colour

import numpy as np
import pytest
import torch
from conftest import draw_parts
from torchvision.transforms import functional as TF

from models.lgst import LGST, Autoencoder, Differences, Student
from models.lgst import losses as plain_losses
from models.lgst_on_features import FeatureLGST, averaged, moments
from models.lgst_on_features import losses as feature_losses

CHANNELS = (6, 8, 10)


def assert_gradients_agree(fast, plain, step, relative=1e-3):
    """Tensor by tensor within ``relative``; what is under 1e-5 of the whole gradient is rounding."""
    whole = torch.cat([one.grad.flatten() for one in plain.parameters() if one.grad is not None]).norm()
    for (name, ours), theirs in zip(fast.named_parameters(), plain.parameters()):
        if theirs.grad is not None:
            difference = (ours.grad - theirs.grad).norm()
            assert difference <= relative * theirs.grad.norm() + 1e-5 * whole, (step, name, difference)


class Encoder(torch.nn.Module):
    """Average pools the image: three maps of the right sizes, with gradients switched off elsewhere."""

    def forward(self, images):
        images = (images.float() - 115) / 58
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


@pytest.fixture
def pictures():
    return torch.randint(0, 255, (5, 3, 256, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def two_models(chosen):
    torch.manual_seed(0)
    first = LGST(CHANNELS, chosen.width, chosen.teacher_channels)
    first.initialise_for_short_runs()  # PyTorch's own leaves gradients of 1e-7, mere rounding
    second = copy.deepcopy(first)
    return first.train(), second.train()


def relative_difference(found, expected):
    return ((found - expected).norm() / expected.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("kept, count, every", [(True, 3, 1), (True, 2, 2), (False, 1, 1)])
def test_fast_steps_are_the_plain_ones(pictures, kept, count, every, monkeypatch):
    """From the same weights, images and draws: losses within 1e-4, gradients within 1e-3, tensor by tensor.

    The plain model takes over the weights before every step: left to themselves the two drift apart, as any two orders of
    summation do, because Adam divides by the size of the gradient, so that where there is next to none, rounding decides.
    """
    if not kept:
        monkeypatch.setattr(feature_cache, "CACHE_BYTES", 0)
    chosen = settings.load("none", "paper", {"lgst.width": 8, "lgst.teacher_channels": 12, "lgst.global_every": every,
                                             "lgst.penalty_every": every}).lgst
    encoder, penalties = Encoder(), PenaltyPictures("bundled")
    fast, plain = two_models(chosen)
    batches = Batches(pictures, fast, encoder, torch.device("cpu"), "teacher")
    batches.fit_teacher_normalisation()
    features = plain.teacher(*encoder(pictures.float())[1:]).double()
    torch.testing.assert_close(fast.teacher_mean.flatten(), features.mean((0, 2, 3)).float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast.teacher_std.flatten(), features.std((0, 2, 3), correction=0).float(), rtol=1e-4, atol=1e-4)
    optimizer = torch.optim.Adam([one for one in fast.parameters() if one.requires_grad], lr=chosen.lr, fused=True)
    for step in range(count):
        plain.load_state_dict(fast.state_dict())
        batch = batches.batch(draw_sample(len(pictures), penalties, chosen, step, "c", 0))
        assert len(batch.augmented) == (0 if step % every else chosen.batch_size)
        random_state = torch.get_rng_state()  # of the autoencoder's dropout
        found = steps.fast_losses(fast, encoder, batch, chosen.hard_quantile, "fp32")
        torch.set_rng_state(random_state)
        expected = plain_losses(plain, encoder, batch.images, batch.augmented, batch.penalty, chosen.hard_quantile)
        for parts, model in ((found, fast), (expected, plain)):
            model.zero_grad()
            sum(parts.values()).backward()
        assert found.keys() == expected.keys()
        for name in expected:
            assert found[name].item() == pytest.approx(expected[name].item(), rel=1e-4), (step, name)
        assert_gradients_agree(fast, plain, step)
        optimizer.step()


def test_projecting_before_enlarging_changes_nothing(model):
    eighth, sixteenth = torch.randn(2, CHANNELS[1], 32, 32), torch.randn(2, CHANNELS[2], 16, 16)
    enlarged = [torch.nn.functional.interpolate(maps, size=(64, 64), mode="bilinear") for maps in (eighth, sixteenth)]
    plain = model.teacher.proj(torch.nn.functional.avg_pool2d(torch.cat(enlarged, 1), 3, stride=1, padding=1))
    torch.testing.assert_close(model.teacher(eighth, sixteenth), plain, rtol=1e-4, atol=1e-5)


def test_bf16_losses_and_gradients_stay_near_those_of_fp32(pictures):
    chosen = settings.load("none", "paper", {"lgst.width": 8, "lgst.teacher_channels": 12}).lgst
    encoder = Encoder()
    model, _ = two_models(chosen)
    model.eval()  # dropout draws in the order in which memory lies, which channels last changes
    batches = Batches(pictures, model, encoder, torch.device("cpu"), "teacher")
    batches.fit_teacher_normalisation()
    batch = batches.batch(draw_sample(len(pictures), PenaltyPictures("bundled"), chosen, 0, "c", 0))
    gradients, values = {}, {}
    for precision in ("fp32", "bf16"):
        model.zero_grad()
        parts = steps.fast_losses(model, encoder, batch, 0.9, precision)
        assert all(part.dtype == torch.float32 for part in parts.values())
        sum(parts.values()).backward()
        values[precision] = sum(parts.values()).item()
        gradients[precision] = torch.cat([parameter.grad.flatten() for parameter in model.parameters()
                                          if parameter.grad is not None])
    assert values["bf16"] != values["fp32"]  # it really multiplied in bf16
    assert values["bf16"] == pytest.approx(values["fp32"], rel=2e-2)
    assert relative_difference(gradients["bf16"], gradients["fp32"]) < 5e-2


def test_bf16_learns_as_much_as_fp32_in_as_many_steps():
    chosen = settings.load("none", "paper", {"lgst.width": 8, "lgst.teacher_channels": 8, "lgst.lr": 0.001, "lgst.cosine": True,
                                             "lgst.steps": 100, "lgst.batch_size": 1, "lgst.hard_quantile": 0.9}).lgst
    rng = np.random.default_rng(0)
    pictures = torch.from_numpy(np.stack([draw_parts(rng, 4, 256)[0] for _ in range(5)])).permute(0, 3, 1, 2)
    encoder, penalties = Encoder(), PenaltyPictures("bundled")
    curves = {}
    for precision, model in zip(("fp32", "bf16"), two_models(chosen)):
        model.eval()  # without dropout, which channels last draws in another order
        batches = Batches(pictures, model, encoder, torch.device("cpu"), "teacher")
        batches.fit_teacher_normalisation()
        optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=chosen.lr, fused=True)
        curves[precision] = []
        for step in range(12):
            batch = batches.batch(draw_sample(len(pictures), penalties, chosen, step, "c", 0))
            loss = sum(steps.fast_losses(model, encoder, batch, chosen.hard_quantile, precision).values())
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
    chosen = settings.load("none", "quick", {"lgst.penalty_every": 1, "lgst.global_every": 1}).lgst
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


def test_every_image_is_drawn_once_per_epoch():
    chosen = settings.load("none", "quick", {"lgst.batch_size": 2, "lgst.penalty_every": 100}).lgst
    seen = [int(index) for step in range(3) for index in draw_sample(6, PenaltyPictures("bundled"), chosen, step, "c", 0).indices]
    assert sorted(seen) == list(range(6))


@pytest.mark.parametrize("cosine, expected", [(False, [1, 1, 1, 0.1]), (True, [1, 0.5, 0.00886, 0.000247])])
def test_learning_rate_falls(cosine, expected):
    chosen = settings.load("none", "paper", {"lgst.steps": 100, "lgst.lr": 1, "lgst.cosine": cosine}).lgst
    assert [steps.learning_rate(chosen, step) for step in (0, 50, 94, 99)] == pytest.approx(expected, rel=0.01)


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
    seen = torch.cat([draw_indices(6, 4, step, "c", 0) for step in range(3)]).tolist()
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))


class Frozen(torch.nn.Module):
    """Maps of the sizes that a 512 view has."""

    @staticmethod
    def maps(count):
        generator = torch.Generator().manual_seed(4)
        return tuple(torch.randn(count, channels, side, side, generator=generator) * 3 + 1
                     for channels, side in zip(CHANNELS, (128, 64, 32)))


def test_the_whitened_teacher_gives_features_of_variance_one():
    maps = Frozen.maps(3)
    model = FeatureLGST(CHANNELS, 8, 64)
    model.teacher.fit(*moments([averaged(maps)]))
    features = model.teacher(maps)
    assert features.shape == (3, CHANNELS[1] + CHANNELS[2], 64, 64)  # no more than there are directions
    mean, covariance = moments([features])
    torch.testing.assert_close(mean.float(), torch.zeros(len(mean)), atol=1e-3, rtol=0)
    torch.testing.assert_close(covariance.float(), torch.eye(len(mean)), atol=0.02, rtol=0)


def test_the_student_on_features_learns_and_its_maps_are_64_by_64():
    maps = Frozen.maps(2)
    torch.manual_seed(0)
    model = FeatureLGST(CHANNELS, 8, 8)
    model.teacher.fit(*moments([averaged(maps)]))
    teacher = model.teacher(maps).detach()
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=0.003)
    totals = []
    for step in range(12):
        parts = feature_losses(model, teacher, maps[0], maps[2] if step % 2 == 0 else None)
        assert parts.keys() == ({"local", "autoencoder", "global"} if step % 2 == 0 else {"local"})
        totals.append(parts["local"].item())
        optimizer.zero_grad()
        sum(parts.values()).backward()
        optimizer.step()
    assert totals[-1] < totals[0]
    found = model.differences(maps)
    assert found.local.shape == found.global_.shape == (2, 64, 64)
