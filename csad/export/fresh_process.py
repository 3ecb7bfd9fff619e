"""Score pictures with an exported file in a process of its own: what the file gives whoever opens it next.

In the process that made it, a model can look right by chance: what a runtime reads beyond what it wrote is then often zero.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
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
        answer = Path(folder) / "answer.npz"
        request = {
            "model": str(model.resolve()),
            "pictures": [str(path.resolve()) for path in pictures],
            "device": device,
            "with_maps": list(with_maps),
            "description": description,
            "answer": str(answer),
        }
        paths = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps(request),
            text=True,
            env=MEMORY_IS_FILLED | os.environ | {"PYTHONPATH": paths},
        )
        if done.returncode or not answer.exists():
            raise UserError(
                f"the exported model {model.name} could not be scored with: its process ended with status "
                f"{done.returncode}; export it again, with another --precision where this repeats itself"
            )
        with np.load(answer, allow_pickle=False) as archive:
            arrays = dict(archive)
    fields = json.loads(str(arrays.pop("said")))
    if "problem" in fields:
        raise UserError(fields["problem"])
    scores = arrays["score"]
    fields |= {name: arrays.get(name) for name in ("branch_scores", "anomaly_map", "label_map")}
    return Scored(scores, scores[list(with_maps)], **fields)


def main() -> None:
    request = json.load(sys.stdin)
    arrays: dict[str, list[np.ndarray]] = defaultdict(list)
    try:
        engine = open_model(Path(request["model"]), request["device"])
        with_maps = request["with_maps"] if engine.has_maps else []
        bar = ProgressBar(request["pictures"], desc=request["description"], unit="image", leave=False)
        for index, path in enumerate(bar):
            picture = read_for(engine, [Path(path)])
            if index in with_maps:
                for name, values in engine.predict(picture)._asdict().items():
                    arrays[name].append(values)
            else:
                arrays["score"].append(engine.score(picture))
        fields: dict[str, Any] = {
            "metadata": engine.metadata,
            "networks": engine.networks,
            "device": engine.device,
        }
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # who started this says so
    except Exception as problem:
        sentence = user_message(problem)
        if sentence is None:
            raise
        fields = {"problem": sentence}
    answer: dict[str, Any] = {name: np.concatenate(values) for name, values in arrays.items()}
    np.savez(request["answer"], said=json.dumps(fields), **answer)


if __name__ == "__main__":
    main()
