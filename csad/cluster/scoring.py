"""predict.py --ray: images scored by a streaming Ray Data pipeline, shard by shard, each image exactly once.

Paths go to the workers and lines come back: each worker has an engine and decodes a few batches ahead of it, so no picture passes
through Ray's object store, and no worker holds more than the shard that it scores. The driver alone writes. A shard whose worker
dies is scored again by another one, as a whole.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from csad.cluster.connection import Driver, connected, environment, most, node_resources
from csad.cluster.shards import Shard, Shards, shards_of
from csad.cluster.sources import ClusterInputs, is_passing, source_of
from csad.data import files, records
from csad.data.listing import count
from csad.errors import UserError, user_message
from csad.inference.engines import Engine
from csad.inference.folders import only_writer, state_of
from csad.inference.inspection import Picture, read_picture, verdicts_on
from csad.inference.predictions import as_line
from csad.inference.runtimes import device_name, open_model
from csad.inference.verdicts import VERDICTS
from csad.progress import ProgressBar

WORKER_CPUS = 4  # of each engine, where a node has as many
TRIES = 4  # of a shard whose worker died; a picture that kills one would kill all others, too


class Work(NamedTuple):
    """What a worker has to know besides the images; ``digest`` is that of the model's file."""

    model: Path
    digest: str
    device: str
    threshold: float
    batch_size: int


def score(args: argparse.Namespace, threshold: float) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Score everything that ``args.images`` names into ``args.output``/parts, going on where an earlier run ended.

    Returns:
        How often each verdict was given, by earlier runs, too; names of what was left out, by the reason.

    Raises:
        UserError: nothing to score, no Ray or no cluster, another run writes there, or workers died again and again.
    """
    if not all(map(find_spec, ("ray", "pyarrow", "pandas"))):
        raise UserError(
            "--ray needs Ray with Ray Data; in the repository's folder, pip install '.[cluster]' installs it"
        )
    # It would warn of what Ray Data does, and rightly so.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    sources = ClusterInputs(args.images, args.column or "image", args.output)
    work = Work(args.model, model_digest(args.model), args.device, threshold, args.batch_size)
    shards = list(shards_of(sources.images, args.batch_size, [work.digest, threshold], args.shard_size))
    counts: Counter = Counter(dict.fromkeys(VERDICTS, 0))
    with only_writer(args.output), ProgressBar(total=len(sources.images), unit="image", smoothing=0) as bar:
        written = Shards(args.output / "parts", args.format or "jsonl")
        written.keep_only(shards)
        summary = args.output / "summary.json"
        summary.unlink(missing_ok=True)
        pending = {}
        for shard in shards:
            finished = written.verdicts(shard)
            if finished is None:
                pending[shard.index] = shard
            else:
                counts += finished
                bar.update(shard.count)
        if pending:
            with connected(args.ray, args.output / ".ray") as (ray, driver):
                for result in scored(ray, driver, work, list(pending.values()), not args.unordered):
                    if result["sentence"]:
                        raise UserError(result["sentence"])
                    if result["traceback"]:
                        raise RuntimeError(f"on a worker:\n{result['traceback']}")
                    if not result["lines"] or result["shard"] not in pending:
                        continue
                    shard = pending.pop(result["shard"])
                    written.write(shard, result["lines"])
                    counts += Counter(json.loads(result["verdicts"]))
                    bar.update(shard.count)
                    bar.set_postfix_str(result["engine"])
        if pending:
            first = json.loads(next(iter(pending.values())).images)[0][0]
            raise UserError(
                f"{len(pending)} of {count(len(shards), 'part')} are not scored, because their workers died {TRIES} times "
                f"(the first of them begins with {first}); the others are in {written.folder}, and the same "
                "command tries those again"
            )
        of_verdicts = {name: counts[name] for name in VERDICTS}
        content = {"found": sources.count, "images": len(sources.images), "left_out": sources.left_out}
        files.write_json(summary, content | of_verdicts)
    return of_verdicts, sources.left_out


def model_digest(model: Path) -> str:
    """Digest of a model's file, and of the weights beside it if it is OpenVINO's."""
    weights = [model.with_suffix(".bin")] if model.suffix.lower() == ".xml" else []
    return " ".join(records.digest(path) for path in (model, *weights))


def scored(
    ray: ModuleType, driver: Driver, work: Work, shards: Sequence[Shard], ordered: bool
) -> Iterator[dict[str, Any]]:
    """What `Worker` returns of each shard, as soon as it is there or in the order of the shards; UserError if
    the cluster was lost."""
    import ray.data as ray_data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray_data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_options.preserve_order = ordered
    resources, workers = worker_resources(ray, work)
    workers = min(workers, len(shards))
    items = [{"shard": shard.index, "images": shard.images} for shard in shards]
    rows = ray_data.from_items(items, override_num_blocks=len(items))
    pool = ray_data.ActorPoolStrategy(
        min_size=1, initial_size=workers, max_size=workers, max_tasks_in_flight_per_actor=1
    )
    rows = rows.map(
        Worker,
        fn_constructor_args=(work, driver),
        compute=pool,
        **resources,
        runtime_env=environment(int(resources["num_cpus"])),
    )
    try:
        for batch in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from batch.to_pylist()
    except ray.exceptions.RayError as problem:
        raise UserError(
            f"the Ray cluster was lost ({str(problem).splitlines()[0]}); the same command continues from the parts "
            "that are finished"
        ) from problem


def worker_resources(ray: ModuleType, work: Work) -> tuple[dict[str, float], int]:
    """What a worker asks for, and how many of them the cluster holds."""
    nodes = node_resources(ray)
    for_gpu = work.model.suffix.lower() != ".xml" and not work.device.startswith("cpu")
    on_gpu = for_gpu and any(node.get("GPU", 0) >= 1 for node in nodes)
    fitting = [node for node in nodes if not on_gpu or node.get("GPU", 0) >= 1]
    cpus = max(1, int(most(fitting, "CPU", WORKER_CPUS)))
    gpus = [node.get("GPU", 0) if on_gpu else float("inf") for node in nodes]
    workers = sum(int(min(node.get("CPU", 0) // cpus, count)) for node, count in zip(nodes, gpus))
    return {"num_cpus": cpus, "num_gpus": int(on_gpu)}, max(1, workers)


class Worker:
    """An actor with an engine, which is opened with the first shard: then a sentence about it reaches the driver."""

    def __init__(self, work: Work, driver: Driver):
        self.work, self.driver = work, driver
        self.engine: Engine | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Score one shard; a problem is returned, so that it is not taken for a worker's death.

        No lines: the shard has killed `TRIES` workers, and is given up. Ray itself would try for ever.
        """
        result = {"shard": row["shard"], "lines": b""}
        result |= dict.fromkeys(("verdicts", "engine", "sentence", "traceback"), "")
        try:
            self.driver.enter()
            tries = self.driver.folder / f"{self.driver.token}-{row['shard']}.tries"
            if tries.exists() and tries.stat().st_size >= TRIES:
                return result
            with open(tries, "ab") as handle:
                handle.write(b".")
            if self.engine is None:
                self.engine = self._open()
            lines, counts = [], Counter[str]()
            states = {name: {"bytes": size, "changed_ns": ns} for name, size, ns in json.loads(row["images"])}
            for verdict in verdicts_on(
                states, self.engine, self.work.threshold, self.work.batch_size, self._read
            ):
                name = verdict.name
                lines.append(as_line(verdict, state_of(name) if isinstance(name, Path) else states[name]))
                counts[verdict.verdict] += 1
            tries.unlink()
            return result | {
                "lines": "".join(lines).encode(errors="backslashreplace"),
                "verdicts": json.dumps(counts),
                "engine": f"{self.engine.runtime} on {self.engine.device}, {self.engine.precision}",
            }
        except Exception as problem:
            sentence = user_message(problem)
            return result | ({"sentence": sentence} if sentence else {"traceback": traceback.format_exc()})

    def _open(self) -> Engine:
        if model_digest(self.work.model) != self.work.digest:
            raise UserError(
                f"{self.work.model} is not the same file on all nodes, or was replaced; run the same command again"
            )
        return open_model(self.work.model, device_name(self.work.device, self.work.model))

    def _read(self, name: Path | str) -> Picture:
        assert self.engine is not None
        try:
            source = source_of(str(name))
        except UserError as problem:
            if is_passing(problem.__cause__):
                raise UserError(
                    f"{problem}; the same command continues from the parts that are finished"
                ) from problem
            return Picture(name, problem=str(problem))
        return read_picture(source, source if isinstance(source, Path) else name, self.engine, None)
