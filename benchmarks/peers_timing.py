"""What takes turns in benchmarks/peers.py: our exported models in this process, and the peers in their worker."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from csad.data import files, layouts
from csad.data.workspace import EXPORTED, Workspace
from csad.errors import UserError
from csad.evaluation.scores import FUSED
from csad.inference.engines import Engine, read_for
from csad.inference.runtimes import open_model
from csad.progress import ProgressBar

import numpy as np

from benchmarks import all_stages

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
    where = files.read_json(metrics)["localisation"][FUSED] if metrics.exists() else {}
    for path in workspace.exported_models([category.name]):
        engine = open_model(path, "cpu")
        format_ = next(name for name, (folder, _) in EXPORTED.items() if path.parent.name == folder)
        evaluation = workspace.evaluation(category.name, format_, engine.metadata["precision"])
        report = evaluation.with_suffix(".json")
        evaluated = files.read_json(report) if report.exists() else {}
        row = {
            "category": category.name,
            "method": f"{workspace.root.name}_{format_}_{engine.metadata['precision']}",
            "title": f"CSAD ({'+'.join(engine.branches)}), {engine.runtime} {engine.precision}",
            "ours": True,
            "workspace": workspace.root.name,
            "branches": engine.branches,
            "format": format_,
            "precision": engine.metadata["precision"],
            "with_map": engine.has_maps,
            **{f"auroc_{kind}": evaluated.get(f"auroc_{kind}") for kind in ANOMALIES},
            **{f"pixel_auroc_{kind}": where.get(kind, {}).get("pixel_auroc") for kind in ANOMALIES},
            "training_seconds": all_stages.training_seconds(stages),
            "peak_mb": max((stage["peak_mb"] for stage in stages.values()), default=None),
        }
        rows.append((row, timer(engine, read_for(engine, pictures[: max(batches)]))))
    return rows


def timer(engine: Engine, pictures: np.ndarray) -> Callable[[int], float]:
    """Batch size -> seconds that the engine takes, with maps if it has them, as the peers give theirs."""

    def run(batch: int) -> float:
        views = np.resize(pictures, (batch, *pictures.shape[1:]))
        start = time.perf_counter()
        if engine.has_maps:
            engine.predict(views)
        else:
            engine.score(views)
        return time.perf_counter() - start

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
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f"the process that times the peers ended; {self._log.name} says why")
        return json.loads(line)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._log.close()


def in_turns(variants: list[Callable[[int], float]], batch: int, turns: int, name: str) -> list[float]:
    """Median seconds of each variant; all take turns, so that other work on the machine hits all alike."""
    seconds: list[list[float]] = [[] for _ in variants]
    for turn in ProgressBar(range(turns + 1), desc=f"{name}: time batch {batch}", unit="turn", leave=False):
        for variant, times in zip(variants, seconds):
            time.sleep(PAUSE)
            elapsed = variant(batch)
            if turn:  # the first is to warm up
                times.append(elapsed)
    return [float(np.median(times)) for times in seconds]
