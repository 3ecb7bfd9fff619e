"""Verdicts kept as JSON lines, one file a day."""

from __future__ import annotations

import errno
import json
import mmap
import os
import threading
from datetime import date, datetime
from io import FileIO
from pathlib import Path
from typing import Any

from csad.data.locks import FileLock, LockHeld
from csad.errors import UserError


class DailyLog:
    """Appends to NAME-YYYY-MM-DD.jsonl beside the named file, by the local date; held by one process at a time.

    Every line is with the operating system before `write` returns, so that kill -9 loses nothing; a line that a crash of the
    machine cut off is taken away when the file is opened again.

    Args:
        path: NAME.jsonl.

    Raises:
        UserError: another process writes there.
    """

    def __init__(self, path: Path):
        self.path = path
        self._day: date | None = None
        self._file: FileIO | None = None
        self._writing = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = FileLock(path.with_name(f".{path.name}.lock")).acquire()
        except LockHeld as problem:
            raise UserError(
                f"another process is writing to {path} ({problem.owner}); give this one a --log of its own"
            ) from problem

    def write(self, entry: dict[str, Any]) -> None:
        """Append one line, "time" first. Raises OSError."""
        with self._writing:
            now = datetime.now().astimezone()
            file = self._file_of(now.date())
            line = json.dumps(
                {"time": now.isoformat(timespec="milliseconds")} | entry, ensure_ascii=False, allow_nan=False
            )
            content = line.encode("utf-8", errors="backslashreplace") + b"\n"
            before = os.fstat(file.fileno()).st_size
            try:
                if file.write(content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(before)  # no half lines
                raise

    def close(self) -> None:
        with self._writing:
            self._close_file()
            self._lock.release()

    def _file_of(self, day: date) -> FileIO:
        if self._file is None or day != self._day:
            self._close_file()
            path = self.path.with_name(f"{self.path.stem}-{day.isoformat()}{self.path.suffix}")
            if path.exists():
                _drop_torn_line(path)
            self._file, self._day = FileIO(path, "a"), day
        return self._file

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _drop_torn_line(path: Path) -> None:
    """Cut a file after its last line feed."""
    if not path.stat().st_size:
        return  # and cannot be mapped
    with open(path, "r+b") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            keep = content.rfind(b"\n") + 1
        file.truncate(keep)
