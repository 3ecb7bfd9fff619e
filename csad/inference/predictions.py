"""predictions.csv, predictions.jsonl and maps/: what predict.py writes of each image."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from csad.branches import BRANCHES
from csad.data import files
from csad.data.listing import short_name
from csad.errors import UNUSABLE, UserError
from csad.inference.folders import State, only_writer, state_of
from csad.inference.verdicts import VERDICTS, Verdict, printable

MAX_NAME = 242  # bytes of a name before ".map.png", with which and a temporary name's 5 it has 255
COLUMNS = (
    "image",
    "verdict",
    "score",
    "threshold",
    *(f"{branch}_contribution" for branch in BRANCHES),
    "unusual_x",
    "unusual_y",
    "findings",
    "note",
)


def common_folder(inputs: Sequence[Path]) -> Path:
    """The folder from which on the pictures of all folders and images lie below maps/ as they do there.

    UserError if they lie on several drives of Windows, which have none.
    """
    folders = [os.path.abspath(path if path.is_dir() else path.parent) for path in inputs]
    try:
        return Path(os.path.commonpath(folders))
    except ValueError as problem:
        raise UserError("the images lie on several drives; score those of one drive at a time") from problem


def as_line(verdict: Verdict, state: dict[str, int | None]) -> str:
    """A line of predictions.jsonl."""
    return json.dumps(verdict.as_json() | state, ensure_ascii=False, allow_nan=False) + "\n"


class Output:
    """predictions.csv, predictions.jsonl and maps/, written line by line, so that a line once printed is on the disk.

    Args:
        folder: made if need be; held by one run at a time.
        top: see `common_folder`.
        go_on: append to the tables of an earlier run instead of replacing them.

    Attributes:
        scored: the states of the files that an earlier run scored, by name.
        counts: of each verdict, what this run wrote.

    Raises:
        UserError: another run writes there.
    """

    def __init__(self, folder: Path, top: Path, go_on: bool = False):
        self.folder, self.top, self.go_on = folder, top, go_on
        self.table = folder / "predictions.csv"
        self.scored: dict[str, State] = {}
        self.counts = dict.fromkeys(VERDICTS, 0)

    def __enter__(self) -> Output:
        self.lock = only_writer(self.folder)
        log = self.table.with_suffix(".jsonl")
        mode = "a" if self.go_on and log.exists() else "w"
        if mode == "a":
            self._read_log(log)
            self._drop_torn_row()
        self.csv = open(self.table, mode, newline="", encoding="utf-8", errors="backslashreplace")
        self.lines = open(log, mode, encoding="utf-8", errors="backslashreplace")
        self.rows = csv.writer(self.csv, lineterminator="\n")
        if not self.csv.tell():
            self.rows.writerow(COLUMNS)
        return self

    def _drop_torn_row(self) -> None:
        """Take away a last row that a crash or a full disk cut off: the next one would be appended to it."""
        content = self.table.read_bytes() if self.table.exists() else b""
        whole = content.rfind(b"\n") + 1
        while content.count(b'"', 0, whole) % 2:  # within a cell
            whole = content.rfind(b"\n", 0, whole - 1) + 1
        if whole < len(content):
            files.write_bytes(self.table, content[:whole])

    def _read_log(self, log: Path) -> None:
        """What was scored; a last line that a crash cut off goes, and its image is scored again."""
        content = log.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            files.write_bytes(log, whole)
        for line in whole.splitlines():
            try:
                entry = json.loads(line)
                self.scored[entry["image"]] = (entry["bytes"], entry["changed_ns"])
            except (ValueError, KeyError, TypeError):
                continue

    def __exit__(self, *_: object) -> None:
        self.csv.close()
        self.lines.close()
        self.lock.release()

    def write(self, verdict: Verdict) -> None:
        path, captioned = Path(verdict.name), verdict.captioned_drawing
        if captioned is not None:
            name = Path(os.path.abspath(path)).relative_to(self.top)
            drawing = f"{short_name(name.name, MAX_NAME)}.map.png"
            try:
                files.write_image(self.folder / "maps" / name.with_name(drawing), captioned)
            except OSError as problem:
                if problem.errno not in UNUSABLE:
                    raise
                print(
                    f"there is no drawing of {printable(str(verdict.name))}: {problem.strerror}",
                    file=sys.stderr,
                )
        contributions = verdict.contributions or {}
        numbers = [verdict.score, verdict.threshold, *(contributions.get(branch) for branch in BRANCHES)]
        self.rows.writerow(
            [
                files.to_csv_text(str(verdict.name)),
                verdict.verdict,
                *("" if value is None else f"{value:.6g}" for value in numbers),
                *(verdict.unusual or ("", "")),
                files.to_csv_text("; ".join(verdict.findings)),
                files.to_csv_text(verdict.note),
            ]
        )
        self.lines.write(as_line(verdict, state_of(path)))
        self.csv.flush()
        self.lines.flush()
        self.counts[verdict.verdict] += 1
        print(verdict, flush=True)
