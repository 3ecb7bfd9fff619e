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

import csad
from csad.data import files
from csad.data.files import path_argument
from csad.errors import UserError, run_script
from csad.inference.engines import METADATA_KEY, require_package
from csad.progress import ProgressBar

import numpy as np
from PIL import Image

from benchmarks.processes import options_of, resident
from models.prediction import Prediction

SIDE = 64  # pixels of each picture
STORE_BYTES = 80 * 2**20  # Ray's object store of each node
PART = 500  # images in a file of the output
GROWTH = 0.05  # of memory, from a quarter of the run to its end
ROOT = Path(__file__).parent.parent


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
        driver = subprocess.Popen(
            [
                sys.executable,
                "predict.py",
                str(args.workspace.resolve() / "pictures"),
                "--model",
                str(model.resolve()),
                "--output",
                str(output.resolve()),
                "--ray",
                nodes.address,
                "--shard_size",
                str(PART),
                *options,
            ],
            cwd=ROOT,
        )
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
    if missed:
        print(f"missed: {', '.join(missed)}")
        raise SystemExit(1)


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
        memory["driver"].append(resident(driver.pid) or 0.0)
        memory["largest worker"].append(max(resident(pid) or 0.0 for pid in workers))
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


def tiny_model(**metadata: object) -> bytes:
    """An ONNX model with all outputs; it scores an image by its mean brightness, times 100 / 255, all of it contributed by LGST.

    That of a black one is not a number.
    """
    onnx = require_package("onnx")
    node, kinds = onnx.helper.make_node, onnx.TensorProto
    constants = {
        "scale": np.float32(100 / 255),
        "zero": np.float32(0),
        "all": np.array([1, 2, 3]),
        "one": np.array([1]),
        "bright": np.float32(128),
    }
    nodes = [
        node("Cast", ["images"], ["values"], to=kinds.FLOAT),
        node("Mul", ["values", "scale"], ["scaled"]),
        node("ReduceMean", ["scaled", "all"], ["mean"], keepdims=0),
        node("Mul", ["mean", "mean"], ["square"]),
        node("Div", ["square", "mean"], ["score"]),
        node("Unsqueeze", ["score", "one"], ["contribution"]),
        node("Mul", ["contribution", "zero"], ["nothing"]),
        node("Concat", ["nothing", "contribution"], ["branch_scores"], axis=1),
        node("AveragePool", ["scaled"], ["small"], kernel_shape=[4, 4], strides=[4, 4]),
        node("ReduceMean", ["small", "one"], ["anomaly_map"], keepdims=0),
        node("Unsqueeze", ["anomaly_map", "one"], ["map"]),
        node("Mul", ["map", "zero"], ["no_map"]),
        node("Concat", ["no_map", "map"], ["branch_maps"], axis=1),
        node("ReduceMean", ["values", "one"], ["grey"], keepdims=0),
        node("Greater", ["grey", "bright"], ["over"]),
        node("Cast", ["over"], ["label_map"], to=kinds.UINT8),
    ]
    outputs = [
        onnx.helper.make_tensor_value_info(name, kinds.UINT8 if name == "label_map" else kinds.FLOAT, None)
        for name in Prediction._fields
    ]
    images = onnx.helper.make_tensor_value_info("images", kinds.UINT8, ["batch", 3, 256, 256])
    graph = onnx.helper.make_graph(
        nodes,
        "tiny",
        [images],
        outputs,
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    metadata = {
        "format_version": csad.FORMAT_VERSION,
        "with_map": True,
        "raw_input": True,
        "validation_scores": list(range(101)),
        **metadata,
    }
    onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(metadata)})
    return model.SerializeToString()


if __name__ == "__main__":
    run_script(main)
