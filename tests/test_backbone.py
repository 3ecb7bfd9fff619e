"""Weights of torchvision's networks: files that hold something else, and networks that have no maps."""

import pickle
from pathlib import Path

import pytest
import torch
import torchvision

from errors import UserError
from models.backbone import WeightsMissing, build_backbone, empty_encoder

NAME = "squeezenet1_1"


class Trap:
    """Harm done by whoever unpickles it."""

    def __reduce__(self):
        return Path("sprung").touch, ()


@pytest.mark.parametrize("content", [b"", b"a text\n", b"hello world", b"G", pickle.dumps(Trap(), protocol=2)])
def test_weights_that_are_none_get_a_sentence_and_are_never_run(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    mine, cached = tmp_path / "mine.pth", tmp_path / "hub/checkpoints" / Path(
        torchvision.models.get_model_weights(NAME).DEFAULT.url).name
    cached.parent.mkdir(parents=True)
    for path in (mine, cached):
        path.write_bytes(content)
    with pytest.raises(UserError, match="does not hold a state dict"):
        build_backbone(NAME, mine, tmp_path)
    with pytest.raises(WeightsMissing, match="is damaged") as problem:  # as if torchvision had downloaded it
        build_backbone(NAME, None, tmp_path)
    assert "\n" not in str(problem.value)
    assert not Path("sprung").exists()


def test_a_folder_instead_of_weights_gets_a_sentence(tmp_path):
    with pytest.raises(UserError, match="does not hold a state dict"):
        build_backbone(NAME, tmp_path, tmp_path)


def test_downloaded_weights_are_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.get_model(NAME, weights=None).state_dict()
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save(weights, tmp_path / "hub/checkpoints" / Path(torchvision.models.get_model_weights(NAME).DEFAULT.url).name)
    assert torch.equal(build_backbone(NAME, None, tmp_path).encoder.state_dict()["network.features.0.weight"],
                       weights["features.0.weight"])


def test_a_network_without_maps_gets_a_sentence():
    with pytest.raises(UserError, match="no feature map"):
        empty_encoder("vit_b_32")  # of 224x224 images only
