"""The fused model against the published one, under weights that the reference's README describes."""

import json
import zlib

from csad.data import files
from csad.data.images import small_views
from csad.errors import UserError
from csad.inference import engines
from csad.inference.folded import FoldedModel

import numpy as np
import pytest
import torch
from conftest import REFERENCE
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from models.constants import IMAGENET_MEAN, IMAGENET_STD
from models.fused import attach_metadata, block_means, from_state, metadata, published_state, to_rgb


def draw(key: str, shape: list[int], salt: int) -> np.ndarray:
    """One entry of the reference's state dict, by the rules of the reference data (first that fits)."""
    rng = np.random.default_rng([zlib.crc32(key.encode()), salt])
    leaf = key.rsplit(".", 1)[-1]
    fan_in = int(np.prod(shape[1:]))
    if leaf == "num_batches_tracked":
        return np.zeros(shape)
    if leaf == "running_var":
        return rng.uniform(0.5, 1.5, shape)
    if leaf == "running_mean":
        return rng.normal(0, 0.1, shape)
    if leaf in ("q_st_start", "q_ae_start"):
        return np.full(shape, 0.5)
    if leaf in ("q_st_end", "q_ae_end"):
        return np.full(shape, 2.5)
    if leaf == "teacher_mean":
        return rng.normal(0, 0.2, shape)
    if leaf.endswith("_std"):
        return rng.uniform(0.5, 1.5, shape)
    if leaf.endswith("val_mean") or key in ("lgst_mean", "patch_hist_mean"):
        return rng.uniform(0, 1, shape)
    if leaf.endswith("_invcov"):
        a = rng.normal(0, 1, shape)
        return a @ a.T / shape[0] + np.eye(shape[0])
    if leaf.endswith("hist_mean"):
        return rng.uniform(0, 0.3, shape)
    if len(shape) == 4:
        return rng.normal(0, np.sqrt((1 if key.startswith("encoder.") else 2) / fan_in), shape)
    if len(shape) == 1 and leaf == "weight" and key.startswith("encoder."):
        return rng.uniform(0.4, 0.6, shape)
    if len(shape) == 1 and leaf == "weight" and (".bn" in key or "downsample.1" in key):
        return rng.uniform(0.8, 1.2, shape)
    return rng.normal(0, 0.05, shape)


@pytest.fixture(scope="module")
def published():
    """(state dict in the published format, the reference's images and outputs)."""
    with np.load(REFERENCE / "fused_model.npz", allow_pickle=False) as archive:
        expected = dict(archive)
    specification = json.loads((REFERENCE / "fused_model_state_dict.json").read_text())
    state = {
        key: torch.from_numpy(np.asarray(draw(key, shape, int(expected["salt"])))).to(getattr(torch, dtype))
        for key, (shape, dtype) in specification.items()
    }
    state["segmentor.fc2.conv3.bias"] = torch.from_numpy(expected["segmentor_fc2_conv3_bias"]).float()
    return state, expected


def rgb(expected) -> torch.Tensor:
    """The reference's images, (B, 3, 256, 256) float in 0..255."""
    images = torch.from_numpy(expected["images"])
    return (images.permute(0, 3, 1, 2) if images.shape[-1] == 3 else images).float()


def normalise(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images / 255 - mean) / std


@pytest.fixture(scope="module")
def plain(published):
    """(the published model, the reference's images as it takes them, its scores); once, because it is of the paper's size."""
    state, expected = published
    model, images = from_state(state), normalise(rgb(expected))
    with torch.no_grad():
        return model, images, model(images)


def test_published_state_dict_gives_the_published_outputs(published, plain):
    (state, expected), (model, _, score) = published, plain
    assert published_state(model).keys() == state.keys()
    images = rgb(expected)
    with torch.no_grad():
        maps = model.encoder(images)
        differences = model.lgst.differences(images, maps)
        label_map = model.segmentor(maps).argmax(1)
        histogram_score = model.patch_hist_detector(label_map)
    np.testing.assert_allclose(
        differences.local.numpy(), expected["local_difference"].reshape(-1, 64, 64), rtol=1e-3
    )
    np.testing.assert_allclose(
        differences.global_.numpy(), expected["global_difference"].reshape(-1, 64, 64), rtol=1e-3
    )
    assert (label_map.numpy() == expected["label_map"].reshape(-1, 256, 256)).mean() >= 0.999
    np.testing.assert_allclose(histogram_score.numpy(), expected["patch_histogram_score"].ravel(), rtol=1e-3)
    np.testing.assert_allclose(score.numpy(), expected["score"].ravel(), atol=1e-3)


def test_the_folded_graph_gives_the_published_scores(plain):
    model, images, score = plain
    with torch.no_grad():
        torch.testing.assert_close(FoldedModel(model)(images), score, atol=1e-4, rtol=0)


def test_batch_scores_are_the_single_scores(plain):
    model, images, score = plain
    with torch.no_grad():
        torch.testing.assert_close(score[-1:], model(images[-1:]), atol=1e-3, rtol=1e-4)


@hypothesis_settings(max_examples=20, deadline=None)
@given(
    factor=st.integers(1, 4),
    seed=st.integers(0, 10_000),
    values=st.sampled_from([(0, 256), (254, 256), (0, 2)]),
)
def test_the_models_small_view_is_that_of_the_stages(factor, seed, values):
    """In floating point here, in whole numbers there: the same bytes, halves included."""
    side = 256 * factor
    images = np.random.default_rng(seed).integers(*values, (1, 1, side, side), dtype=np.uint8)
    found = block_means(torch.from_numpy(images).float())
    np.testing.assert_array_equal(found, small_views(images))


def test_whole_numbers_survive_normalising():
    """What a model of a larger view makes of its normalised input are the very bytes of the image."""
    images = torch.arange(256, dtype=torch.float32).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    mean, std = (255 * torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    assert torch.equal(to_rgb(normalise(images), mean, std, 512), images)


def test_metadata_travels_with_the_file_and_leaves_the_keys_alone(published, tmp_path):
    state, _ = published
    ours = published_state(from_state(state))
    attach_metadata(ours, {"category": "screw_bag", "backbone": "wide_resnet50_2", "stand_ins": ["x"]})
    files.write_state(tmp_path / "model.pth", ours)
    read = files.read_state(tmp_path / "model.pth")
    assert metadata(read)["stand_ins"] == ["x"]
    assert read.keys() == state.keys()
    assert metadata(state) == {}


def test_a_model_of_another_version_is_refused_and_a_published_one_is_not(published):
    state, _ = published
    assert from_state(state)
    ours = published_state(from_state(state))
    attach_metadata(ours, {"category": "screw_bag", "backbone": "wide_resnet50_2"})
    assert from_state(ours)
    ours._metadata["csad"]["format_version"] -= 1
    with pytest.raises(UserError, match="another version of this code .*export it again"):
        from_state(ours)
    for kind in ("ONNX", "OpenVINO"):
        with pytest.raises(
            UserError, match=f"this {kind} model was written by another version.*--format {kind.lower()}"
        ):
            engines.decoded_metadata('{"category": "screw_bag"}', kind)


def test_foreign_state_dict_is_refused_with_a_sentence():
    with pytest.raises(UserError, match="not a CSAD model"):
        from_state({"weight": torch.zeros(1)})
