"""SAM-HQ and Grounding DINO from their packages, with small checkpoints of random weights. They say nothing about quality."""

import shutil
import socket
import sys

from csad import settings
from csad.data import files, images
from csad.errors import UserError
from csad.pseudo_labels import grounded_sam, grounding_dino, one_picture, package_networks, sam_hq
from csad.standins.proposer_choice import choose_proposer

import numpy as np
import pytest
import torch
from conftest import draw_parts
from PIL import Image

import pseudo_label

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """What lies in ckpt/ is used without asking anybody."""

    def connect(*_):
        raise AssertionError("went online")

    monkeypatch.setattr(socket.socket, "connect", connect)


WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] . ? , - zip lock bag pin push ##pin nut screw".split()
PROMPT = "pin . nut . zip-lock bag ."


def small_grounding_dino(patch):
    """Let the package build a Grounding DINO with its own Swin-T but few layers, six boxes and small pictures."""
    with package_networks.quietly():
        from groundingdino.util.slconfig import SLConfig
    published = SLConfig.fromfile

    def fewer(path):
        arguments = published(path)
        arguments.enc_layers = arguments.dec_layers = 1
        arguments.dim_feedforward, arguments.num_queries = 64, 6
        return arguments

    patch.setattr(SLConfig, "fromfile", staticmethod(fewer))
    patch.setattr(grounding_dino, "SHORT_SIDE", 96)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A ckpt folder with checkpoints that the packages' own builders made."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("ckpt")
    torch.manual_seed(0)
    torch.save(sam_hq.build_sam("vit_tiny").state_dict(), folder / "sam_hq_vit_tiny.pth")
    bert = folder / "bert-base-uncased"
    BertModel(
        BertConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        )
    ).save_pretrained(bert)
    (bert / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertTokenizerFast(str(bert / "vocab.txt")).save_pretrained(bert)
    with pytest.MonkeyPatch.context() as patch:
        small_grounding_dino(patch)
        state = grounding_dino.build_grounding_dino("swint_ogc", bert).state_dict()
    # The published file's keys have this prefix, and it holds parameters that inference does not need.
    state = {f"module.{key}": value for key, value in state.items()} | {
        "module.label_enc.weight": torch.zeros(2, 2)
    }
    torch.save({"model": state}, folder / "groundingdino_swint_ogc.pth")
    return folder


@pytest.fixture(scope="module")
def sam(weights):
    return sam_hq.load_sam("vit_tiny", weights / "sam_hq_vit_tiny.pth", CPU)


@pytest.fixture
def detector(weights, monkeypatch):
    small_grounding_dino(monkeypatch)
    return grounding_dino.load_grounding_dino(
        "swint_ogc", weights / "groundingdino_swint_ogc.pth", weights / "bert-base-uncased", CPU
    )


def chosen(**changes):
    everything_passes = {
        "sam": "vit_tiny",
        "points_per_side": 2,
        "crop_n_layers": 0,
        "pred_iou_thresh": 0,
        "stability_score_thresh": 0,
        "min_mask_region_area": 20,
        "text_prompt": PROMPT,
        "background_prompt": "zip-lock bag",
        "box_threshold": 0,
        "text_threshold": 0,
        "variants": True,
    }
    return settings.load(
        "discs",
        "quick",
        {f"pseudo_labels.{key}": value for key, value in (everything_passes | changes).items()},
    ).pseudo_labels


def picture(parts=4):
    return draw_parts(np.random.default_rng(0), parts, 256)[0]


def test_sam_hq_answers_points_boxes_and_automatically(sam):
    sam.look_at(picture())
    assert sam.background().shape == (256, 256) and sam.background().dtype == bool
    found = sam.inside(np.array([[0.0, 0, 128, 128], [64, 64, 200, 250]] * 9))
    assert len(found) == 18 and found.shape == (256, 256)  # more than one batch
    np.testing.assert_array_equal(found[0], found[2])
    assert len(sam.inside(np.zeros((0, 4)))) == 0
    everything = sam.everything(chosen())
    assert len(everything) and everything.shape == (256, 256)


def test_automatic_masks_may_be_none_at_all(sam):
    # With crops: there the package alone fails where no crop shows a mask.
    sam.look_at(picture())
    assert len(sam.everything(chosen(points_per_side=1, crop_n_layers=1, pred_iou_thresh=1))) == 0


def test_small_regions_go_as_in_the_package(sam):
    with package_networks.quietly():
        from segment_anything_hq import SamAutomaticMaskGenerator
        from segment_anything_hq.utils.amg import MaskData, batched_mask_to_box, mask_to_rle_pytorch
    masks = torch.zeros(6, 60, 80, dtype=torch.bool)
    masks[0, 5:40, 5:40] = masks[1, 5:40, 5:40] = masks[2, 5:41, 5:40] = masks[3, 20:55, 30:70] = masks[
        4, :9, 60:
    ] = True
    masks[1, 10, 10], masks[3, 0, 0], masks[4, 0, 0], masks[5, 0, :3] = False, True, True, True

    def data():
        return MaskData(
            rles=mask_to_rle_pytorch(masks), boxes=batched_mask_to_box(masks).numpy(), number=np.arange(6)
        )

    ours = sam_hq._mask_generator().postprocess_small_regions(data(), 20, 0.7)
    theirs = SamAutomaticMaskGenerator.postprocess_small_regions(data(), 20, 0.7)
    assert ours["rles"] == theirs["rles"] and len(ours["rles"]) < 6
    np.testing.assert_array_equal(ours["number"], theirs["number"])
    np.testing.assert_array_equal(ours["boxes"], theirs["boxes"])


def test_tiny_vit_uses_the_attention_biases_of_its_checkpoint(sam, weights):
    state = torch.load(weights / "sam_hq_vit_tiny.pth", weights_only=True)
    for attention in (
        module for module in sam.predictor.model.modules() if hasattr(module, "attention_biases")
    ):
        torch.testing.assert_close(attention.ab, attention.attention_biases[:, attention.attention_bias_idxs])
    assert any("attention_biases" in key for key in state)


def test_grounding_dino_finds_boxes_and_phrases(detector):
    boxes, phrases = detector.detect(picture(), PROMPT, 0, 0)
    assert boxes.shape == (6, 4) and len(phrases) == 6 and np.isfinite(boxes).all()
    assert all("zip - lock bag" in phrase for phrase in phrases)
    boxes, phrases = detector.detect(picture(), PROMPT, 1, 0)
    assert boxes.shape == (0, 4) and phrases == []


@pytest.mark.parametrize(
    "phrase, background",
    [
        ("zip - lock bag", True),
        ("a bag", False),
        ("", False),
        ("container", False),
        ("pin container pushpin", True),
    ],
)
def test_background_prompts_are_looked_for_in_phrases_with_their_spaces(phrase, background):
    assert grounded_sam.names_background(phrase, "Zip-lock bag. container .") == background
    assert not grounded_sam.names_background(phrase, None)


def test_an_empty_detection_leaves_empty_grounding_masks(weights, detector):
    proposals = proposer(weights, box_threshold=1, no_sam=True).propose(picture())
    assert proposals.masks is None and len(proposals.grounding) == 0
    assert not proposals.grounding_background.any()
    candidates, refined = one_picture.refine(proposals, chosen(no_sam=True))
    assert candidates is None and not refined.any()


def test_masks_named_as_background_are_no_instances(weights, detector):
    proposals = proposer(weights, no_sam=True).propose(picture())
    assert len(proposals.grounding) == 0  # with a threshold of 0, every phrase holds every word
    proposals = proposer(weights, no_sam=True, background_prompt=None).propose(picture())
    assert len(proposals.grounding) == 6 and not proposals.grounding_background.any()


def proposer(weights, **changes):
    return grounded_sam.GroundedSamProposer(
        chosen(**changes),
        weights / "sam_hq_vit_tiny.pth",
        weights / "groundingdino_swint_ogc.pth",
        weights / "bert-base-uncased",
        CPU,
    )


def damaged(folder):
    (folder / "sam_hq_vit_tiny.pth").write_bytes(b"half a file")
    return "sam_hq_vit_tiny.pth is damaged", {}


def plain_sam(folder):
    state = torch.load(folder / "sam_hq_vit_tiny.pth", weights_only=True)
    torch.save(
        {key: value for key, value in state.items() if "hf_token" not in key}, folder / "sam_hq_vit_tiny.pth"
    )
    return "does not hold the weights of SAM-HQ vit_tiny", {}


def another_size(folder):
    shutil.copy(folder / "sam_hq_vit_tiny.pth", folder / "sam_hq_vit_b.pth")
    return "does not hold the weights of SAM-HQ vit_b", {"sam": "vit_b"}


def executable(folder):
    torch.save({"model": print}, folder / "groundingdino_swint_ogc.pth")
    return "groundingdino_swint_ogc.pth is damaged", {}


def no_grounding_dino(folder):
    shutil.copy(folder / "sam_hq_vit_tiny.pth", folder / "groundingdino_swint_ogc.pth")
    return "does not hold the weights of Grounding DINO swint_ogc", {}


def no_text_encoder(folder):
    (folder / "bert-base-uncased" / "config.json").unlink()
    return "does not hold the text encoder", {}


@pytest.mark.parametrize(
    "harm", [damaged, plain_sam, another_size, executable, no_grounding_dino, no_text_encoder]
)
def test_wrong_checkpoints_get_a_sentence(harm, weights, tmp_path, monkeypatch):
    small_grounding_dino(monkeypatch)
    folder = tmp_path / "ckpt"
    shutil.copytree(weights, folder)
    sentence, changes = harm(folder)
    with pytest.raises(UserError, match=sentence):
        choose_proposer("discs", chosen(proposer="grounded_sam", **changes), folder, CPU, False).load()


@pytest.fixture
def dataset(tmp_path):
    """Five images as people have them: 16-bit grey, 8-bit grey, RGB with alpha, RGB, and a single pixel."""
    folder = tmp_path / "data" / "discs" / "train" / "good"
    folder.mkdir(parents=True)
    image = Image.fromarray(picture())
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(folder / "0.png")
    image.convert("L").save(folder / "1.png")
    image.convert("RGBA").save(folder / "2.png")
    image.save(folder / "3.png")
    Image.new("RGB", (1, 1), (90, 90, 90)).save(folder / "4.png")
    return tmp_path / "data"


def run_stage(monkeypatch, workspace, dataset, *extra):
    changes = chosen(no_sam=False).model_dump()
    single = [
        word
        for key in (
            "sam",
            "points_per_side",
            "crop_n_layers",
            "pred_iou_thresh",
            "stability_score_thresh",
            "min_mask_region_area",
            "text_prompt",
            "text_threshold",
            "box_threshold",
            "variants",
        )
        for word in (f"--pseudo_labels.{key}", str(changes[key]))
    ]
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "pseudo_label.py",
            "--workspace",
            str(workspace),
            "--dataset_root",
            str(dataset),
            "--preset",
            "quick",
            "--backbone",
            "efficientnet_lite0",
            "--device",
            "cpu",
            *single,
            *extra,
        ],
    )
    pseudo_label.run_script(pseudo_label.main)


class Killed(Exception):
    """Stands for a power cut."""


def test_the_stage_runs_resumes_image_by_image_and_notices_another_checkpoint(
    weights, dataset, detector, tmp_path, monkeypatch, capsys
):
    workspace = tmp_path / "work"
    shutil.copytree(weights, workspace / "ckpt")
    seen, look_at = [], sam_hq.SamHQ.look_at

    def watched(self, image):
        seen.append(image)
        if len(seen) == 3:
            raise Killed
        look_at(self, image)

    monkeypatch.setattr(sam_hq.SamHQ, "look_at", watched)
    with pytest.raises(Killed):
        run_stage(monkeypatch, workspace, dataset)
    assert "discs: proposals by grounded_sam\n" in capsys.readouterr().out
    masks = workspace / "datasets" / "masks" / "discs"
    unfinished = masks.with_name("discs.unfinished")
    before = {masks / path.relative_to(unfinished): path.read_bytes() for path in unfinished.rglob("*.png")}
    assert before
    run_stage(monkeypatch, workspace, dataset)
    assert len(seen) == 5  # the third once more, and the one after it; of five images one is held out
    for path, content in before.items():
        assert path.read_bytes() == content

    said = capsys.readouterr()
    assert "Warning" not in said.err and "text_encoder_type" not in said.out and "keys" not in said.out
    for index in range(4):
        for name in ("grounding_mask", "all_masks", "refined_masks", "cluster_map", "filtered_cluster_map"):
            assert images.read_mask(masks / str(index) / f"{name}.png").shape == (256, 256)
            assert images.read_rgb(masks / str(index) / f"{name}_color.png").shape == (256, 256, 3)
        assert (masks / str(index) / "grounding_background.png").exists()
        assert (masks / str(index) / "background.jpg").exists()
    record = files.read_json(masks / "info" / "pseudo_label.json")["used"]
    assert set(record["checkpoints"]) == {"sam_hq_vit_tiny.pth", "groundingdino_swint_ogc.pth"}
    assert record["stand_ins"][-1] == "proposer grounded_sam vit_tiny swint_ogc"

    state = torch.load(workspace / "ckpt" / "sam_hq_vit_tiny.pth", weights_only=True)
    state["mask_decoder.hf_token.weight"] += 1
    torch.save(state, workspace / "ckpt" / "sam_hq_vit_tiny.pth")
    for changes, sentence in (
        ([], "checkpoints.sam_hq_vit_tiny.pth: "),
        (["--proposer", "sam"], "proposer: auto -> sam"),
        (["--pseudo_labels.text_prompt", "bag ."], "pseudo_labels.text_prompt: "),
    ):
        with pytest.raises(SystemExit):
            run_stage(monkeypatch, workspace, dataset, *changes)
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    "there, prompt, found",
    [
        (("sam_hq_vit_h.pth", "groundingdino_swint_ogc.pth"), PROMPT, "grounded_sam"),
        (("sam_hq_vit_h.pth",), PROMPT, "sam"),
        (("sam_hq_vit_h.pth",), None, "sam"),
        (("groundingdino_swint_ogc.pth",), PROMPT, "classical"),
        ((), None, "classical"),
    ],
)
def test_auto_takes_what_is_there_and_says_so(there, prompt, found, tmp_path, capsys):
    for name in there:
        (tmp_path / name).write_bytes(b"weights")
    (tmp_path / "bert-base-uncased").mkdir()
    taken = choose_proposer(
        "discs",
        settings.load("discs", "paper", {"pseudo_labels.text_prompt": prompt}).pseudo_labels,
        tmp_path,
        CPU,
        False,
    )
    said = capsys.readouterr().out
    assert taken.name == found and said.count("\n") == 1
    real = found == ("grounded_sam" if prompt else "sam")
    assert taken.is_stand_in != real
    assert ("--download" in said) != real


def test_what_cannot_be_had_is_one_sentence(tmp_path):
    for changes, sentence in (
        ({"proposer": "sam"}, "sam_hq_vit_h.pth is missing; fetch it with --download"),
        ({"proposer": "grounded_sam"}, "what the parts are called"),
        ({"proposer": "grounded_sam", "text_prompt": "nut ."}, "sam_hq_vit_h.pth is missing"),
    ):
        wanted = settings.load(
            "discs", "paper", {f"pseudo_labels.{key}": value for key, value in changes.items()}
        )
        with pytest.raises(UserError, match=sentence):
            choose_proposer("discs", wanted.pseudo_labels, tmp_path, CPU, False)


@pytest.mark.parametrize(
    "asked, device, half", [("fp32", "cuda", False), ("fp16", "cuda", True), ("fp16", "cpu", False)]
)
def test_the_image_encoder_is_in_fp16_on_cuda_and_only_where_asked(weights, asked, device, half):
    settings_, folder = chosen(sam_precision=asked), weights
    sam_file = folder / "sam_hq_vit_tiny.pth"
    proposers = (
        grounded_sam.SamProposer(settings_, sam_file, torch.device(device)),
        grounded_sam.GroundedSamProposer(
            settings_,
            sam_file,
            folder / "groundingdino_swint_ogc.pth",
            folder / "bert-base-uncased",
            torch.device(device),
        ),
    )
    assert settings.PseudoLabelSettings().sam_precision == "fp32"
    for proposer in proposers:
        assert (
            proposer.half == half and proposer.name.endswith(" fp16") == half
        )  # the name goes into records and info.txt


def test_the_image_encoder_multiplies_in_what_was_asked_for():
    class Encoder(torch.nn.Linear):
        img_size = 4

        def forward(self, image):
            seen.append(super().forward(image).dtype)
            return image, []

    for half, dtype in ((False, torch.float32), (True, torch.float16)):
        seen = []
        sam_hq._ImageEncoder(Encoder(4, 4), half)(torch.ones(1, 4))
        assert seen == [dtype]
