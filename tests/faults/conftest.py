"""The workspace from which rows start: one tiny finished run, made once per worker."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.faults import contents, finish
from faults.row import TEST


class Finished(NamedTuple):
    folder: Path
    files: dict[str, bytes]  # `contents` of the folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Finished:
    root = tmp_path_factory.mktemp("faults")
    stages, _ = finish(root / "stages")
    folder = stages[-1].rename(root / "finished")
    shutil.rmtree(root / "stages")
    (folder / "photos").mkdir()
    for name in ("000.png", "001.png"):
        shutil.copy(folder / TEST / name, folder / "photos")
    return Finished(folder, contents(folder))
