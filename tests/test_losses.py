"""The segmentor's losses against the published ones (docs/METHOD.md section 2)."""

import pytest
import torch

from models import segmentor as losses


@pytest.fixture
def case(reference):
    data = reference("segmentation_losses")
    return {name: torch.from_numpy(data[name]) for name in ("logits", "target", "random_target")}, data


def test_losses_match_the_published_values(case):
    inputs, expected = case
    logits, target, random_target = inputs["logits"], inputs["target"][:, 0], inputs["random_target"][:, 0]
    probabilities = logits.softmax(1)
    found = {
        "ce": losses.cross_entropy(logits, target, softmax_twice=True),
        "focal": losses.focal_loss(probabilities, target),
        "dice": losses.balanced_dice_loss(probabilities, target),
        "hist": losses.histogram_loss(probabilities, random_target),
        "entropy": losses.entropy_loss(probabilities),
    }
    for name, value in found.items():
        assert value.item() == pytest.approx(float(expected[name]), abs=1e-5), name


def test_plain_cross_entropy_takes_the_logits_as_they_are(case):
    inputs, _ = case
    logits, target = inputs["logits"], inputs["target"][:, 0]
    by_hand = -logits.log_softmax(1).gather(1, target[:, None]).mean()
    assert losses.cross_entropy(logits, target, softmax_twice=False).item() == pytest.approx(by_hand.item(), rel=1e-6)


def test_dice_pays_no_attention_to_classes_that_the_batch_lacks():
    target = torch.tensor([[[0, 0], [1, 1]]])
    certain = torch.nn.functional.one_hot(target, 4).movedim(-1, 1).float()
    assert losses.balanced_dice_loss(certain, target).item() == pytest.approx(0, abs=1e-5)
    # An absent class with weight would hide how wrong the present ones are.
    assert losses.balanced_dice_loss(certain.flip(2), target).item() == pytest.approx(1 / 4, abs=1e-3)


def test_dice_weighs_rare_classes_more():
    target = torch.zeros(1, 8, 8, dtype=torch.int64)
    target[0, 0, :2] = 1
    right = torch.nn.functional.one_hot(target, 2).movedim(-1, 1).float()
    rare_missed = right.clone()
    rare_missed[:, :, 0, :2] = torch.tensor([1.0, 0.0]).view(1, 2, 1)
    common_missed = right.clone()
    common_missed[:, :, 1, :2] = torch.tensor([0.0, 1.0]).view(1, 2, 1)
    assert losses.balanced_dice_loss(rare_missed, target) > losses.balanced_dice_loss(common_missed, target)


def test_histogram_loss_compares_amounts_and_not_places():
    target = torch.tensor([[[0, 1], [2, 0]]])
    elsewhere = torch.nn.functional.one_hot(target.flip(2), 3).movedim(-1, 1).float()
    assert losses.histogram_loss(elsewhere, target).item() == 0
    only_background = torch.zeros(1, 3, 2, 2)
    only_background[:, 0] = 1
    assert losses.histogram_loss(only_background, target).item() == pytest.approx(0.5)


def test_entropy_is_least_where_the_segmentor_is_sure():
    unsure, sure = torch.full((1, 4, 2, 2), 0.25), torch.zeros(1, 4, 2, 2)
    sure[:, 1] = 1
    assert losses.entropy_loss(sure).item() == pytest.approx(0, abs=1e-4)
    assert losses.entropy_loss(unsure) > losses.entropy_loss(sure)


def test_every_loss_has_finite_gradients_for_extreme_logits():
    logits = (torch.tensor([80.0, -80.0, 0.0]).view(1, 3, 1, 1) * torch.ones(2, 3, 4, 4)).requires_grad_()
    target = torch.ones(2, 4, 4, dtype=torch.int64)
    probabilities = logits.softmax(1)
    total = (losses.cross_entropy(logits, target, False) + losses.focal_loss(probabilities, target)
             + losses.balanced_dice_loss(probabilities, target) + losses.histogram_loss(probabilities, target)
             + losses.entropy_loss(probabilities))
    total.backward()
    assert torch.isfinite(logits.grad).all()
