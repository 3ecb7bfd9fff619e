"""Score pictures with an exported file in a process of its own: what the file gives whoever opens it next.

In the process that made it, a model can look right by chance: what a runtime reads beyond what it wrote is then often zero.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from csad.errors import UserError, user_message
from csad.inference.engines import read_for
from csad.inference.runtimes import open_model
from csad.progress import ProgressBar

import numpy as np

# What glibc fills fresh memory with, where it is not told otherwise: a runtime that reads such memory is found out.
MEMORY_IS_FILLED = {"MALLOC_PERTURB_": "170"}

WITH_MAPS = ("branch_scores", "anomaly_map", "label_map")


class Scored(NamedTuple):
    """What an exported model says about pictures, of which n were scored with maps; K branches, see `models.prediction`."""

    scores: np.ndarray  # (N,), of all; not always finite, as the next three
    score: np.ndarray  # (n,)
    # (n, K); None: the model was exported without maps and gives the score alone.
    branch_scores: np.ndarray | None
    anomaly_map: np.ndarray | None  # (n, 64, 64), the same way
    label_map: np.ndarray | None  # (n, 256, 256) uint8, the same way
    metadata: dict[str, Any]
    networks: dict[str, str]  # in which precision they ran, `csad.inference.engines.Engine.networks`
    device: str  # on which


def score(
    model: Path, pictures: Sequence[Path], with_maps: Sequence[int], device: str, description: str
) -> Scored:
    """Open an exported model in a new process, as `open_model` does, and let it score pictures one by one.

    Args:
        pictures: read there as the model's metadata says, (N,).
        with_maps: indices of those to score with maps, (n,), rising.
        description: of the progress bar.

    Raises:
        UserError: the model cannot be opened, a picture cannot be read, or the process ended without an answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        request: dict[str, Any] = {
            "model": str(model.resolve()),
            "pictures": [str(path.resolve()) for path in pictures],
            "device": device,
            "with_maps": list(with_maps),
            "description": description,
            "answer": str(Path(folder) / "answer.npz"),
        }
        paths = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps(request),
            text=True,
            env=MEMORY_IS_FILLED | os.environ | {"PYTHONPATH": paths},
        )
        if done.returncode or not Path(request["answer"]).exists():
            raise UserError(
                f"the exported model {model.name} could not be scored with: its process ended with status "
                f"{done.returncode}; export it again, with another --precision where this repeats itself"
            )
        with np.load(request["answer"], allow_pickle=False) as answer:
            arrays = dict(answer)
    fields = json.loads(str(arrays["said"]))
    if "problem" in fields:
        raise UserError(fields["problem"])
    return Scored(
        arrays["score"],
        arrays["score"][list(with_maps)],
        arrays.get("branch_scores"),
        arrays.get("anomaly_map"),
        arrays.get("label_map"),
        **fields,
    )


def main() -> None:
    request = json.load(sys.stdin)
    try:
        arrays, fields = _answer(request)
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # who started this says so
    except Exception as problem:
        sentence = user_message(problem)
        if sentence is None:
            raise
        arrays, fields = {}, {"problem": sentence}
    answer: dict[str, Any] = {"said": json.dumps(fields), **arrays}
    np.savez(request["answer"], **answer)


def _answer(request: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    engine = open_model(Path(request["model"]), request["device"])
    with_maps = set(request["with_maps"]) if engine.has_maps else set()
    arrays: dict[str, list[np.ndarray]] = {"score": []}
    if with_maps:
        arrays |= {name: [] for name in WITH_MAPS}
    bar = ProgressBar(request["pictures"], desc=request["description"], unit="image", leave=False)
    for index, path in enumerate(bar):
        picture = read_for(engine, [Path(path)])
        output = engine.predict(picture)._asdict() if index in with_maps else {"score": engine.score(picture)}
        for name in arrays.keys() & output.keys():
            arrays[name].append(output[name])
    return (
        {name: np.concatenate(values) for name, values in arrays.items()},
        {"metadata": engine.metadata, "networks": engine.networks, "device": engine.device},
    )


if __name__ == "__main__":
    main()
