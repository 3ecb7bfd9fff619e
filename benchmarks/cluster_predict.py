"""predict.py --ray over many small pictures on simulated nodes of this machine: each exactly once, speed, flat memory.

    python -m benchmarks.cluster_predict --workspace /tmp/scored --images 20000
    python -m benchmarks.cluster_predict --workspace /tmp/scored --images 20000 --kill

The model is tiny: what is measured is all the rest. With --kill a worker is killed in the middle. Linux only, for its /proc. Exit
status 1: an image is missing or there twice, or memory grows.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from csad.data import files
from csad.data.files import path_argument
from csad.errors import UserError, run_script
from csad.export.exporters import to_onnx
from csad.inference.engines import require_package
from csad.progress import ProgressBar

import numpy as np
import torch
from PIL import Image

from benchmarks.measuring import ROOT, memory_mb, options_of, tell_missed
from models.constants import SIZE
from models.prediction import Prediction

SIDE = 64  # pixels of each picture
STORE_BYTES = 80 * 2**20  # Ray's object store of each node
PART = 500  # images in a file of the output
GROWTH = 0.05  # of memory, from a quarter of the run to its end


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument(
        "--workspace",
        type=path_argument,
        required=True,
        help="pictures, model and output go there; pictures stay",
    )
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--nodes", type=int, default=2, help="with one CPU and so one worker each")
    parser.add_argument("--kill", action="store_true", help="kill a worker in the middle")
    args, options = parser.parse_known_args()  # more options go to predict.py
    write_pictures(args.workspace / "pictures", args.images)
    model = args.workspace / "tiny.onnx"
    files.write_bytes(model, tiny_model())
    output = args.workspace / "output"
    shutil.rmtree(output, ignore_errors=True)

    require_package("ray")
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": STORE_BYTES})
    try:
        for _ in range(args.nodes):
            nodes.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
        began = time.monotonic()
        pictures = (args.workspace / "pictures").resolve()
        command = [sys.executable, "predict.py", pictures, "--model", model.resolve()]
        command += ["--output", output.resolve()]
        command += ["--ray", nodes.address, "--shard_size", PART, *options]
        driver = subprocess.Popen([str(word) for word in command], cwd=ROOT)
        memory, killed = watched(driver, nodes, output / "parts", args.images, args.kill)
        seconds = time.monotonic() - began
    finally:
        nodes.shutdown()
    if driver.returncode not in (0, 4):
        raise UserError(f"predict.py ended with status {driver.returncode}")
    print(
        f"{args.images} images in {seconds:.0f} s with start and end, {args.images / seconds:.0f} a second; "
        f"{'one worker killed' if killed else 'no worker killed'}"
    )
    missed = ["a worker to kill"] if args.kill and not killed else []
    times = Counter(
        json.loads(line)["image"] for path in output.glob("parts/*.jsonl") for line in path.open()
    )
    print(f"{len(times)} images have a line, {sum(times.values())} lines")
    missed += [] if len(times) == args.images == sum(times.values()) else ["every image exactly once"]
    for name, series in memory.items():
        start, middle, end = (series[int(fraction * (len(series) - 1))] for fraction in (0.25, 0.5, 1))
        print(
            f"{name}: {start:.0f} MB after a quarter, {middle:.0f} MB in the middle, {end:.0f} MB at the end"
        )
        missed += [] if end <= (1 + GROWTH) * start else [f"flat memory of the {name}"]
    tell_missed(missed)


def write_pictures(folder: Path, count: int) -> None:
    """Small JPEGs of noise, a thousand in each subfolder, where they are not there already."""
    rng = np.random.default_rng(0)
    for index in ProgressBar(range(count), desc="pictures", leave=False):
        path = folder / f"{index // 1000:04d}/{index:07d}.jpg"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(path)


def watched(
    driver: subprocess.Popen, nodes: Any, parts: Path, count: int, kill: bool
) -> tuple[dict[str, list[float]], bool]:
    """Resident megabytes of driver and workers, while there is output, until the driver ends; and whether a worker was killed."""
    memory: dict[str, list[float]] = {"driver": [], "largest worker": []}
    killed = False
    while driver.poll() is None:
        time.sleep(0.5)
        workers = workers_of(nodes)
        done = sum(1 for _ in parts.glob("part-*"))
        if not done or not workers:
            continue
        memory["driver"].append(memory_mb(pid=driver.pid) or 0.0)
        memory["largest worker"].append(max(memory_mb(pid=pid) or 0.0 for pid in workers))
        if kill and not killed and done * PART >= count / 2:
            os.kill(workers[0], signal.SIGKILL)
            killed = True
    return memory, killed


def workers_of(nodes: Any) -> list[int]:
    """Process ids of a simulated cluster's workers that score."""
    raylets = {
        str(info.process.pid)
        for node in nodes.list_all_nodes()
        for info in node.all_processes.get("raylet", [])
    }
    workers = []
    for folder in Path("/proc").iterdir():
        try:
            if (folder / "cmdline").read_text().startswith("ray::Map") and (
                folder / "stat"
            ).read_text().split()[3] in raylets:
                workers.append(int(folder.name))
        except (OSError, ValueError, IndexError):  # ended since, or no process
            continue
    return workers


class Brightness(torch.nn.Module):
    """Scores an image by its mean brightness, times 100 / 255, all of it contributed by LGST.

    That of a black one is not a number.
    """

    def forward(self, images: torch.Tensor) -> Prediction:
        values = images.float()
        percent = values * (100 / 255)
        mean = percent.mean((1, 2, 3))
        score = mean * mean / mean
        contribution = score[:, None]
        map_of_lgst = torch.nn.functional.avg_pool2d(percent, 4).mean(1, keepdim=True)
        return Prediction(
            score,
            torch.cat([0 * contribution, contribution], 1),
            map_of_lgst[:, 0],
            torch.cat([0 * map_of_lgst, map_of_lgst], 1),
            (values.mean(1) > 128).to(torch.uint8),
        )


def tiny_model(**metadata: object) -> bytes:
    """`Brightness` as an ONNX model with all outputs."""
    defaults = {
        "with_map": True,
        "raw_input": True,
        "input_size": SIZE,
        "validation_scores": list(range(101)),
    }
    return to_onnx(Brightness(), defaults | metadata, Prediction._fields)


if __name__ == "__main__":
    run_script(main)
