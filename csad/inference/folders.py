"""Folders of images to score: what lies in them, and that one run at a time writes its verdicts."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from csad.data.files import place
from csad.data.image_files import SUFFIXES
from csad.data.listing import reason_to_skip
from csad.data.locks import FileLock, LockHeld
from csad.errors import UserError

State = tuple[int, int]  # bytes and time of change of a file
NO_STATE: State = (
    0,
    0,
)  # of what cannot be looked at: links to nothing, pipes, folders that cannot be listed


def place_or_url(text: str) -> Path | str:
    """An argument that names images: a path, or a URL as it is."""
    return text if is_url(text) else place(text)


def is_url(text: Path | str) -> bool:
    return isinstance(text, str) and "://" in text


class Found:
    """The named files, and all images in the named folders, sorted; what lies in ``output`` is our own.

    Attributes:
        images: to be scored.
        left_out: files in the folders that are no images.

    Raises:
        UserError: a place does not exist, or is a URL.
    """

    def __init__(self, places: Sequence[Path | str], output: Path):
        self.places, self.images, self.left_out = places, [], []
        for one in places:
            if is_url(one):
                raise UserError(f"{one} is a URL, and those are read with --ray only: --ray local")
            if not one.exists() and not one.is_symlink():
                raise UserError(f"there is no {one}; name an image or a folder of images")
            if one.is_dir():
                listed, others = images_in(one, output)
                self.images += list(listed)
                self.left_out += others
            else:
                self.images.append(one)
        self.images = list(dict.fromkeys(self.images))  # a file named beside its folder is scored once

    def require_images(self) -> None:
        """Raises UserError where there is no image."""
        if not self.images:
            raise no_images(self.places)


def no_images(places: Sequence[Path | str]) -> UserError:
    return UserError(
        f"no images in {', '.join(map(str, places))}; expected files ending in {', '.join(SUFFIXES)}"
    )


def images_in(folder: Path, output: Path) -> tuple[dict[Path, State], list[Path]]:
    """All images below a folder with their states, sorted by path, and all other files; links are followed, once each.

    What cannot be looked at, folders too, is listed with `NO_STATE`, so that nobody takes it for judged.
    """
    own = output.resolve()
    found, others, seen = {}, [], set()

    def note(problem: OSError) -> None:
        if not isinstance(problem, FileNotFoundError):  # taken away since
            found[Path(problem.filename)] = NO_STATE

    for here, below, names in os.walk(folder, onerror=note, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # a link back to where we have been
            below[:] = []
            continue
        seen.add(real)
        below[:] = sorted(
            name
            for name in below
            if not reason_to_skip(name)
            and (Path(here) / name).resolve() != own
            and not is_ours(Path(here) / name)
        )
        for name in sorted(names):
            path = Path(here) / name
            if reason_to_skip(name) or name in ("predictions.csv", "predictions.jsonl"):
                continue
            if not name.lower().endswith(SUFFIXES):
                others.append(path)
                continue
            try:
                status = path.stat()
            except OSError as problem:
                if isinstance(problem, FileNotFoundError) and not path.is_symlink():  # taken away since
                    continue
                found[path] = NO_STATE
            else:
                state = status.st_size, status.st_mtime_ns
                found[path] = state if stat.S_ISREG(status.st_mode) else NO_STATE
    return dict(sorted(found.items())), others


def identity(folder: Path) -> tuple[int, int] | None:
    """Tells a folder from another one at its path, like a share from its mount point; None: it cannot be listed."""
    try:
        with os.scandir(folder):
            status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def is_ours(folder: Path) -> bool:
    """Whether a folder holds the drawings of an earlier run."""
    return folder.name == "maps" and (folder.parent / "predictions.jsonl").exists()


def only_writer(folder: Path) -> FileLock:
    """Hold an output folder, which is made if need be, until the end of a ``with`` block or the lock's release.

    Raises:
        UserError: another run writes there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(folder / ".predict.lock").acquire()
    except LockHeld as problem:
        raise UserError(
            f"another predict.py is writing to {folder.resolve()} ({problem.owner}); give this one an --output of "
            "its own"
        ) from problem
