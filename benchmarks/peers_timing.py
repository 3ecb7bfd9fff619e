"""What takes turns in benchmarks/peers.py: our exported models in this process, and the peers in their worker."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from csad.data import files, layouts
from csad.data.workspace import EXPORTED, Workspace
from csad.errors import UserError
from csad.evaluation.scores import FUSED
from csad.inference.engines import Engine, read_for
from csad.inference.runtimes import open_model

import numpy as np

from benchmarks import all_stages
from benchmarks.measuring import seconds_of

PAUSE = 0.05  # seconds between timed runs: a runtime's threads may still wait in a loop
ANOMALIES = {"logical": layouts.LOGICAL, "structural": layouts.STRUCTURAL}


def exported(
    category: layouts.Category, workspace: Workspace, batches: list[int]
) -> list[tuple[dict[str, Any], Callable[[int], float]]]:
    """Our models of a category: what their evaluations say, and how to time each."""
    rows = []
    pictures = [path for _, path in category.test_images]
    stages = all_stages.read(workspace.root).get(category.name, {})
    metrics = workspace.metrics(category.name)
    localised = files.read_json(metrics)["localisation"] if metrics.exists() else {}
    for path in workspace.exported_models([category.name]):
        engine = open_model(path, "cpu")
        format_ = next(name for name, (folder, _) in EXPORTED.items() if path.parent.name == folder)
        evaluation = workspace.evaluation(category.name, format_, engine.metadata["precision"])
        report = evaluation.with_suffix(".json")
        evaluated = files.read_json(report) if report.exists() else {}
        alone = next((name for name in engine.branches if workspace.root.name == f"branch_{name}"), None)
        where = localised.get(alone or FUSED, {})
        row = {
            "category": category.name,
            "method": f"{workspace.root.name}_{format_}_{engine.metadata['precision']}",
            "title": f"CSAD ({'+'.join(engine.branches)}), {engine.runtime} {engine.precision}",
            "ours": True,
            "workspace": workspace.root.name,
            "branches": engine.branches,
            "alone": alone,  # the branch, of a model that benchmarks.all_stages made of one alone
            "format": format_,
            "precision": engine.metadata["precision"],
            "with_map": engine.has_maps,
            **{f"auroc_{kind}": evaluated.get(f"auroc_{kind}") for kind in ANOMALIES},
            **{f"pixel_auroc_{kind}": where.get(kind, {}).get("pixel_auroc") for kind in ANOMALIES},
            "training_seconds": all_stages.training_seconds(stages),
            "peak_mb": max((stage["peak_mb"] for stage in stages.values() if not alone), default=None),
        }
        rows.append((row, timer(engine, read_for(engine, pictures[: max(batches)]))))
    return rows


def timer(engine: Engine, pictures: np.ndarray) -> Callable[[int], float]:
    """Batch size -> seconds that the engine takes, with maps if it has them, as the peers give theirs."""

    def run(batch: int) -> float:
        views = np.resize(pictures, (batch, *pictures.shape[1:]))
        return seconds_of(lambda: (engine.predict if engine.has_maps else engine.score)(views))()

    return run


class Server:
    """The worker that holds all fitted methods of a category and times them on request."""

    def __init__(self, command: Sequence[object], log: Path):
        self._log = open(log, "w", encoding="utf-8")
        self._process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._read()

    def seconds(self, method: str, batch: int) -> float:
        print(json.dumps({"method": method, "batch": batch}), file=self._process.stdin, flush=True)
        return self._read()["seconds"]

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None  # a pipe
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f"the process that times the peers ended; {self._log.name} says why")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None  # a pipe
        self._process.stdin.close()
        self._process.wait()
        self._log.close()
