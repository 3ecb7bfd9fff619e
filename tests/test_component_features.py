"""Component features against the published implementation's results, and the deep one's invariances."""

from csad.pseudo_labels import components, crop_embedding

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

from models.backbone import Normalise


@pytest.fixture
def published(reference):
    return reference("component_features")


def test_shallow_features_match_the_published_implementation(published):
    features, crops = components.shallow_features(published["image"], published["masks"])
    np.testing.assert_array_equal(crops, published["aligned_images"])
    for name in ("area", "color", "position", "shape_hu"):
        np.testing.assert_allclose(features[name], published[name], rtol=0, atol=1e-6, err_msg=name)
    for mask, image, aligned in zip(
        published["masks"], published["aligned_images"], published["aligned_masks"]
    ):
        found_mask, found_image = components.aligned_crop(published["image"], mask)
        np.testing.assert_array_equal(found_mask, aligned)
        np.testing.assert_array_equal(found_image, image)


def test_lab_is_the_mean_colour():
    image = np.zeros((10, 10, 3), np.uint8)
    image[:, 5:] = 255
    half = np.zeros((10, 10), np.uint8)
    half[:, 5:] = 255
    np.testing.assert_allclose(components.lab(image, half), (100, 0, 0), atol=0.1)
    np.testing.assert_allclose(components.lab(image, 255 - half), (0, 0, 0), atol=0.1)


@pytest.mark.parametrize(
    "rows, columns", [(slice(3, 4), slice(3, 4)), (slice(3, 4), slice(0, 200)), (slice(0, 256), slice(9, 10))]
)
def test_slivers_have_features_too(rows, columns):
    mask = np.zeros((256, 256), np.uint8)
    mask[rows, columns] = 1
    features, crops = components.shallow_features(np.full((256, 256, 3), 90, np.uint8), mask[None])
    assert all(np.isfinite(values).all() for values in features.values())
    assert crops.shape == (1, 65, 65, 3)


def test_an_image_without_components_has_empty_features():
    features, crops = components.shallow_features(np.zeros((8, 8, 3), np.uint8), np.zeros((0, 8, 8), bool))
    assert {name: values.shape for name, values in features.items()} == {
        "area": (0, 1),
        "color": (0, 1),
        "position": (0, 2),
        "shape_hu": (0, 7),
        "lab": (0, 3),
    }
    empty = crop_embedding.CropEmbedding(Deepest(nn.Conv2d(3, 7, 3)), 2)(
        torch.from_numpy(crops).permute(0, 3, 1, 2)
    )
    assert empty.shape == (0, 7)


class Deepest(nn.Module):
    """A network as `models.backbone.Backbone.deepest` is: RGB in 0..255 in, a tuple with one map out."""

    def __init__(self, network):
        super().__init__()
        self.normalise, self.network = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), network

    def forward(self, images):
        return (self.network(self.normalise(images)),)


@pytest.fixture
def deepest():
    torch.manual_seed(0)
    return Deepest(
        nn.Sequential(nn.Conv2d(3, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2), nn.ReLU())
    ).eval()


@pytest.fixture
def crops():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 255, (5, 3, 65, 65), dtype=np.uint8))


def test_embedding_averages_over_distinct_rotations(deepest, crops):
    quarter_turns = crop_embedding.CropEmbedding(deepest, 4)
    by_hand = torch.stack(
        [crop_embedding.CropEmbedding(deepest, 1)(crops.rot90(turn, (2, 3))) for turn in range(4)]
    ).mean(0)
    torch.testing.assert_close(quarter_turns(crops), by_hand, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        quarter_turns(crops), quarter_turns(crops.rot90(1, (2, 3))), rtol=1e-3, atol=1e-4
    )
    assert len(quarter_turns.grids) == 4


def test_embedding_of_a_crop_does_not_depend_on_its_batch(deepest, crops, monkeypatch):
    together = crop_embedding.CropEmbedding(deepest, 3)(crops)
    monkeypatch.setattr(crop_embedding, "CROPS_PER_BATCH", 3)
    torch.testing.assert_close(crop_embedding.CropEmbedding(deepest, 3)(crops), together)


def published_rotations(crop):
    """The sixty turned pictures that the published code makes of a crop, (60, 3, 65, 65): PIL, 0 and 360 degrees both."""
    turned = [
        np.array(Image.fromarray(crop).rotate(angle, Image.Resampling.BILINEAR))
        for angle in np.linspace(0, 360, 60)
    ]
    return torch.from_numpy(np.stack(turned)).permute(0, 3, 1, 2)


def test_sampled_rotations_give_the_published_feature(published):
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18(weights=None).eval()
    deepest = Deepest(nn.Sequential(*list(resnet.children())[:-2]))
    crops = published["aligned_images"][:4]
    found = crop_embedding.CropEmbedding(deepest, 60)(torch.from_numpy(crops).permute(0, 3, 1, 2))
    with torch.inference_mode():
        expected = torch.stack([deepest(published_rotations(crop))[0].mean((0, 2, 3)) for crop in crops])
    assert torch.cosine_similarity(found, expected).min() > 0.999
    # A random network answers much the same to everything; what tells components apart has to agree, too.
    assert torch.cosine_similarity(found - found.mean(0), expected - expected.mean(0)).min() > 0.99


def test_projection_is_fixed_by_its_seed():
    projection = crop_embedding.random_projection(2048, seed=1)
    assert projection.shape == (2048, 512)
    assert abs(projection.std() - 0.01) < 1e-4 and abs(projection.mean()) < 1e-4
    np.testing.assert_array_equal(projection, crop_embedding.random_projection(2048, seed=1))
    assert (projection != crop_embedding.random_projection(2048, seed=2)).any()
