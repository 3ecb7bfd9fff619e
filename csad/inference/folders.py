"""Folders of images to score: what lies in them, and that one run at a time writes its verdicts."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from csad.data.files import path_argument
from csad.data.image_files import SUFFIXES
from csad.data.listing import reason_to_skip
from csad.data.locks import FileLock, LockHeld
from csad.errors import UserError

State = tuple[int, int]  # bytes and time of change of a file
# Of what cannot be read: links to nothing, pipes, folders that cannot be listed.
NO_STATE: State = (0, 0)


def path_or_url(text: str) -> Path | str:
    """An argument that names images: a path, or a URL as it is."""
    return text if is_url(text) else path_argument(text)


def is_url(text: Path | str) -> bool:
    return isinstance(text, str) and "://" in text


def input_images(paths: Sequence[Path | str], output: Path) -> tuple[list[Path], list[Path]]:
    """The named files and all images in the named folders, sorted; what lies in ``output`` is our own.

    Returns:
        The images, each once, and the files in the folders that are not images.

    Raises:
        UserError: a path does not exist, or is a URL.
    """
    images: dict[Path, None] = {}  # a file named beside its folder is scored once
    left_out: list[Path] = []
    for path in paths:
        if isinstance(path, str):
            raise UserError(f"{path} is a URL, and those are read with --ray only: --ray local")
        if not path.exists() and not path.is_symlink():
            raise UserError(f"there is no {path}; name an image or a folder of images")
        in_folder, not_images = images_in(path, output) if path.is_dir() else ({path: NO_STATE}, [])
        images |= dict.fromkeys(in_folder)
        left_out += not_images
    return list(images), left_out


def no_images(paths: Sequence[Path | str]) -> UserError:
    """What to say where there is no image at these paths."""
    return UserError(
        f"no images in {', '.join(map(str, paths))}; expected files ending in {', '.join(SUFFIXES)}"
    )


def images_in(folder: Path, output: Path) -> tuple[dict[Path, State], list[Path]]:
    """All images below a folder with their states, sorted by path, and all other files; links are followed, once each.

    What cannot be read, folders too, is listed with `NO_STATE`, so that it does not pass for judged.
    """
    own = output.resolve()
    states, left_out, seen = {}, [], set()

    def note(problem: OSError) -> None:
        if not isinstance(problem, FileNotFoundError):  # taken away since
            states[Path(problem.filename)] = NO_STATE

    for here, below, names in os.walk(folder, onerror=note, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # a link back to where we have been
            below[:] = []
            continue
        seen.add(real)
        folders = [Path(here) / name for name in sorted(below) if not reason_to_skip(name)]
        below[:] = [path.name for path in folders if path.resolve() != own and not is_ours(path)]
        for name in sorted(names):
            path = Path(here) / name
            if reason_to_skip(name) or name in ("predictions.csv", "predictions.jsonl"):
                continue
            if not name.lower().endswith(SUFFIXES):
                left_out.append(path)
                continue
            try:
                status = path.stat()
            except OSError as problem:
                if isinstance(problem, FileNotFoundError) and not path.is_symlink():  # taken away since
                    continue
                states[path] = NO_STATE
            else:
                state = status.st_size, status.st_mtime_ns
                states[path] = state if stat.S_ISREG(status.st_mode) else NO_STATE
    return dict(sorted(states.items())), left_out


def identity(folder: Path) -> tuple[int, int] | None:
    """What distinguishes a folder from another at its path, like a share from its mount point; None: it cannot be listed."""
    try:
        with os.scandir(folder):
            status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def is_ours(folder: Path) -> bool:
    """Whether a folder holds the drawings of an earlier run."""
    return folder.name == "maps" and (folder.parent / "predictions.jsonl").exists()


def state_of(path: Path) -> dict[str, int | None]:
    """What tells whether a file is still the one that was scored: its length and time of change, None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return {"bytes": None, "changed_ns": None}
    return {"bytes": status.st_size, "changed_ns": status.st_mtime_ns}


def only_writer(folder: Path) -> FileLock:
    """Hold an output folder, which is made if need be, until the end of a ``with`` block or the lock's
    release; UserError if another run writes there."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(folder / ".predict.lock").acquire()
    except LockHeld as problem:
        raise UserError(
            f"another predict.py is writing to {folder.resolve()} ({problem.owner}); give this one an --output of "
            "its own"
        ) from problem
