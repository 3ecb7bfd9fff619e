"""The segmentor: names, shapes and sizes of the network, and its losses against the published ones (docs/method.md section 2)."""

import json

import pytest
import torch
from conftest import REFERENCE

from models import segmentor as segmentors
from models.segmentor import Segmentor

PUBLISHED_CHANNELS, PUBLISHED_WIDTH, PREFIX = (256, 512, 1024), 256, "segmentor."


def encoder_maps(channels, batch=2, side=64):
    return tuple(
        torch.rand(batch, count, side // fraction, side // fraction)
        for count, fraction in zip(channels, (4, 8, 16))
    )


def test_state_dict_has_the_published_names_shapes_types_and_order():
    specification = json.loads((REFERENCE / "fused_model_state_dict.json").read_text())
    published = {
        key.removeprefix(PREFIX): (shape, dtype)
        for key, (shape, dtype) in specification.items()
        if key.startswith(PREFIX)
    }
    classes = published["fc2.conv3.bias"][0][0]
    state = Segmentor(PUBLISHED_CHANNELS, PUBLISHED_WIDTH, classes).state_dict()
    found = {
        key: (list(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for key, tensor in state.items()
    }
    assert found == published
    assert list(found) == list(published)


def test_logits_have_the_size_asked_for():
    segmentor = Segmentor((8, 12, 16), 16, 5)
    assert segmentor(encoder_maps((8, 12, 16), side=256)).shape == (2, 5, 256, 256)
    assert Segmentor((8, 12, 16), 16, 5, output_size=64)(encoder_maps((8, 12, 16))).shape == (2, 5, 64, 64)


def test_images_do_not_influence_each_other_once_trained():
    torch.manual_seed(0)
    segmentor = Segmentor((8, 12, 16), 16, 3, output_size=64)
    maps = encoder_maps((8, 12, 16))
    segmentor(maps)  # moves the running statistics
    segmentor.eval()
    together = segmentor(maps)
    alone = segmentor(tuple(one[:1] for one in maps))
    torch.testing.assert_close(together[:1], alone)


def test_every_parameter_learns():
    torch.manual_seed(0)
    segmentor = Segmentor((8, 12, 16), 16, 3, output_size=64)
    segmentor(encoder_maps((8, 12, 16))).square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in segmentor.parameters())


# Losses


@pytest.fixture
def case(reference):
    data = reference("segmentation_losses")
    return {name: torch.from_numpy(data[name]) for name in ("logits", "target", "random_target")}, data


def test_losses_match_the_published_values(case):
    inputs, expected = case
    logits, target, random_target = inputs["logits"], inputs["target"][:, 0], inputs["random_target"][:, 0]
    probabilities = logits.softmax(1)
    found = {
        "ce": segmentors.cross_entropy(logits, target, softmax_twice=True),
        "focal": segmentors.focal_loss(probabilities, target),
        "dice": segmentors.balanced_dice_loss(probabilities, target),
        "hist": segmentors.histogram_loss(probabilities, random_target),
        "entropy": segmentors.entropy_loss(probabilities),
    }
    for name, value in found.items():
        assert value.item() == pytest.approx(float(expected[name]), abs=1e-5), name


def test_plain_cross_entropy_takes_the_logits_as_they_are(case):
    inputs, _ = case
    logits, target = inputs["logits"], inputs["target"][:, 0]
    by_hand = -logits.log_softmax(1).gather(1, target[:, None]).mean()
    assert segmentors.cross_entropy(logits, target, softmax_twice=False).item() == pytest.approx(
        by_hand.item(), rel=1e-6
    )


def test_dice_pays_no_attention_to_classes_that_the_batch_lacks():
    target = torch.tensor([[[0, 0], [1, 1]]])
    certain = torch.nn.functional.one_hot(target, 4).movedim(-1, 1).float()
    assert segmentors.balanced_dice_loss(certain, target).item() == pytest.approx(0, abs=1e-5)
    # An absent class with weight would hide how wrong the present ones are.
    assert segmentors.balanced_dice_loss(certain.flip(2), target).item() == pytest.approx(1 / 4, abs=1e-3)


def test_dice_weighs_rare_classes_more():
    target = torch.zeros(1, 8, 8, dtype=torch.int64)
    target[0, 0, :2] = 1
    right = torch.nn.functional.one_hot(target, 2).movedim(-1, 1).float()
    rare_missed = right.clone()
    rare_missed[:, :, 0, :2] = torch.tensor([1.0, 0.0]).view(1, 2, 1)
    common_missed = right.clone()
    common_missed[:, :, 1, :2] = torch.tensor([0.0, 1.0]).view(1, 2, 1)
    assert segmentors.balanced_dice_loss(rare_missed, target) > segmentors.balanced_dice_loss(
        common_missed, target
    )


def test_histogram_loss_compares_amounts_and_not_places():
    target = torch.tensor([[[0, 1], [2, 0]]])
    elsewhere = torch.nn.functional.one_hot(target.flip(2), 3).movedim(-1, 1).float()
    assert segmentors.histogram_loss(elsewhere, target).item() == 0
    only_background = torch.zeros(1, 3, 2, 2)
    only_background[:, 0] = 1
    assert segmentors.histogram_loss(only_background, target).item() == pytest.approx(0.5)


def test_entropy_is_least_where_the_segmentor_is_sure():
    unsure, sure = torch.full((1, 4, 2, 2), 0.25), torch.zeros(1, 4, 2, 2)
    sure[:, 1] = 1
    assert segmentors.entropy_loss(sure).item() == pytest.approx(0, abs=1e-4)
    assert segmentors.entropy_loss(unsure) > segmentors.entropy_loss(sure)


def test_every_loss_has_finite_gradients_for_extreme_logits():
    logits = (torch.tensor([80.0, -80.0, 0.0]).view(1, 3, 1, 1) * torch.ones(2, 3, 4, 4)).requires_grad_()
    target = torch.ones(2, 4, 4, dtype=torch.int64)
    probabilities = logits.softmax(1)
    total = (
        segmentors.cross_entropy(logits, target, False)
        + segmentors.focal_loss(probabilities, target)
        + segmentors.balanced_dice_loss(probabilities, target)
        + segmentors.histogram_loss(probabilities, target)
        + segmentors.entropy_loss(probabilities)
    )
    total.backward()
    assert torch.isfinite(logits.grad).all()
