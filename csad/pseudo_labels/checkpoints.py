"""The foundation models' weights: their published names, and where to get them."""

from __future__ import annotations

from pathlib import Path

from csad.data.downloads import Checkpoint, obtain
from csad.errors import UserError

_SAM_HQ = "https://huggingface.co/lkeab/hq-sam/resolve/main"
_GROUNDING_DINO = "https://github.com/IDEA-Research/GroundingDINO/releases/download/v0.1.0"
_BERT = "https://huggingface.co/google-bert/bert-base-uncased/resolve/main"

SAM = {
    size: Checkpoint(f"sam_hq_{size}.pth", f"{_SAM_HQ}/sam_hq_{size}.pth", megabytes, sha256)
    for size, megabytes, sha256 in (
        ("vit_h", 2571, "a7ac14a085326d9fa6199c8c698c4f0e7280afdbb974d2c4660ec60877b45e35"),
        ("vit_l", 1250, "e1a6c385d62bf005ded91a54d5ec55c985cfc4103ef89c08d90f39f04934c343"),
        ("vit_b", 379, "14a9d662cd6f5a9c2dba6d40ab0058d88d287e4a18fd6fdc6ad5fb1a3fdeaa57"),
        ("vit_tiny", 42.5, "0f32c075ccdd870ae54db2f7630e7a0878ede5a2b06d05d6fe02c65a82fb7196"),
    )
}
GROUNDING_DINO = {
    size: Checkpoint(
        file := f"groundingdino_{size}.pth", f"{_GROUNDING_DINO}-{release}/{file}", megabytes, sha256
    )
    for size, release, megabytes, sha256 in (
        ("swint_ogc", "alpha", 694, "3b3ca2563c77c69f651d7bd133e97139c186df06231157a64c507099c52bc799"),
        ("swinb_cogcoor", "alpha2", 938, "46270f7a822e6906b655b729c90613e48929d0f2bb8b9b76fd10a856f3ac6ab7"),
    )
}
TEXT_ENCODER = "bert-base-uncased"  # a folder under ckpt/ and the model's name on the hub
TEXT_ENCODER_FILES = tuple(
    Checkpoint(f"{TEXT_ENCODER}/{file}", f"{_BERT}/{file}", megabytes, sha256)
    for file, megabytes, sha256 in (
        ("config.json", 0.001, None),
        ("tokenizer_config.json", 0.001, None),
        ("vocab.txt", 0.2, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
        ("model.safetensors", 440, "68d45e234eb4a928074dfd868cead0219ab85354cc53d20e772753c6bb9169d3"),
    )
)


def obtain_text_encoder(folder: Path, download: bool) -> Path:
    """Folder of Grounding DINO's text encoder: in ``folder``, in the hub's local cache, or downloaded;
    UserError if it is in none of them and not to be downloaded, or the download failed."""
    path = folder / TEXT_ENCODER
    for part in TEXT_ENCODER_FILES if download else ():
        obtain(part, folder, download)
    if download or path.is_dir():
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
