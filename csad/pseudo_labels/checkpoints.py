"""The foundation models' weights: their published names, and where to get them."""

from __future__ import annotations

from pathlib import Path

from csad.data.downloads import Checkpoint, obtain
from csad.errors import UserError

_SAM_HQ = "https://huggingface.co/lkeab/hq-sam/resolve/main"
_GROUNDING_DINO = "https://github.com/IDEA-Research/GroundingDINO/releases/download"
_BERT = "https://huggingface.co/google-bert/bert-base-uncased/resolve/main"

SAM = {
    "vit_h": Checkpoint(
        "sam_hq_vit_h.pth",
        f"{_SAM_HQ}/sam_hq_vit_h.pth",
        2571,
        "a7ac14a085326d9fa6199c8c698c4f0e7280afdbb974d2c4660ec60877b45e35",
    ),
    "vit_l": Checkpoint(
        "sam_hq_vit_l.pth",
        f"{_SAM_HQ}/sam_hq_vit_l.pth",
        1250,
        "e1a6c385d62bf005ded91a54d5ec55c985cfc4103ef89c08d90f39f04934c343",
    ),
    "vit_b": Checkpoint(
        "sam_hq_vit_b.pth",
        f"{_SAM_HQ}/sam_hq_vit_b.pth",
        379,
        "14a9d662cd6f5a9c2dba6d40ab0058d88d287e4a18fd6fdc6ad5fb1a3fdeaa57",
    ),
    "vit_tiny": Checkpoint(
        "sam_hq_vit_tiny.pth",
        f"{_SAM_HQ}/sam_hq_vit_tiny.pth",
        42.5,
        "0f32c075ccdd870ae54db2f7630e7a0878ede5a2b06d05d6fe02c65a82fb7196",
    ),
}
GROUNDING_DINO = {
    "swint_ogc": Checkpoint(
        "groundingdino_swint_ogc.pth",
        f"{_GROUNDING_DINO}/v0.1.0-alpha/groundingdino_swint_ogc.pth",
        694,
        "3b3ca2563c77c69f651d7bd133e97139c186df06231157a64c507099c52bc799",
    ),
    "swinb_cogcoor": Checkpoint(
        "groundingdino_swinb_cogcoor.pth",
        f"{_GROUNDING_DINO}/v0.1.0-alpha2/groundingdino_swinb_cogcoor.pth",
        938,
        "46270f7a822e6906b655b729c90613e48929d0f2bb8b9b76fd10a856f3ac6ab7",
    ),
}
TEXT_ENCODER = "bert-base-uncased"  # a folder under ckpt/ and the model's name on the hub
TEXT_ENCODER_FILES = (
    Checkpoint(f"{TEXT_ENCODER}/config.json", f"{_BERT}/config.json", 0.001),
    Checkpoint(f"{TEXT_ENCODER}/tokenizer_config.json", f"{_BERT}/tokenizer_config.json", 0.001),
    Checkpoint(
        f"{TEXT_ENCODER}/vocab.txt",
        f"{_BERT}/vocab.txt",
        0.2,
        "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    ),
    Checkpoint(
        f"{TEXT_ENCODER}/model.safetensors",
        f"{_BERT}/model.safetensors",
        440,
        "68d45e234eb4a928074dfd868cead0219ab85354cc53d20e772753c6bb9169d3",
    ),
)


def obtain_text_encoder(folder: Path, download: bool) -> Path:
    """Folder of Grounding DINO's text encoder: in ``folder``, in the hub's local cache, or downloaded.

    Raises:
        UserError: it is in none of them and not to be downloaded, or the download failed.
    """
    path = folder / TEXT_ENCODER
    if path.is_dir() and not download:
        return path
    if download:
        for part in TEXT_ENCODER_FILES:
            obtain(part, folder, download)
        return path
    # Late, because it takes a second and only Grounding DINO needs it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(TEXT_ENCODER, local_files_only=True))
    except LocalEntryNotFoundError as problem:
        raise UserError(
            f"Grounding DINO's text encoder {path} is missing; fetch it with --download, or put the files "
            f"of {_BERT.removesuffix('/resolve/main')} there"
        ) from problem
