"""What lies in folders: walked in sorted order with links followed, and names for what is found."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path

from csad.data.image_files import SUFFIXES

LONGEST_KEY = 220  # bytes: file systems take 255, of which what is made from an image adds up to 30
CLUTTER = "made by the operating system"
_CLUTTER = frozenset(
    {
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "icon\r",
        "@eadir",
        "__macosx",
        "$recycle.bin",
        "system volume information",
        "lost+found",
    }
)
RESERVED_KEYS = frozenset({"info", "test_seg_output"})  # folders beside those that carry images' names

Unused = list[tuple[Path, str]]  # what is left out, and why


def short_name(name: str, longest: int) -> str:
    """A file name of at most ``longest`` bytes: as it is, or its beginning and a hash of all of it."""
    encoded = os.fsencode(name)
    if len(encoded) <= longest:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:12]
    return f"{encoded[: longest - 13].decode(errors='ignore')}-{digest}"


def reason_to_skip(name: str) -> str | None:
    """Why a file or folder is no part of a data set, as far as its name alone tells."""
    return "hidden" if name.startswith(".") else CLUTTER if name.lower() in _CLUTTER else None


def unique_names(images: Sequence[Path], base: Path) -> dict[Path, str]:
    """Names for the images of one list: unique, independent of their order, of at most `LONGEST_KEY` bytes."""
    parts_of = {path: path.relative_to(base).parts for path in images}
    short = {path: "_".join((*parts[:-1], path.stem)) for path, parts in parts_of.items()}
    whole = {path: "_".join(parts) for path, parts in parts_of.items()}
    times = Counter(short.values())
    keys = {path: key for path, key in short.items() if times[key] == 1 and key not in RESERVED_KEYS}
    taken = Counter(keys.values())
    ambiguous = [path for path in images if path not in keys]
    taken.update(whole[path] for path in ambiguous)
    for path in ambiguous:
        digest = hashlib.sha256("/".join(parts_of[path]).encode(errors="surrogateescape")).hexdigest()[:8]
        is_unique = taken[whole[path]] == 1 and whole[path] not in RESERVED_KEYS
        keys[path] = whole[path] if is_unique else f"{whole[path]}-{digest}"
    return {path: short_name(key, LONGEST_KEY) for path, key in keys.items()}


def walk(folder: Path, flat: bool = False) -> tuple[list[Path], Unused]:
    """The images in a folder and, unless ``flat``, in those within, sorted; and what there is besides. Links are followed."""
    images: list[Path] = []
    unused: Unused = []
    home = folder.resolve()
    seen = {target: target for target in (home, *home.parents)}
    pending = deque([folder])
    while pending:
        with os.scandir(pending.popleft()) as listing:
            entries = sorted(listing, key=lambda entry: (entry.is_symlink(), entry.name))
        for entry in entries:
            path, link = Path(entry.path), entry.is_symlink()
            is_folder = path.is_dir() if link else entry.is_dir()
            suffix = path.suffix.lower()
            if reason := reason_to_skip(entry.name):
                unused.append((path, reason))
            elif is_folder and flat:
                unused.append((path, "a folder beside the images"))
            elif is_folder:
                target = path.resolve()
                if target in seen:
                    unused.append((path, f"leads to {seen[target]} once more"))
                else:
                    seen[target] = path
                    # Links last: a folder that is also linked to counts under its own name.
                    pending.append(path) if link else pending.appendleft(path)
            elif link and not path.is_file():
                unused.append((path, "a link to a missing file"))
            elif suffix not in SUFFIXES:
                unused.append((path, f"not a supported image format ({suffix or 'no suffix'})"))
            elif not entry.is_file():
                unused.append((path, "not a regular file"))
            elif not (flat and entry.name == "roi.png"):
                images.append(path)
    return sorted(images), unused


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, links after the rest; nothing where there is no folder."""
    if not folder.is_dir():
        return []
    return sorted(folder.iterdir(), key=lambda path: (path.is_symlink(), path.name))


def subfolders(folder: Path) -> list[str]:
    return sorted(path.name for path in entries(folder) if path.is_dir() and not reason_to_skip(path.name))


def image_files(folder: Path) -> list[Path]:
    named = [path for path in entries(folder) if path.suffix.lower() in SUFFIXES]
    return sorted(path for path in named if not reason_to_skip(path.name) and path.is_file())


def count(number: int, thing: str) -> str:
    """A number of things: 1 image, 2 images, 3 categories, 0 ROC curves; also of one that is described: 1 good picture."""
    if number == 1:
        return f"{number} {thing}"
    return f"{number} {thing[:-1]}ies" if thing.endswith("y") else f"{number} {thing}s"
