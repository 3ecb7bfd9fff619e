"""The segmentor network: names, shapes, sizes (docs/METHOD.md section 2)."""

import json

import torch
from conftest import REFERENCE

from models.segmentor import Segmentor

PUBLISHED_CHANNELS, PUBLISHED_WIDTH, PREFIX = (256, 512, 1024), 256, "segmentor."


def encoder_maps(channels, batch=2, side=64):
    return tuple(torch.rand(batch, count, side // fraction, side // fraction)
                 for count, fraction in zip(channels, (4, 8, 16)))


def test_state_dict_has_the_published_names_shapes_types_and_order():
    specification = json.loads((REFERENCE / "fused_model_state_dict.json").read_text())
    published = {key.removeprefix(PREFIX): (shape, dtype) for key, (shape, dtype) in specification.items()
                 if key.startswith(PREFIX)}
    classes = published["fc2.conv3.bias"][0][0]
    state = Segmentor(PUBLISHED_CHANNELS, PUBLISHED_WIDTH, classes).state_dict()
    found = {key: (list(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for key, tensor in state.items()}
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
