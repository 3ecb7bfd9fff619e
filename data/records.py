"""What a stage used, kept as JSON beside what it made: the ground for skipping, resuming and refusing to mix."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from data import files
from errors import UserError


class Backbone(Protocol):
    """What a record says of a backbone (models.backbone.Backbone)."""

    name: str
    fingerprint: str
    is_stand_in: bool


def inputs(train: Sequence[Path], seed: int, backbone: Backbone, stand_ins: Iterable[str] = ()) -> dict[str, Any]:
    """The fields that every training stage's record has: what it was made from.

    Args:
        train: the category's training images.
        stand_ins: what other than the backbone stood in for the real thing.
    """
    own = [f"backbone {backbone.name}"] if backbone.is_stand_in else []
    return {"seed": seed, "backbone": backbone.name, "backbone_fingerprint": backbone.fingerprint,
            "train_images": digest_images(train), "stand_ins": sorted({*stand_ins, *own})}


def scored(validation: Sequence[Path], test: dict[str, Sequence[Path]]) -> dict[str, str]:
    """What a training stage's scores, but not its training, depend on: digests of validation and test images."""
    return {name: digest_images(paths) for name, paths in {"validation": validation, **test}.items()}


def begin(record: Path, used: dict[str, Any], outputs: Sequence[Path], overwrite: bool,
          progress: Iterable[Path] = (), checkpoint: Path | None = None, scored: dict[str, str] | None = None) -> bool:
    """Decide whether a stage has work to do, and note what it uses.

    Args:
        record: JSON file beside the outputs.
        used: everything that decides the outputs: settings, seed, backbone, digests of what it reads.
        outputs: files that exist when the stage is done.
        overwrite: take away ``outputs``, ``progress`` and the record first.
        progress: files of an unfinished run that must not survive ``overwrite``.
        checkpoint: that of the outputs from which the others are made; its "meta" holds what is in ``used``.
        scored: what the outputs other than the checkpoint depend on besides; where it differs from the record (or the
            record, an older one, does not tell) they are taken away, to be made anew.

    Returns:
        False when every output is there already (made by the same settings, or by others, without a record).

    Raises:
        UserError: the outputs, finished or not, were begun with something else.
    """
    if overwrite:
        for path in (*outputs, *progress, record):
            path.unlink(missing_ok=True)
    outdated = False
    if record.exists():
        noted = files.read_json(record)
        outdated = noted.pop("scored", None) != scored
        _refuse(difference(noted, _as_json(used)), record.parent)
    if not outdated and outputs and all(path.exists() for path in outputs):
        return False
    if checkpoint is not None and checkpoint.exists():
        saved = files.read_state(checkpoint)
        if not (isinstance(saved, dict) and {"state", "meta"} <= saved.keys()):
            raise UserError(f"{checkpoint} does not say what it was made from (published files do not), so it cannot be "
                            "gone on from; --overwrite starts over, another --workspace keeps both")
        _refuse(difference(_as_json({key: saved["meta"].get(key) for key in used}), _as_json(used)), checkpoint)
    if outdated:
        for path in outputs:
            if path != checkpoint:
                path.unlink(missing_ok=True)
    files.write_json(record, used if scored is None else used | {"scored": scored})
    return True


def _refuse(changes: list[str], place: Path) -> None:
    if changes:
        raise UserError(f"{place} holds work begun with something else ({'; '.join(changes[:4])}); "
                        "--overwrite starts over, another --workspace keeps both")


def difference(used: dict, wanted: dict, prefix: str = "") -> list[str]:
    """Name what differs between two nested dictionaries, as 'lgst.steps: 500 -> 1000'."""
    changes = []
    for key in sorted(used.keys() | wanted.keys()):
        before, now, name = used.get(key), wanted.get(key), f"{prefix}{key}"
        if isinstance(before, dict) and isinstance(now, dict):
            changes += difference(before, now, f"{name}.")
        elif before != now:
            changes.append(f"{name}: {before} -> {now}")
    return changes


def digest(path: Path) -> str:
    """First 16 hex digits of a file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def digest_images(paths: Sequence[Path]) -> str:
    """A digest of an image list by names and file sizes: cheap, and changes when images come or go."""
    listing = "\n".join(f"{path.name} {path.stat().st_size}" for path in paths)
    return hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()[:16]  # names need not be UTF-8


def _as_json(content: dict[str, Any]) -> dict[str, Any]:
    """The same content as it reads back from JSON (tuples become lists)."""
    return json.loads(json.dumps(content))
