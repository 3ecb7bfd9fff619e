"""Checkpoints with random weights of the published shapes, under the published names."""

from __future__ import annotations

from pathlib import Path

from csad.pseudo_labels import checkpoints
from csad.pseudo_labels.grounding_dino import build_grounding_dino
from csad.pseudo_labels.sam_hq import build_sam

import timm
import torch

# fmt: off
SPECIAL_TOKENS = {
    0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?", 1011: "-", 1010: ",",
}
# fmt: on
VOCABULARY = 30522


def write_sam(size: str, folder: Path) -> None:
    """SAM-HQ of a size: vit_h, vit_l, vit_b or vit_tiny."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(build_sam(size).state_dict(), folder / checkpoints.SAM[size].file)


def write_grounding_dino(folder: Path) -> None:
    """Grounding DINO and its text encoder: its file holds BERT's weights, too, and it is built from BERT's folder."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.manual_seed(1)
    encoder = folder / checkpoints.TEXT_ENCODER
    encoder.mkdir(parents=True, exist_ok=True)
    BertModel(BertConfig()).save_pretrained(encoder)
    vocabulary = [SPECIAL_TOKENS.get(index, f"[unused{index}]") for index in range(VOCABULARY)]
    vocabulary[2000:2026] = [f"##{chr(letter)}" for letter in range(ord("a"), ord("z") + 1)]
    vocabulary[2100:2126] = [chr(letter) for letter in range(ord("a"), ord("z") + 1)]
    (encoder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    BertTokenizerFast(str(encoder / "vocab.txt")).save_pretrained(encoder)
    state = build_grounding_dino("swint_ogc", encoder).state_dict()
    torch.save(
        {"model": {f"module.{key}": values for key, values in state.items()}},
        folder / checkpoints.GROUNDING_DINO["swint_ogc"].file,
    )


def write_wide_resnets(folder: Path) -> None:
    """The encoder, and the network of cnn_image."""
    for seed, name in enumerate(("wide_resnet50_2", "wide_resnet50_2.racm_in1k")):
        torch.manual_seed(seed)
        torch.save(timm.create_model("wide_resnet50_2").state_dict(), folder / f"{name}.pth")
