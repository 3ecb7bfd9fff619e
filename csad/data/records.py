"""What a stage used and made, kept as JSON beside it: the ground for skipping, resuming, and refusing to mix.

A record is written last, when everything it speaks of is complete, and holds the contents' hashes of what went in and what came
out. Whoever combines two derived files asks `require_current` first.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import csad
from csad.data import files
from csad.errors import UserError, require_version

if TYPE_CHECKING:  # it needs PyTorch, which records do not
    from models.backbone import Backbone

SKIP, SCORE, TRAIN = "skip", "score", "train"
DIGEST = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Record:
    """The record of one stage and category."""

    path: Path  # JSON file beside the outputs
    # Everything that decides the training: settings, seed, backbone, digests of what it reads.
    provenance: dict[str, Any]
    outputs: Sequence[Path]  # files that exist when the stage is done; the checkpoint, if there is one, first
    # What the outputs other than the checkpoint depend on besides: digests of validation and test images.
    scored: dict[str, str] | None = None
    # That of the outputs from which the others are made; its "meta" holds the provenance.
    checkpoint: Path | None = None

    def plan(self, overwrite: bool) -> str:
        """Decide what there is to do: `SKIP`, `SCORE` (from the checkpoint, without training) or `TRAIN`.

        Nothing is taken away: with ``overwrite`` a finished result stays until the new one replaces it.

        Raises:
            UserError: finished work was made with something else, or by someone else and is not complete.
        """
        if overwrite:
            return TRAIN
        present = [path for path in self.outputs if path.exists()]
        record = read_record(self.path) if self.path.exists() else None
        if record is None and len(present) == len(self.outputs) and self._checkpoint_meta() is None:
            return SKIP  # made elsewhere, and used as it is; a checkpoint of ours says that a run was ended before its record
        provenance = as_json(self.provenance)
        if record is not None and (record["used"], record["scored"]) == (provenance, self.scored):
            if record["outputs"] == self._digests():
                return SKIP  # and no checkpoint was opened for it
        made_from = self._checkpoint_made_by()
        if made_from is not None:
            before = as_json({key: made_from.get(key) for key in self.provenance})
            refuse(difference(before, provenance), f"{self.checkpoint} was made")
        elif record is not None and present:
            refuse(difference(record["used"], provenance), f"{self.path.parent} was made")
        return TRAIN if made_from is None else SCORE

    def superseded(self) -> str:
        """Digest of the record that a run with ``--overwrite`` is about to replace; "nothing" if there is none.

        It tells that run's progress from any other's: the record is replaced when the run is complete, and not before.
        """
        return digest(self.path) if self.path.exists() else "nothing"

    def finish(self) -> None:
        """Write the record; every output has to be there."""
        files.write_json(
            self.path, {"used": self.provenance, "scored": self.scored, "outputs": self._digests()}
        )

    def _digests(self) -> dict[str, str | None]:
        return {_name(path): digest(path) if path.exists() else None for path in self.outputs}

    def _checkpoint_made_by(self) -> dict[str, Any] | None:
        if self.checkpoint is None or not self.checkpoint.exists():
            return None
        meta = self._checkpoint_meta()
        if meta is None:
            raise UserError(
                f"{self.checkpoint} does not say what it was made from (published files do not), so "
                "training cannot continue from it; --overwrite starts over, another --workspace keeps both"
            )
        return meta

    def _checkpoint_meta(self) -> dict[str, Any] | None:
        """What the checkpoint says of itself; None for published ones, which say nothing."""
        if self.checkpoint is None:
            return None
        saved = files.read_state(self.checkpoint)
        return saved["meta"] if files.holds(saved, {"state": dict, "meta": dict}) else None


def refuse(changes: Sequence[str], what: str) -> None:
    """UserError that says what differs from the work that is there, ``what`` for example "ckpt/best_cup.pth
    was made"; nothing where all agrees."""
    if changes:
        raise UserError(
            f"{what} with different settings or images ({'; '.join(changes[:4])}); "
            "--overwrite starts over, another --workspace keeps both"
        )


def changes_since(
    unfinished: Mapping[str, Any], provenance: dict[str, Any], superseded: str | None
) -> list[str]:
    """Why a run cannot go on from unfinished work; empty where it can.

    Args:
        unfinished: what the work says of the run that began it: "used", its provenance, and "overwrites", its ``superseded``.
        superseded: `Record.superseded` of a run with ``--overwrite``, which goes on from its own work alone; else None.
    """
    changes = difference(unfinished.get("used", {}), provenance)
    if superseded is not None and unfinished.get("overwrites") != superseded:
        changes.append("begun by another run")
    return changes


def read_record(path: Path) -> dict[str, Any]:
    """A record, with "used", "scored" and "outputs"; UserError if it is missing, or none, or of another
    version."""
    record = files.read_json(path, keys={"used": dict, "scored": (dict, type(None)), "outputs": dict})
    require_version(record["used"], str(path), "run its stage again with --overwrite")
    return record


def inputs(
    train: Sequence[Path], seed: int, backbone: Backbone, stand_ins: Iterable[str] = ()
) -> dict[str, Any]:
    """The fields that every training stage's record has: what it was made from.

    Args:
        train: the category's training images.
        stand_ins: what other than the backbone stood in for the real thing.
    """
    stand_in_backbone = [f"backbone {backbone.name}"] if backbone.is_stand_in else []
    return {
        "format_version": csad.FORMAT_VERSION,
        "seed": seed,
        "backbone": backbone.name,
        "backbone_fingerprint": backbone.fingerprint,
        "train_images": digest_images(train),
        "stand_ins": sorted({*stand_ins, *stand_in_backbone}),
    }


def scored_images(validation: Sequence[Path], test: Mapping[str, Sequence[Path]]) -> dict[str, str]:
    """What a training stage's scores, but not its training, depend on: digests of validation and test images."""
    return {name: digest_images(paths) for name, paths in {"validation": validation, **test}.items()}


def require_current(
    path: Path, expected: Mapping[str, Any], read: Iterable[Path], stage: str
) -> dict[str, Any] | None:
    """Make sure that derived files belong to the data they are about to be combined with.

    Args:
        path: a stage's record.
        expected: what its ``scored`` or ``used`` should say of the data, for example digests of test images.
        read: its outputs that are going to be read.
        stage: the script that makes them anew.

    Returns:
        The record; None where there is none, because the files were made elsewhere.

    Raises:
        UserError: the images have changed since, or a file is not the one that the stage wrote.
    """
    if not path.exists():
        return None
    record = read_record(path)
    provenance = record["used"] | (record["scored"] or {})
    for name, value in expected.items():
        if name in provenance and provenance[name] != value:
            raise UserError(
                f"{path.with_suffix('').name}: the {name.removesuffix('_images')} images are not those that "
                f"{stage} saw; run {stage} again"
            )
    for output in read:
        if record["outputs"].get(_name(output), digest(output)) != digest(output):
            raise UserError(f"{output} is not the file that {stage} wrote; run {stage} again")
    return record


def difference(recorded: dict[str, Any], current: dict[str, Any], prefix: str = "") -> list[str]:
    """Name what differs between two nested dictionaries, as 'lgst.steps: 500 -> 1000'; of digests only that they differ."""
    changes = []
    for key in sorted(recorded.keys() | current.keys()):
        before, now, name = recorded.get(key), current.get(key), f"{prefix}{key}"
        if isinstance(before, dict) and isinstance(now, dict):
            changes += difference(before, now, f"{name}.")
        elif before != now:
            is_digest = any(DIGEST.fullmatch(str(value)) for value in (before, now))
            changes.append(f"{name}: {'contents differ' if is_digest else f'{before} -> {now}'}")
    return changes


def digest(path: Path) -> str:
    """First 16 hex digits of the SHA-256 of a file's content; UserError if there is no such file."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except FileNotFoundError as problem:
        raise UserError(f"{path} is missing") from problem


def digest_images(paths: Sequence[Path]) -> str:
    """A digest of an image list by names and contents: changes when an image comes, goes, or is replaced."""
    return digest_lines(f"{path.name} {digest(path)}" for path in paths)


def digest_lines(lines: Iterable[str]) -> str:
    """First 16 hex digits of the SHA-256 of lines of text."""
    # Names need not be UTF-8.
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def as_json(content: dict[str, Any]) -> dict[str, Any]:
    """The same content as it reads back from JSON (tuples become lists)."""
    return json.loads(json.dumps(content))
