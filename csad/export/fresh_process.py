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

from csad.errors import UserError, in_a_sentence
from csad.inference.engines import read_for
from csad.inference.runtimes import open_model
from csad.progress import ProgressBar

import numpy as np

# What glibc fills fresh memory with, where it is not told otherwise: a runtime that reads such memory is found out.
MEMORY_IS_FILLED = {"MALLOC_PERTURB_": "170"}


class Scored(NamedTuple):
    """What an exported model says about pictures, of which n were looked at closely; K branches, see `models.prediction`."""

    scores: np.ndarray  # (N,), of all; not always finite, as the next two
    score: np.ndarray  # (n,)
    branch_scores: (
        np.ndarray | None
    )  # (n, K); None: the model was exported without maps and gives the score alone
    label_map: np.ndarray | None  # (n, 256, 256) uint8, the same way
    metadata: dict[str, Any]
    networks: dict[str, str]  # in which precision they ran, `csad.inference.engines.Engine.networks`
    device: str  # on which


def score(
    model: Path, pictures: Sequence[Path], closely: Sequence[int], device: str, description: str
) -> Scored:
    """Open an exported model in a new process, as `open_model` does, and let it score pictures one by one.

    Args:
        pictures: read there as the model's metadata says, (N,).
        closely: indices of those to look at closely, (n,), rising.
        description: of the progress bar.

    Raises:
        UserError: the model cannot be opened, a picture cannot be read, or the process ended without an answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked = {
            "model": str(model.resolve()),
            "pictures": [str(path.resolve()) for path in pictures],
            "device": device,
            "closely": list(closely),
            "description": description,
            "answer": str(Path(folder) / "answer.npz"),
        }
        paths = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps(asked),
            text=True,
            env=MEMORY_IS_FILLED | os.environ | {"PYTHONPATH": paths},
        )
        if done.returncode or not Path(asked["answer"]).exists():
            raise UserError(
                f"the exported model {model.name} could not be scored with: its process ended with status "
                f"{done.returncode}; export it again, with another --precision where this repeats itself"
            )
        with np.load(asked["answer"], allow_pickle=False) as answer:
            found = dict(answer)
    said = json.loads(str(found["said"]))
    if "problem" in said:
        raise UserError(said["problem"])
    return Scored(
        found["score"],
        found["score"][list(closely)],
        found.get("branch_scores"),
        found.get("label_map"),
        said["metadata"],
        said["networks"],
        said["device"],
    )


def main() -> None:
    asked = json.load(sys.stdin)
    try:
        found, said = _answer(asked)
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # who started this says so
    except Exception as problem:
        sentence = in_a_sentence(problem)
        if sentence is None:
            raise
        found, said = {}, {"problem": sentence}
    np.savez(asked["answer"], said=json.dumps(said), **found)


def _answer(asked: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    engine = open_model(Path(asked["model"]), asked["device"])
    closely = set(asked["closely"]) if engine.has_maps else set()
    found: dict[str, list[np.ndarray]] = {"score": []} | (
        {"branch_scores": [], "label_map": []} if closely else {}
    )
    for index, path in enumerate(
        ProgressBar(asked["pictures"], desc=asked["description"], unit="image", leave=False)
    ):
        picture = read_for(engine, [Path(path)])
        given = engine.predict(picture)._asdict() if index in closely else {"score": engine.score(picture)}
        for name in found.keys() & given.keys():
            found[name].append(given[name])
    return (
        {name: np.concatenate(values) for name, values in found.items()},
        {"metadata": engine.metadata, "networks": engine.networks, "device": engine.device},
    )


if __name__ == "__main__":
    main()
