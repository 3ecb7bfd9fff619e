"""Fits and runs one method of anomalib; benchmarks/peers.py starts it, with the Python of the peers' environment.

That environment has anomalib, PyTorch, timm and NumPy, and nothing of CSAD: this file imports no other of the project.

    python peers_worker.py fit JOB.json          fit a method, score all test images, save scores, maps and the fitted model
    python peers_worker.py serve JOB.json ...    keep fitted methods in memory; answer each line of stdin with seconds

anomalib's torch models are called directly: the post-processor that its command line puts behind them clamps scores to 0..1
by the validation images' range, and what is clamped has lost its order.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

BATCH = 8
PADIM_FEATURES = 100  # drawn at random of the maps' channels, as in PaDiM's paper for a small backbone


class Peer(NamedTuple):
    """A method of anomalib's, with its defaults but for the backbone.

    Attributes:
        title: for tables.
        module: under anomalib.models.image.
        model: class in its torch_model.
        size: side in pixels of the pictures that it takes.
        strides: of the backbone's maps that it looks at; its authors' layers of a ResNet have the same.
        rows: fraction of the patches that PatchCore's coreset keeps.
    """

    title: str
    module: str
    model: str
    size: int
    strides: tuple[int, ...]
    rows: float = 0.0


PEERS = {
    "patchcore_256": Peer("PatchCore 256, 10 % of rows", "patchcore", "PatchcoreModel", 256, (8, 16), 0.1),
    "patchcore_256_1": Peer("PatchCore 256, 1 % of rows", "patchcore", "PatchcoreModel", 256, (8, 16), 0.01),
    "patchcore_512": Peer("PatchCore 512, 1 % of rows", "patchcore", "PatchcoreModel", 512, (8, 16), 0.01),
    "padim_256": Peer("PaDiM 256", "padim", "PadimModel", 256, (4, 8, 16)),
    "dfm_256": Peer("DFM 256", "dfm", "DFMModel", 256, (16,)),
    "dfkde_256": Peer("DFKDE 256", "dfkde", "DfkdeModel", 256, (32,)),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["fit", "serve"])
    parser.add_argument("jobs", type=Path, nargs="+", metavar="JOB", help="written by benchmarks/peers.py")
    args = parser.parse_args()
    # Answers go to the real stdout alone; whatever packages print goes to stderr.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    jobs = [json.loads(path.read_text(encoding="utf-8")) for path in args.jobs]

    import torch

    torch.set_num_threads(jobs[0]["threads"])
    if args.action == "serve":
        return serve(jobs, answers)
    for job in jobs:
        fit(job)


def fit(job: dict[str, Any]) -> None:
    """Fit the job's method on its training pictures, and score its test pictures.

    Writes result.json, scores.npy (N,), maps.npy (N, size, size) if the method has maps, and state.pth.
    """
    import numpy as np
    import timm
    import torch

    torch.manual_seed(job["seed"])
    target, peer = Path(job["target"]), PEERS[job["method"]]
    train, test = (np.load(job[part], mmap_mode="r", allow_pickle=False) for part in ("train", "test"))
    model = build(job)
    libraries_mb = memory_mb("VmRSS")
    start = time.perf_counter()
    model.train()
    with torch.no_grad():
        for batch in batches(train):
            model(as_input(batch, job))
        if peer.rows:
            rows = torch.vstack(model.embedding_store)
            model.embedding_store.clear()
            model.memory_bank = rows[k_center_greedy(rows, max(1, int(peer.rows * len(rows))))]
        else:
            model.fit()
    seconds = time.perf_counter() - start
    model.eval()
    scores, maps = [], []
    for batch in batches(test):
        batch_scores, batch_maps = predict(model, batch, job)
        scores.append(batch_scores)
        maps += [] if batch_maps is None else [batch_maps]
    np.save(target / "scores.npy", np.concatenate(scores))
    if maps:
        np.save(target / "maps.npy", np.concatenate(maps))
    torch.save(model.state_dict(), target / "state.pth")
    import anomalib

    result = {
        "training_seconds": seconds,
        "libraries_mb": libraries_mb,  # before anything is fitted
        "peak_mb": memory_mb("VmHWM"),
        "versions": {package.__name__: package.__version__ for package in (anomalib, torch, timm, np)},
    }
    (target / "result.json").write_text(json.dumps(result), encoding="utf-8")


def k_center_greedy(rows: Any, count: int) -> Any:
    """Indices (count,) of PatchCore's coreset: the first at random, then always the row farthest from all before it.

    The order of anomalib's KCenterGreedy, by one matrix-vector product a step in buffers that stay. Its own loop subtracts
    and squares all rows in new memory each time: several times slower, and so fragmenting that 25,000 rows filled 20 GB.
    Its random projection is left out: to 284 numbers and more, it would lengthen rows of a small backbone.
    """
    import torch

    squares = (rows * rows).sum(1)
    farthest, distances = torch.full_like(squares, torch.inf), torch.empty_like(squares)
    indices = torch.empty(count, dtype=torch.long)
    index = int(torch.randint(len(rows), (1,)))
    for step in range(count):
        indices[step] = index
        torch.addmv(squares, rows, rows[index], alpha=-2, out=distances).add_(squares[index])
        torch.minimum(farthest, distances, out=farthest)
        farthest[index] = -1  # never again, not even a copy of it by rounding
        index = int(farthest.argmax())
    return indices


def serve(jobs: list[dict[str, Any]], answers: Any) -> None:
    """Answer each request {"method", "batch"} with {"seconds"}: how long a batch of test pictures took, maps included."""
    import numpy as np
    import torch

    models = {}
    for job in jobs:
        model = build(job)
        model.load_state_dict(torch.load(Path(job["target"]) / "state.pth", weights_only=True))
        pictures = np.load(job["test"], allow_pickle=False)
        models[job["method"]] = (model.eval(), pictures, job)
    print(json.dumps({"ready": list(models)}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        model, pictures, job = models[request["method"]]
        batch = np.resize(pictures, (request["batch"], *pictures.shape[1:]))
        start = time.perf_counter()
        predict(model, batch, job)
        print(json.dumps({"seconds": time.perf_counter() - start}), file=answers, flush=True)


def build(job: dict[str, Any]) -> Any:
    """The job's torch model of anomalib, with the backbone's weights that the job names."""
    import timm
    import torch

    peer, weights = PEERS[job["method"]], torch.load(job["weights"], weights_only=True)
    backbone = weights["name"]
    info: Any = timm.create_model(backbone, features_only=True).feature_info
    layers = dict(zip(info.reduction(), info.module_name()))  # of several maps of one size the last
    named = [layers[stride] for stride in peer.strides]
    options: dict[str, Any] = {"layer": named[0]} if peer.module == "dfm" else {"layers": named}
    if peer.module == "padim":
        channels = dict(zip(info.reduction(), info.channels()))
        options["n_features"] = min(PADIM_FEATURES, sum(channels[stride] for stride in peer.strides))
    module = importlib.import_module(f"anomalib.models.image.{peer.module}.torch_model")
    model = getattr(module, peer.model)(backbone=backbone, pre_trained=False, **options)
    extractor = model.feature_extractor.feature_extractor
    extractor.load_state_dict({key: weights["state"][key] for key in extractor.state_dict()})
    return model


def predict(model: Any, batch: Any, job: dict[str, Any]) -> tuple[Any, Any]:
    """Raw scores (B,) and maps (B, size, size) or None, float32, of pictures (B, 3, size, size) uint8 RGB."""
    import torch

    with torch.no_grad():
        prediction = model(as_input(batch, job))
    maps = None if prediction.anomaly_map is None else prediction.anomaly_map[:, 0].float().numpy()
    return prediction.pred_score.reshape(-1).float().numpy(), maps


def as_input(batch: Any, job: dict[str, Any]) -> Any:
    """uint8 RGB (B, 3, size, size) as the backbone takes it, normalised by its own mean and std."""
    import numpy as np
    import torch

    mean, std = (255 * torch.tensor(job[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    return (torch.from_numpy(np.array(batch)).float() - mean) / std


def batches(pictures: Any) -> Iterator[Any]:
    for start in range(0, len(pictures), BATCH):
        yield pictures[start : start + BATCH]


def memory_mb(field: str) -> float | None:
    """Of this process, a field of Linux's /proc/self/status: VmRSS now, VmHWM at most; None elsewhere."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return int(status.read_text(encoding="utf-8").split(f"{field}:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main()
