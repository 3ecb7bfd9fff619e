"""Reading and writing files: whole or not at all, and never by unpickling.

Everything is first encoded in memory, then written under a temporary name in the same folder and renamed. A crash, a full
disk or Ctrl-C therefore leaves either the old file or the new one. A file has one writer at a time: whoever writes to a
workspace or an output folder holds its lock.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from csad.errors import DAMAGED, UserError

import numpy as np
from PIL import Image

# How formulas begin in spreadsheets (OWASP's list, full-width letters included).
_FORMULA = re.compile(r"'*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
Fields = Mapping[str, type | tuple[type, ...]]  # names and types of values
MAKE_AGAIN, MEND = "delete it and make it again", "fix it or delete it"


def path_argument(text: str) -> Path:
    """A file or folder from the command line; ~ is the home folder, also where the shell leaves it alone.
    argparse.ArgumentTypeError if the text is empty, which Path takes for the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path; is a variable of the shell not set?")
    return Path(text).expanduser()


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write ``data`` to ``path`` atomically, making its folder first."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")  # always the same: what a killed run left is written over
    try:
        with open(temporary, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as problem:
        # A full disk reports no file name of its own when write() fails.
        problem.filename = problem.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8; bytes of file names that are not UTF-8 are written as \\udcXX."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON, which has neither NaN nor infinity: null stands for them."""
    write_text(path, json.dumps(_without_nan(content), indent=1) + "\n")


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def to_csv_text(text: str) -> str:
    """A text as a cell of a CSV file that spreadsheets take for no formula: with ' before what begins like one."""
    return f"'{text}" if _FORMULA.match(text) else text


def from_csv_text(cell: str) -> str:
    """What `to_csv_text` was given."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def read_scores(path: str | Path) -> dict[str, float]:
    """Scores by image, of a CSV file with these columns; UserError if the file is missing, lacks a column, or
    holds something else than finite numbers."""
    with _named_mistakes(path), open(path, newline="", encoding="utf-8") as handle:
        table = csv.DictReader(handle)
        if not {"image", "score"} <= set(table.fieldnames or ()):
            raise ValueError("it does not hold image, score")
        scores = {from_csv_text(row["image"]): float(row["score"]) for row in table}
        if not all(map(math.isfinite, scores.values())):
            raise ValueError("it holds numbers that are not finite")
        return scores


def write_image(path: str | Path, image: np.ndarray) -> None:
    """Write an 8-bit image, (H, W) grey or (H, W, 3) RGB, in the format that the file name asks for."""
    if Path(path).suffix.lower() in (".jpg", ".jpeg"):
        _write(path, partial(Image.fromarray(image).save, format="JPEG", quality=95))
    else:
        _write(path, partial(Image.fromarray(image).save, format="PNG", compress_level=3))


def _write(path: str | Path, save: Callable[[io.BytesIO], object]) -> None:
    """Write what ``save`` writes into an open file."""
    buffer = io.BytesIO()
    save(buffer)
    write_bytes(path, buffer.getvalue())


def write_array(path: str | Path, array: np.ndarray) -> None:
    _write(path, lambda file: np.save(file, array, allow_pickle=False))


def write_arrays(path: str | Path, **arrays: np.ndarray) -> None:
    """Write an uncompressed .npz."""
    by_name: dict[str, Any] = arrays  # any of them might be savez's own allow_pickle, say NumPy's hints
    _write(path, lambda file: np.savez(file, **by_name))


def write_state(path: str | Path, state: Any) -> None:
    """Write tensors and plain Python values with torch.save, so that ``read_state`` can read them back."""
    import torch  # only here: scoring with an exported model works without it

    _write(path, partial(torch.save, state))


def read_json(path: str | Path, advice: str = MAKE_AGAIN, keys: Sequence[str] | Fields = ()) -> Any:
    """Read what a stage wrote or, with other ``advice``, what a person did.

    Args:
        keys: what it has to hold, if it is a mapping; with the values' types, if these are given.

    Raises:
        UserError: the file is missing, no JSON, lacks a key, or has a value of another type; ends with the advice.
    """
    with _named_mistakes(path, advice):
        content = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_without_repetition)
        if keys and not holds(content, keys if isinstance(keys, Mapping) else dict.fromkeys(keys, object)):
            raise ValueError(f"it does not hold {', '.join(keys)}")
        return content


def holds(content: Any, fields: Fields) -> bool:
    """Whether this is a mapping with such values."""
    return isinstance(content, dict) and all(
        name in content and isinstance(content[name], kind) for name, kind in fields.items()
    )


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; Python's reader would drop all but the last of equal keys."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} occurs twice")
    return content


def read_array(path: str | Path) -> np.ndarray:
    with _named_mistakes(path):
        return _finite(np.load(path, allow_pickle=False))


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    with _named_mistakes(path), np.load(path, allow_pickle=False) as archive:
        return {name: _finite(archive[name]) for name in archive.files}


def _finite(array: np.ndarray) -> np.ndarray:
    """No stage writes other numbers, and comparing with one would call everything normal."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError("it holds numbers that are not finite")
    return array


def read_state(path: str | Path) -> Any:
    """Read tensors and plain values on the CPU; a file that holds anything executable is refused."""
    import torch

    with _named_mistakes(path):
        return torch.load(path, map_location="cpu", weights_only=True)


def load_checkpoint(module: Any, path: str | Path) -> dict[str, Any]:
    """Load the weights of a stage's checkpoint into ``module``; returns all that the file holds. UserError if
    the file is damaged, or holds another network, or weights that are not finite."""
    saved = read_state(path)
    try:
        module.load_state_dict(saved["state"])
    except (KeyError, RuntimeError) as problem:
        raise UserError(
            f"{path} does not hold the network that these settings describe; --overwrite trains it anew"
        ) from problem
    if not all(values.isfinite().all() for values in module.state_dict().values()):
        raise UserError(f"{path} holds weights that are not finite; --overwrite trains it anew")
    return saved


def require(path: str | Path, made_by: str) -> Path:
    """``path`` if it exists; else a UserError that names it and what makes it."""
    if not Path(path).exists():
        raise UserError(f"{path} is missing; run {made_by} first")
    return Path(path)


@contextmanager
def _named_mistakes(path: str | Path, advice: str = MAKE_AGAIN) -> Iterator[None]:
    """Turn the many ways in which a damaged file fails to parse into one sentence that names it."""
    try:
        yield
    except FileNotFoundError as problem:
        raise UserError(f"{path} is missing") from problem
    except DAMAGED as problem:
        reason = (str(problem).splitlines() or [type(problem).__name__])[0].split(".")[0]
        raise UserError(f"{path} cannot be read ({reason}); {advice}") from problem
