"""What there is to say of a category: lines, notes, warnings and errors, collected while it is checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from csad.errors import UserError

MAX_LISTED = 5  # files named in one message; the others are counted
Result = TypeVar("Result")


@dataclass
class Findings:
    """What there is to say of one category, in the order of printing."""

    lines: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def collect_errors(self, call: Callable[[], Result]) -> Result | None:
        """What ``call`` returns; None where it raises a UserError, which is noted once."""
        try:
            return call()
        except UserError as problem:
            if str(problem) not in self.errors:
                self.errors.append(str(problem))
            return None


def some_of(names: Sequence[str]) -> str:
    """The first `MAX_LISTED` names, and how many there are besides."""
    rest = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def file_names(root: Path, paths: Sequence[Path]) -> str:
    """`some_of` the files' names, from ``root`` on."""
    return some_of([str(path.relative_to(root)) for path in paths])
