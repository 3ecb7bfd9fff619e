"""Published files, most of them weights: how they are fetched, continued where a download broke off, and checked."""

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
    """A published file."""

    file: str  # its name under ckpt/
    url: str  # where it is published
    megabytes: float  # its size
    # Of the whole file, where it is published; or the first digits of that, which some files bear in their
    # name.
    sha256: str | None = None


def obtain(checkpoint: Checkpoint, folder: Path, download: bool) -> Path:
    """Path of a checkpoint in ``folder``; where it is missing, it is downloaded if that is wanted. UserError
    if it is missing and not to be downloaded, or the download failed."""
    path = folder / checkpoint.file
    if path.exists():
        return path
    if not download:
        raise UserError(
            f"{path} is missing; fetch it with --download ({checkpoint.megabytes:g} MB), or get it from "
            f"{checkpoint.url} and put it there"
        )
    return fetch(checkpoint, folder)


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
        raise UserError(
            f"{checkpoint.url} answered {problem.code} {problem.reason}; get {path.name} from elsewhere and "
            f"put it into {path.parent}"
        ) from problem
    except (urllib.error.URLError, ConnectionError, TimeoutError, http.client.HTTPException) as problem:
        raise UserError(
            f"{checkpoint.url} cannot be reached or broke off ({getattr(problem, 'reason', problem)}); the "
            f"same command continues, or get the file elsewhere and put it into {path.parent}"
        ) from problem
    fetched = sha256(part)
    if not fetched.startswith(checkpoint.sha256 or ""):
        part.unlink()
        raise UserError(
            f"{checkpoint.url} gave a file with SHA-256 {fetched} where {checkpoint.sha256} was "
            "expected; it was thrown away, try again or get the file elsewhere"
        )
    os.replace(part, path)
    return path


def sha256(path: Path) -> str:
    """SHA-256 of a whole file, 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def digest(path: Path) -> str:
    """A digest of a checkpoint's length and of a thousand samples of it: tells files apart without reading gigabytes."""
    size = path.stat().st_size
    sample_digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as handle:
        for position in range(0, max(size, 1), max(size // SAMPLES, SAMPLE)):
            handle.seek(position)
            sample_digest.update(handle.read(SAMPLE))
    return sample_digest.hexdigest()[:16]


def _transfer(url: str, part: Path) -> None:
    """Append what is missing to ``part``; urllib.error.URLError, ConnectionError if the transfer did not
    reach its end."""
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
        what = f"download {part.stem}"
        with (
            open(part, "ab" if have else "wb") as handle,
            ProgressBar(total=total, initial=have, desc=what, unit="B", unit_scale=True) as bar,
        ):
            while chunk := answer.read(CHUNK):
                handle.write(chunk)
                bar.update(len(chunk))
    if total is not None and part.stat().st_size < total:
        raise ConnectionError(f"{part.stat().st_size} of {total} bytes came")
