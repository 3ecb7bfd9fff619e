"""A row of the table: a copy of a finished run that is damaged, a command, what it says. Where files lie."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.faults import CATEGORY, MODEL, OVERWRITABLE
from faults.preparations import Prepare, remove

# A finished run holds data/ (one rendered category), work/ (the workspace), out/ (predict.py's) and photos/
# (two good pictures); home/ is the home folder.
DATA, CKPT = f"data/{CATEGORY}", "work/ckpt"
TRAIN, VALIDATION, TEST = (f"{DATA}/{part}/good" for part in ("train", "validation", "test"))
SCORES, MASKS = f"work/anomaly_score/{CATEGORY}", f"work/datasets/masks/{CATEGORY}"
TORCH, ONNX, XML = MODEL, f"{CKPT}/onnx_models/{CATEGORY}.onnx", f"{CKPT}/openvino_models/{CATEGORY}.xml"
LGST, MEMORY = f"{CKPT}/best_{CATEGORY}", f"{CKPT}/memory_{CATEGORY}"
SEGMENTOR = f"{CKPT}/segmentor_{CATEGORY}_256"

# Commands; tables add options.
PREDICT, SERVE = "predict photos", f"serve --model {TORCH}"
OVERWRITING = [f"{script} --overwrite" for script in OVERWRITABLE]
LATER = ["export_model", "benchmark_performance", "report"]


@dataclass(frozen=True)
class Row:
    """A bad input.

    Attributes:
        command: script and options; those of `benchmarks.faults` come before them, so that these count.
        said: what stdout or stderr has to hold.
        prepared: what is done to the copy before.
        status: with which the command ends.
        inside: called in the command's process before the script.
        rewrites: how the names of files begin that may change.
    """

    name: str
    command: str
    said: str
    prepared: tuple[Prepare, ...]
    status: int
    inside: Callable[[], None] | None
    rewrites: tuple[str, ...]


def rows(
    name: str,
    commands: str | Iterable[str],
    said: str,
    *prepared: Prepare,
    status: int = 2,
    inside: Callable[[], None] | None = None,
    rewrites: Iterable[str] = (),
) -> list[Row]:
    """One row for each command."""
    return [
        Row(name, command, said, prepared, status, inside, tuple(rewrites))
        for command in ([commands] if isinstance(commands, str) else commands)
    ]


def without_records(*names: str) -> list[Prepare]:
    """As if the files had come from elsewhere: only their contents can tell then."""
    return [remove(f"{name}.json") for name in names]
