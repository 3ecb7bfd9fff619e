"""What a Ray cluster does to the stages: the same bytes though nodes die, and how long the same jobs take without it.

    python -m benchmarks.cluster --kills 10
    python -m benchmarks.cluster --overhead --rounds 2

The first trains five rendered categories with two seeds, first one after another, then on a simulated cluster of a head and
two worker nodes, of which a random one is killed again and again, and compares every byte. The second trains jobs of about a
minute by themselves and with --ray local on one worker, in turns and each first as often as the other, because a machine drifts
in speed; it wants one with nothing else to do.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from csad.synthetic import CATEGORIES
from csad.synthetic.writer import Settings, write_dataset

from benchmarks.faults import differing
from benchmarks.many_categories import QUICK
from benchmarks.measuring import ROOT, options_of

OPTIONS = (*QUICK, *"--lgst.width 16 --lgst.teacher_channels 16".split())
SMALL = Settings(image_size=128, train=8, validation=3, test_good=3, test_logical=3, test_structural=3)
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--kills", type=int, default=10, help="of random nodes (default: 10)")
    parser.add_argument(
        "--pause", type=float, nargs=2, default=[5, 25], help="range of the seconds between two kills"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overhead", action="store_true", help="compare times instead")
    parser.add_argument(
        "--jobs", type=int, default=10, choices=range(2, 11, 2), help="with --overhead: in one run"
    )
    parser.add_argument("--rounds", type=int, default=2, help="with --overhead: runs of each kind")
    parser.add_argument(
        "--steps", type=int, help="of each job (default: 60; with --overhead 6000, about a minute)"
    )
    args = parser.parse_args()
    # A job of Ray's takes as many CPUs as it has threads: with all of them there is one worker.
    os.environ["OMP_NUM_THREADS"] = str(os.cpu_count()) if args.overhead else "1"
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder) / "data", list(CATEGORIES), SMALL, 2, False)
        overhead(Path(folder), args) if args.overhead else kills(Path(folder), args)


def kills(folder: Path, args: argparse.Namespace) -> None:
    from ray.cluster_utils import Cluster

    start(folder, "sequential", args.steps or 60, "--seeds", "0", "1").wait()
    cluster = Cluster(initialize_head=True, head_node_args=NODE | {"num_cpus": 0, "include_dashboard": False})
    try:
        workers = [cluster.add_node(**NODE) for _ in range(2)]
        rng, killed, runs = random.Random(args.seed), 0, 0
        while killed < args.kills:  # a run that ends before all kills is made again from the start
            runs += 1
            options = ("--seeds", "0", "1", "--ray", cluster.address)
            driver = start(folder, f"ray{runs}", args.steps or 60, *options)
            while driver.poll() is None:
                try:
                    driver.wait(rng.uniform(*args.pause))
                except subprocess.TimeoutExpired:
                    if killed < args.kills:
                        cluster.remove_node(workers.pop(rng.randrange(2)), allow_graceful=False)
                        workers.append(cluster.add_node(**NODE))
                        killed += 1
            differing = different(folder / "sequential", folder / f"ray{runs}")
            print(
                f"run {runs}: exit status {driver.returncode}, {killed} nodes killed so far, "
                f"{len(differing)} files differ {differing[:5]}",
                flush=True,
            )
    finally:
        cluster.shutdown()


def overhead(folder: Path, args: argparse.Namespace) -> None:
    options_of_kind: dict[str, tuple[str, ...]] = {"sequential": (), "ray": ("--ray", "local")}
    seconds: dict[str, list[float]] = {kind: [] for kind in options_of_kind}
    jobs = ("--seeds", "0", "1", "--categories", *list(CATEGORIES)[: args.jobs // 2])
    for number in range(args.rounds):
        for kind in list(options_of_kind)[:: -1 if number % 2 else 1]:
            before = time.perf_counter()
            start(folder, f"{kind}{number}", args.steps or 6000, *jobs, *options_of_kind[kind]).wait()
            seconds[kind].append(time.perf_counter() - before)
            print(f"{kind}: {seconds[kind][-1]:.1f} s", flush=True)
        print(
            f"{len(different(folder / f'sequential{number}', folder / f'ray{number}'))} files differ",
            flush=True,
        )
    print(
        f"overhead of --ray local: {sum(seconds['ray']) / sum(seconds['sequential']) - 1:.1%} in all; of each pair "
        + ", ".join(f"{ray / alone - 1:.1%}" for alone, ray in zip(*seconds.values()))
    )


def start(folder: Path, name: str, steps: int, *options: str) -> subprocess.Popen:
    folders = ["--workspace", str(folder / name), "--dataset_root", str(folder / "data")]
    command = [sys.executable, "CSAD.py", *folders, *OPTIONS, "--lgst.steps", str(steps), *options]
    with open(folder / f"{name}.log", "w") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def different(first: Path, second: Path) -> list[str]:
    """Files that are not the same in both, or only in one of them."""
    return differing(contents_of(first), contents_of(second))


def contents_of(root: Path) -> dict[str, bytes]:
    """By path of all files, but for hidden ones."""
    paths = {path.relative_to(root): path for path in root.rglob("*") if path.is_file()}
    return {
        str(name): path.read_bytes()
        for name, path in paths.items()
        if not any(part.startswith(".") for part in name.parts)
    }


if __name__ == "__main__":
    main()
