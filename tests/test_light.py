"""Light is a factor of a photograph; what sees logarithms less their mean does not see it."""

import torch

from loco.images import normalise
from models.embedded_backbone import load_embedded_backbone
from models.light import LogColours


def test_another_light_changes_next_to_nothing():
    generator = torch.Generator().manual_seed(0)
    picture = 60 + 100 * torch.rand(1, 3, 64, 64, generator=generator)
    warm = picture * torch.tensor([1.3, 1.0, 0.8]).view(1, 3, 1, 1)
    seen, warmly = (LogColours()(normalise(image)) for image in (picture, warm))
    assert (seen - warmly).abs().mean() < 0.05 * seen.abs().mean()
    assert seen.mean((2, 3)).abs().max() < 1e-5

    backbone = load_embedded_backbone()
    for before, after in zip(backbone(normalise(picture)), backbone(normalise(warm))):
        assert (before - after).abs().mean() < 0.1 * before.abs().mean()


def test_black_stays_finite():
    assert LogColours()(torch.full((1, 3, 8, 8), -10.0)).isfinite().all()
