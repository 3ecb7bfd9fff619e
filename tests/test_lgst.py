"""LGST's networks, losses and draws."""

import copy

import numpy as np
import pytest
import torch
from conftest import draw_parts
from reference_steps import assert_gradients_agree, jittered, lgst_losses, lgst_teacher
from torchvision.transforms import functional as TF

import settings
from errors import UserError
from models.lgst import LGST, Autoencoder, Differences, Student
from training import lgst as steps
from training.lgst_step import Lessons, PenaltyImages, draw, hard_mean, jitter_colour

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


@pytest.fixture
def pictures():
    return torch.randint(0, 255, (5, 3, 256, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def twin_models(chosen):
    torch.manual_seed(0)
    first = LGST(CHANNELS, chosen.width, chosen.teacher_channels)
    first.start_fast()  # PyTorch's own start leaves the autoencoder's first layers gradients of 1e-7, mere rounding
    second = copy.deepcopy(first)
    return first.train(), second.train()


def relative_difference(found, expected):
    return ((found - expected).norm() / expected.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("kept, count, every", [(True, 20, 1), (False, 2, 1), (True, 3, 2), (False, 2, 2)])
def test_twenty_steps_are_the_reference_steps(pictures, kept, count, every, monkeypatch):
    """From the same weights, images and draws, at each of the first twenty steps: losses within 1e-4, gradients within 1e-3.

    Gradients by tensor, but for what is under 1e-5 of the whole. The reference takes over the weights before every step:
    left to themselves the two drift apart, as any two orders of summation do, because Adam divides by the
    size of the gradient, so that where there is next to none, rounding decides the step.
    """
    if not kept:
        monkeypatch.setattr(steps, "cache_room", lambda device: 0)
    chosen = settings.load("none", "paper", {"lgst.width": 8, "lgst.teacher_channels": 12, "lgst.global_every": every,
                                             "lgst.penalty_every": every}).lgst
    encoder, penalties = Encoder(), PenaltyImages("rendered")
    engine, plain = twin_models(chosen)
    lessons = Lessons(pictures, engine, encoder, torch.device("cpu"), "teach")
    lessons.fit_teacher_normalisation()
    for found, expected in zip((engine.teacher_mean, engine.teacher_std), lgst_teacher(plain, encoder, pictures)):
        assert relative_difference(found.flatten(), expected) < 1e-4
    optimizer = torch.optim.Adam([one for one in engine.parameters() if one.requires_grad], lr=chosen.lr, fused=True)
    for step in range(count):
        plain.load_state_dict(engine.state_dict())
        drawn = draw(len(pictures), penalties, chosen, step, "c", 0)
        batch = lessons.batch(drawn)
        assert (batch.taught is not None) == kept
        found = steps.losses(engine, encoder, batch, chosen.hard_quantile, "fp32")
        # Twins agree but for rounding; the networks get the same ones, lest a ReLU at 0 takes rounding for a decision.
        assert len(batch.twins) == (0 if step % every else chosen.batch_size)
        if len(batch.twins):
            torch.testing.assert_close(batch.twins, jittered(pictures, drawn), rtol=0, atol=1e-3)
        torch.manual_seed(drawn.dropout_seed)
        expected = lgst_losses(plain, encoder, pictures[drawn.indices], batch.twins, drawn.penalty, chosen.hard_quantile)
        for parts, model in ((found, engine), (expected, plain)):
            model.zero_grad()
            sum(parts.values()).backward()
        for name in expected:
            assert found[name].item() == pytest.approx(expected[name].item(), rel=1e-4), (step, name)
        assert_gradients_agree(engine, plain, step)
        optimizer.step()


def test_projecting_before_enlarging_changes_nothing(model):
    eighth, sixteenth = torch.randn(2, CHANNELS[1], 32, 32), torch.randn(2, CHANNELS[2], 16, 16)
    enlarged = [torch.nn.functional.interpolate(maps, size=(64, 64), mode="bilinear") for maps in (eighth, sixteenth)]
    plain = model.teacher.proj(torch.nn.functional.avg_pool2d(torch.cat(enlarged, 1), 3, stride=1, padding=1))
    torch.testing.assert_close(model.teacher(eighth, sixteenth), plain, rtol=1e-4, atol=1e-5)


def test_bf16_losses_and_gradients_stay_near_those_of_fp32(pictures):
    chosen = settings.load("none", "paper", {"lgst.width": 8, "lgst.teacher_channels": 12}).lgst
    encoder = Encoder()
    model, _ = twin_models(chosen)
    model.eval()  # dropout draws in the order in which memory lies, which channels last changes
    lessons = Lessons(pictures, model, encoder, torch.device("cpu"), "teach")
    lessons.fit_teacher_normalisation()
    batch = lessons.batch(draw(len(pictures), PenaltyImages("rendered"), chosen, 0, "c", 0))
    gradients, values = {}, {}
    for precision in ("fp32", "bf16"):
        model.zero_grad()
        parts = steps.losses(model, encoder, batch, 0.9, precision)
        assert all(part.dtype == torch.float32 for part in parts.values())
        sum(parts.values()).backward()
        values[precision] = sum(parts.values()).item()
        gradients[precision] = torch.cat([parameter.grad.flatten() for parameter in model.parameters()
                                          if parameter.grad is not None])
    assert values["bf16"] != values["fp32"]  # it really multiplied in bf16
    assert values["bf16"] == pytest.approx(values["fp32"], rel=2e-2)
    assert relative_difference(gradients["bf16"], gradients["fp32"]) < 5e-2


def test_bf16_learns_as_much_as_fp32_in_as_many_steps():
    chosen = settings.load("none", "quick", {"lgst.width": 8, "lgst.teacher_channels": 8, "lgst.lr": 0.001}).lgst
    rng = np.random.default_rng(0)
    pictures = torch.from_numpy(np.stack([draw_parts(rng, 4, 256)[0] for _ in range(5)])).permute(0, 3, 1, 2)
    encoder, penalties = Encoder(), PenaltyImages("rendered")
    curves = {}
    for precision, model in zip(("fp32", "bf16"), twin_models(chosen)):
        model.eval()  # without dropout, which channels last draws in another order
        lessons = Lessons(pictures, model, encoder, torch.device("cpu"), "teach")
        lessons.fit_teacher_normalisation()
        optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=chosen.lr, fused=True)
        curves[precision] = []
        for step in range(30):
            batch = lessons.batch(draw(len(pictures), penalties, chosen, step, "c", 0))
            loss = sum(steps.losses(model, encoder, batch, chosen.hard_quantile, precision).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curves[precision].append(loss.item())
    first, last = slice(None, 10), slice(-10, None)
    assert np.mean(curves["fp32"][last]) < np.mean(curves["fp32"][first])
    # Single steps differ more: which differences are the hardest is a matter of rounding.
    for part in (first, last):
        assert np.mean(curves["bf16"][part]) == pytest.approx(np.mean(curves["fp32"][part]), rel=0.1)


def test_draws_depend_on_seed_and_step_only(pictures):
    chosen = settings.load("none", "quick", {"lgst.penalty_every": 1, "lgst.global_every": 1}).lgst
    penalties = PenaltyImages("rendered")

    def drawn(step, seed):
        return draw(5, penalties, chosen, step, "c", seed)
    first = drawn(3, 0)
    drawn(9, 0)
    again, other = drawn(3, 0), drawn(3, 1)
    assert all(torch.equal(torch.as_tensor(one), torch.as_tensor(two)) for one, two in zip(first, again))
    assert not torch.equal(first.factors, other.factors)
    assert first.dropout_seed != other.dropout_seed
    assert first.penalty.shape == (1, 3, 256, 256)


def test_every_image_is_drawn_once_per_epoch():
    chosen = settings.load("none", "quick", {"lgst.batch_size": 2, "lgst.penalty_every": 100}).lgst
    seen = [int(index) for step in range(3) for index in draw(6, PenaltyImages("rendered"), chosen, step, "c", 0).indices]
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
        PenaltyImages(str(tmp_path))
