"""The foundation models' weights: their published names, where they are to be had, and how they are fetched."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from csad.errors import UserError
from csad.progress import ProgressBar

CHUNK = 1 << 20  # bytes
PATIENCE = 30  # seconds without an answer
SAMPLES, SAMPLE = 1024, 4096  # of a digest: places in the file, bytes at each


@dataclass(frozen=True)
class Checkpoint:
    """A published file.

    Attributes:
        file: its name under ckpt/.
        url: where it is published.
        megabytes: its size.
        sha256: of the whole file, where it is published; or the first digits of that, which some files bear in their name.
    """

    file: str
    url: str
    megabytes: float
    sha256: str | None = None


_SAM_HQ = "https://huggingface.co/lkeab/hq-sam/resolve/main"
_GROUNDING_DINO = "https://github.com/IDEA-Research/GroundingDINO/releases/download"
_BERT = "https://huggingface.co/google-bert/bert-base-uncased/resolve/main"

SAM = {
    "vit_h": Checkpoint("sam_hq_vit_h.pth", f"{_SAM_HQ}/sam_hq_vit_h.pth", 2571,
                        "a7ac14a085326d9fa6199c8c698c4f0e7280afdbb974d2c4660ec60877b45e35"),
    "vit_l": Checkpoint("sam_hq_vit_l.pth", f"{_SAM_HQ}/sam_hq_vit_l.pth", 1250,
                        "e1a6c385d62bf005ded91a54d5ec55c985cfc4103ef89c08d90f39f04934c343"),
    "vit_b": Checkpoint("sam_hq_vit_b.pth", f"{_SAM_HQ}/sam_hq_vit_b.pth", 379,
                        "14a9d662cd6f5a9c2dba6d40ab0058d88d287e4a18fd6fdc6ad5fb1a3fdeaa57"),
    "vit_tiny": Checkpoint("sam_hq_vit_tiny.pth", f"{_SAM_HQ}/sam_hq_vit_tiny.pth", 42.5,
                           "0f32c075ccdd870ae54db2f7630e7a0878ede5a2b06d05d6fe02c65a82fb7196"),
}
GROUNDING_DINO = {
    "swint_ogc": Checkpoint("groundingdino_swint_ogc.pth", f"{_GROUNDING_DINO}/v0.1.0-alpha/groundingdino_swint_ogc.pth",
                            694, "3b3ca2563c77c69f651d7bd133e97139c186df06231157a64c507099c52bc799"),
    "swinb_cogcoor": Checkpoint(
        "groundingdino_swinb_cogcoor.pth", f"{_GROUNDING_DINO}/v0.1.0-alpha2/groundingdino_swinb_cogcoor.pth",
        938, "46270f7a822e6906b655b729c90613e48929d0f2bb8b9b76fd10a856f3ac6ab7"),
}
TEXT_ENCODER = "bert-base-uncased"  # a folder under ckpt/ and the model's name on the hub
TEXT_ENCODER_FILES = (
    Checkpoint(f"{TEXT_ENCODER}/config.json", f"{_BERT}/config.json", 0.001),
    Checkpoint(f"{TEXT_ENCODER}/tokenizer_config.json", f"{_BERT}/tokenizer_config.json", 0.001),
    Checkpoint(f"{TEXT_ENCODER}/vocab.txt", f"{_BERT}/vocab.txt", 0.2,
               "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
    Checkpoint(f"{TEXT_ENCODER}/model.safetensors", f"{_BERT}/model.safetensors", 440,
               "68d45e234eb4a928074dfd868cead0219ab85354cc53d20e772753c6bb9169d3"),
)


def obtain(checkpoint: Checkpoint, folder: Path, download: bool) -> Path:
    """Path of a checkpoint in ``folder``; where it is missing, it is downloaded if that is wanted.

    Raises:
        UserError: it is missing and not to be downloaded, or the download failed.
    """
    path = folder / checkpoint.file
    if path.exists():
        return path
    if not download:
        raise UserError(f"{path} is missing; fetch it with --download ({checkpoint.megabytes:g} MB), or get it from "
                        f"{checkpoint.url} and put it there")
    return fetch(checkpoint, folder)


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
        raise UserError(f"Grounding DINO's text encoder {path} is missing; fetch it with --download, or put the files "
                        f"of {_BERT.removesuffix('/resolve/main')} there") from problem


def fetch(checkpoint: Checkpoint, folder: Path) -> Path:
    """Download a file into ``folder`` under a temporary name, check it, and give it its own name.

    A broken download is continued by the next call. A file whose checksum is not published is checked by its length
    alone, and never continued.

    Raises:
        UserError: no answer, an error status, a connection that broke off, or a wrong checksum.
    """
    path = folder / checkpoint.file
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    if checkpoint.sha256 is None:
        part.unlink(missing_ok=True)
    try:
        _transfer(checkpoint.url, part)
    except urllib.error.HTTPError as problem:
        raise UserError(f"{checkpoint.url} answered {problem.code} {problem.reason}; get {path.name} from elsewhere and "
                        f"put it into {path.parent}") from problem
    except (urllib.error.URLError, ConnectionError, TimeoutError, http.client.HTTPException) as problem:
        raise UserError(f"{checkpoint.url} cannot be reached or broke off ({getattr(problem, 'reason', problem)}); the "
                        f"same command continues, or get the file elsewhere and put it into {path.parent}") from problem
    found = sha256(part)
    if not found.startswith(checkpoint.sha256 or ""):
        part.unlink()
        raise UserError(f"{checkpoint.url} gave a file with SHA-256 {found} where {checkpoint.sha256} was "
                        "expected; it was thrown away, try again or get the file elsewhere")
    os.replace(part, path)
    return path


def sha256(path: Path) -> str:
    """Of a whole file, 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def digest(path: Path) -> str:
    """A digest of a checkpoint's length and of a thousand places in it: tells files apart without reading gigabytes."""
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with open(path, "rb") as handle:
        for place in range(0, max(size, 1), max(size // SAMPLES, SAMPLE)):
            handle.seek(place)
            found.update(handle.read(SAMPLE))
    return found.hexdigest()[:16]


def _transfer(url: str, part: Path) -> None:
    """Append what is missing to ``part``.

    Raises:
        urllib.error.URLError, ConnectionError: the transfer did not reach its end.
    """
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=PATIENCE)
    except urllib.error.HTTPError as problem:
        if problem.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        # Nothing follows what is there: whole, or longer than the file. The latter would never end, so from the start.
        if problem.headers.get("Content-Range") == f"bytes */{have}":
            return
        part.unlink()
        answer, have = urllib.request.urlopen(url, timeout=PATIENCE), 0
    with answer:
        if have and not (answer.headers.get("Content-Range") or "").startswith(f"bytes {have}-"):
            have = 0  # the server does not continue, it starts over
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length is not None else None
        with (open(part, "ab" if have else "wb") as handle,
              ProgressBar(total=total, initial=have, desc=f"download {part.stem}", unit="B", unit_scale=True) as bar):
            while chunk := answer.read(CHUNK):
                handle.write(chunk)
                bar.update(len(chunk))
    if total is not None and part.stat().st_size < total:
        raise ConnectionError(f"{part.stat().st_size} of {total} bytes came")
