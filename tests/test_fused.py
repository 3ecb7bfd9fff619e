"""The fused model against the published one, under weights that the reference's README describes."""

import json
import zlib

import numpy as np
import pytest
import torch
from conftest import REFERENCE

from data import files
from data.images import IMAGENET_MEAN, IMAGENET_STD
from deploy.folded import FoldedModel
from errors import UserError
from models.fused import attach_metadata, from_state, metadata, published_state


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
    state = {key: torch.from_numpy(np.asarray(draw(key, shape, int(expected["salt"])))).to(getattr(torch, dtype))
             for key, (shape, dtype) in specification.items()}
    state["segmentor.fc2.conv3.bias"] = torch.from_numpy(expected["segmentor_fc2_conv3_bias"]).float()
    return state, expected


def rgb(expected) -> torch.Tensor:
    """The reference's images, (B, 3, 256, 256) float in 0..255."""
    images = torch.from_numpy(expected["images"])
    return (images.permute(0, 3, 1, 2) if images.shape[-1] == 3 else images).float()


def normalise(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images / 255 - mean) / std


def test_published_state_dict_gives_the_published_outputs(published):
    state, expected = published
    model = from_state(state)
    assert published_state(model).keys() == state.keys()
    images = rgb(expected)
    with torch.no_grad():
        found = model.analyse(images)
        differences = model.lgst.differences(images, model.encoder(images))
        histogram_score = model.patch_hist_detector(found.label_map)
        score = model(normalise(images))
    np.testing.assert_allclose(differences.local.numpy(), expected["local_difference"].reshape(-1, 64, 64), rtol=1e-3)
    np.testing.assert_allclose(differences.global_.numpy(), expected["global_difference"].reshape(-1, 64, 64), rtol=1e-3)
    assert (found.label_map.numpy() == expected["label_map"].reshape(-1, 256, 256)).mean() >= 0.999
    np.testing.assert_allclose(histogram_score.numpy(), expected["patch_histogram_score"].ravel(), rtol=1e-3)
    np.testing.assert_allclose(score.numpy(), expected["score"].ravel(), atol=1e-3)
    np.testing.assert_allclose(found.score.numpy(), expected["score"].ravel(), atol=1e-3)


def test_the_folded_graph_gives_the_published_scores(published):
    state, expected = published
    images = normalise(rgb(expected))
    model = from_state(state)
    with torch.no_grad():
        torch.testing.assert_close(FoldedModel(model)(images), model(images), atol=1e-4, rtol=0)


def test_batch_scores_are_the_single_scores(published):
    state, expected = published
    model = from_state(state)
    images = normalise(rgb(expected))
    with torch.no_grad():
        singles = torch.cat([model(images[i:i + 1]) for i in range(len(images))])
        torch.testing.assert_close(model(images), singles, atol=1e-3, rtol=1e-4)


def test_metadata_travels_with_the_file_and_leaves_the_keys_alone(published, tmp_path):
    state, _ = published
    ours = published_state(from_state(state))
    attach_metadata(ours, {"category": "screw_bag", "backbone": "wide_resnet50_2", "stand_ins": ["x"]})
    files.write_state(tmp_path / "model.pth", ours)
    read = files.read_state(tmp_path / "model.pth")
    assert metadata(read)["stand_ins"] == ["x"]
    assert read.keys() == state.keys()
    assert metadata(state) == {}


def test_foreign_state_dict_is_refused_with_a_sentence():
    with pytest.raises(UserError, match="not a CSAD model"):
        from_state({"weight": torch.zeros(1)})
