"""Other methods beside ours: anomalib's, on the same pictures, backbone weights, machine and threads.

    python -m benchmarks.peers --set_up
    python -m benchmarks.peers --dataset_root datasets/synthetic_loco --workspace demo_workspace

The first command installs the newest anomalib into an environment of its own (--environment), as it needs other packages
than CSAD. The second fits each method on each category, each in a process of its own, and measures image AUROC of
logical and structural anomalies, pixel AUROC, seconds to fit (without starting Python and reading pictures), peak memory,
and milliseconds per picture, in turns with the models that were exported in each --workspace. All AUROCs are
computed here, by CSAD's own functions, from the methods' raw scores.

Methods keep anomalib's defaults but for the backbone: it has our quick preset's weights (handed over in a file, nothing is
downloaded) and normalisation. PatchCore's coreset takes minutes, although its loop is ours (benchmarks/peers_worker.py).
DFKDE gives probabilities, which may be equal for far images, and no maps. Writes peers.json to --output; what is fitted
is kept there, and the same command continues.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from csad import settings
from csad.cli import logical_defects
from csad.data import data_sets, files, images, layouts, records
from csad.data.roi import read_roi
from csad.data.workspace import Workspace
from csad.errors import UserError, run_script
from csad.evaluation import localisation
from csad.evaluation.metrics import auroc
from csad.progress import ProgressBar
from csad.training.backbone_weights import build_backbone

import numpy as np
import torch

from benchmarks import results_content
from benchmarks.measuring import describe_machine, in_turns, measured, options_of
from benchmarks.peers_timing import ANOMALIES, PAUSE, Server, exported
from benchmarks.peers_worker import PEERS
from models.backbone import PACKAGED, TIMM_NAMES, Backbone
from models.constants import SIZE

WORKER = Path(__file__).with_name("peers_worker.py")
PRESET = "quick"
PACKAGES = ("anomalib", "torch!=2.13.*", "torchvision")  # of 2.13 there is a build without torchvision's


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--set_up", action="store_true", help="make the environment, and nothing else")
    parser.add_argument(
        "--environment", type=files.path_argument, default=Path(".venv_peers"), help="that has anomalib"
    )
    parser.add_argument("--dataset_root", type=files.path_argument, help="in any layout that CSAD reads")
    parser.add_argument("--categories", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--methods", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument(
        "--workspace", type=files.path_argument, nargs="+", default=[], help="of our exported models, if any"
    )
    parser.add_argument("--output", type=files.path_argument, default=Path("peers"), help="where to write")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each process")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--turns", type=int, default=7, help="timed runs; 0 times nothing")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.set_up:
        return set_up(args.environment)
    if not python_of(args.environment).exists():
        raise UserError(f"{args.environment} has no Python; make it with python -m benchmarks.peers --set_up")
    if args.dataset_root is None:
        raise UserError("name the data set with --dataset_root")
    if min(args.threads, *args.batches) < 1 or args.turns < 0:
        raise UserError("--threads and --batches have to be at least 1, --turns at least 0")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # by which other runtimes and the workers go
    torch.set_num_threads(args.threads)

    categories = data_sets.Dataset(args.dataset_root).select(args.categories, logical_defects(PRESET))
    for category in categories:
        if not category.tested:
            raise UserError(f"{category.name} has no good test images, so nothing to measure")
    backbone = build_backbone(PACKAGED, None, Path("ckpt"), with_deepest=True)
    rows = []
    with Workspace(args.output).lock():
        weights = write_weights(backbone, args.output / "weights.pth")
        for category in categories:
            rows += compare(category, args, backbone, weights)
        content = {
            "rows": rows,
            "dataset": args.dataset_root.name,
            "backbone": {"name": backbone.name, "fingerprint": backbone.fingerprint},
            "seed": args.seed,
            "turns": args.turns,
            "machine": describe_machine(),
        }
        files.write_json(args.output / "peers.json", content)
    print("\n".join(results_content.render_peers(content)))


def python_of(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def set_up(environment: Path) -> None:
    """Make the environment, or bring its anomalib up to date."""
    if not python_of(environment).exists():
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    install: list[str | Path] = [python_of(environment), "-m", "pip", "install", "--upgrade", *PACKAGES]
    if subprocess.run(install).returncode:
        raise UserError(f"pip could not install {', '.join(PACKAGES)} into {environment}; see above")
    print(f"{environment} has anomalib")


def write_weights(backbone: Backbone, path: Path) -> Path:
    """The backbone's weights under timm's names, those of the stages after 1/16 included."""
    state = backbone.encoder.network.state_dict()
    if backbone.deepest is not None:
        state = backbone.deepest.network.state_dict() | state
    files.write_state(path, {"name": TIMM_NAMES.get(backbone.name, backbone.name), "state": state})
    return path


def compare(
    category: layouts.Category, args: argparse.Namespace, backbone: Backbone, weights: Path
) -> list[dict[str, Any]]:
    """One row per method, and one per exported model of ours."""
    jobs = prepare(category, args, backbone, weights)
    rows = []
    for method in ProgressBar(args.methods, desc=f"{category.name}: fit", unit="method", leave=False):
        rows.append(
            {"category": category.name, "method": method, "title": PEERS[method].title, "ours": False}
        )
        try:
            rows[-1] |= fitted(category, jobs[method], args)
        except UserError as problem:
            rows[-1]["failed"] = str(problem)
            ProgressBar.write(f"{category.name}: {problem}", file=sys.stderr)
    timed = [row for row in rows if "failed" not in row]
    server = None
    runs: list[Callable[[int], float]] = []
    if timed and args.turns:
        paths = [Path(jobs[row["method"]]["target"]) / "job.json" for row in timed]
        command = [python_of(args.environment).absolute(), WORKER, "serve", *paths]
        server = Server(command, args.output / category.name / "serve.log")
        runs = [partial(server.seconds, row["method"]) for row in timed]
    for workspace in args.workspace:
        for row, run in exported(category, Workspace(workspace), args.batches):
            rows.append(row)
            timed.append(row)
            runs.append(run)
    try:
        for batch in args.batches if args.turns else ():
            variants = [lambda run=run, batch=batch: run(batch) for run in runs]
            seconds = in_turns(variants, args.turns, f"{category.name}: time batch {batch}", pause=PAUSE)
            for row, of_row in zip(timed, seconds):
                row.setdefault("ms_per_image", {})[str(batch)] = 1000 * float(np.median(of_row)) / batch
    finally:
        if server:
            server.close()
        for path in {jobs[method][part] for method in args.methods for part in ("train", "test")}:
            Path(path).unlink(missing_ok=True)
    return rows


def prepare(
    category: layouts.Category, args: argparse.Namespace, backbone: Backbone, weights: Path
) -> dict[str, dict[str, Any]]:
    """By method what its worker is told, with the pictures as CSAD reads them, written as arrays."""
    chosen = settings.load(category.name, PRESET, {})
    test = [path for _, path in category.test_images]
    jobs = {}
    for method in args.methods:
        size, target = PEERS[method].size, args.output / category.name / method
        paths = {part: args.output / category.name / f"{part}_{size}.npy" for part in ("train", "test")}
        view = images.View(size, chosen.images.white_level, read_roi(category, size, chosen.roi))
        for part, sources in (("train", category.train), ("test", test)):
            if not paths[part].exists():
                files.write_array(paths[part], view.read(sources, f"{category.name}: read {part} {size}"))
        jobs[method] = {
            "method": method,
            "target": str(target),
            "weights": str(weights),
            "mean": (backbone.encoder.normalise.mean.flatten() / 255).tolist(),
            "std": (backbone.encoder.normalise.std.flatten() / 255).tolist(),
            "threads": args.threads,
            "seed": args.seed,
            **{part: str(path) for part, path in paths.items()},
        }
        target.mkdir(parents=True, exist_ok=True)
        files.write_json(target / "job.json", jobs[method])
    return jobs


def fitted(category: layouts.Category, job: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """What the method's fit came to; fitted anew where pictures, weights, seed or threads are others than
    before. UserError if the worker failed."""
    target = Path(job["target"])
    made_of = {
        "train": records.digest_images(category.train),
        "test": records.digest_images([path for _, path in category.test_images]),
        "weights": records.digest(Path(job["weights"])),
        "seed": args.seed,
        "threads": args.threads,
        "method": records.as_json(PEERS[job["method"]]._asdict()),
        "worker": records.digest(WORKER),
    }
    if (target / "measured.json").exists():
        earlier = files.read_json(target / "measured.json")
        if earlier["made_of"] == made_of:
            return earlier["row"]
    command = [python_of(args.environment).absolute(), WORKER, "fit", target / "job.json"]
    usage = measured(command, target / "log.txt")
    result = files.read_json(target / "result.json")
    result["process_seconds"] = usage.seconds
    scores = by_split(category, files.read_array(target / "scores.npy"))
    for kind, split in ANOMALIES.items():
        result[f"auroc_{kind}"] = auroc(scores[layouts.GOOD], scores[split])
    if (target / "maps.npy").exists():
        maps = by_split(category, files.read_array(target / "maps.npy"))
        roi = read_roi(category, SIZE, settings.load(category.name, PRESET, {}).roi)
        for kind, split in ANOMALIES.items():
            result[f"pixel_auroc_{kind}"] = pixel_auroc(category, maps, split, roi)
        (target / "maps.npy").unlink()
    is_nan = {key: isinstance(value, float) and math.isnan(value) for key, value in result.items()}
    row = {key: None if is_nan[key] else value for key, value in result.items()}
    files.write_json(target / "measured.json", {"made_of": made_of, "row": row})
    return row


def by_split(category: layouts.Category, values: np.ndarray) -> dict[str, np.ndarray]:
    """(N, ...) of `Category.test_images` by split."""
    splits = np.array([split for split, _ in category.test_images])
    return {split: values[splits == split] for split in layouts.SPLITS}


def pixel_auroc(
    category: layouts.Category, maps: dict[str, np.ndarray], split: str, roi: np.ndarray | None
) -> float | None:
    """In percent; None where the category has no such images, or no masks."""
    try:
        return localisation.measure(category, maps, split, roi).pixel_auroc if category.test(split) else None
    except UserError:
        return None


if __name__ == "__main__":
    run_script(main)
