"""Stage 4: fuse everything into one deployable model per category, and evaluate it.

``--format torch`` puts segmentor, LGST and both normalisations together into ckpt/pytorch_models/{category}.pth, a
state dict with the published keys. Then, and alone with ``--inference_only``, every test image is scored with it:
anomaly_score/{category}_{format}_scores.csv (image, kind, score), AUROCs and milliseconds per image beside it as JSON.
"""

from __future__ import annotations

import csv
import io
import time

import numpy as np
import torch
from tqdm import tqdm

import settings
from deploy.assembly import fused_state
from deploy.engines import Engine, open_model
from errors import run_script
from loco import files, images, layout
from loco.metrics import auroc
from models.device import choose_device

WARM_UP = 3  # images scored before the clock counts


def main() -> None:
    parser = settings.command_line(__doc__)
    parser.add_argument("--format", default="torch", choices=["torch"], help="runtime of the exported model")
    parser.add_argument("--inference_only", action="store_true", help="evaluate exported models, export nothing")
    args = parser.parse_args()
    workspace = layout.Workspace(args.workspace)
    dataset = layout.Dataset(args.dataset_root or workspace.default_dataset)
    categories = dataset.select(args.categories)
    device = choose_device(args.device)
    reports = {}
    with workspace.lock():
        for category in categories:
            path = workspace.exported_model(category.name, args.format)
            if not args.inference_only:
                # Cheap, and always from the newest artefacts: nothing to skip or resume here.
                files.write_state(path, fused_state(category.name, workspace))
                print(f"{category.name}: wrote {path}")
            files.require(path, f"export_model.py --format {args.format}")
            engine = open_model(path, args.format, device)
            reports[category.name] = evaluate(category, engine, workspace)
    print_table(reports)


def evaluate(category: layout.Category, engine: Engine, workspace: layout.Workspace) -> dict:
    """Score every test image one by one, as a production line would; write the CSV and the JSON beside it."""
    rows, seconds = [], []
    scores: dict[str, list[float]] = {kind: [] for kind in layout.KINDS}
    for kind, path in tqdm(category.test_images, desc=f"{category.name}: evaluate {engine.runtime}", unit="image"):
        image = torch.from_numpy(images.read_rgb(path, settings.IMAGE_SIZE).transpose(2, 0, 1).copy())[None]
        prepared = images.normalise(image).numpy()
        start = time.perf_counter()
        score = float(engine.score(prepared)[0])
        seconds.append(time.perf_counter() - start)
        scores[kind].append(score)
        rows.append((path.relative_to(category.root).as_posix(), kind, repr(score)))

    good = np.array(scores[layout.GOOD])
    logical, structural = (auroc(good, np.array(scores[kind])) for kind in (layout.LOGICAL, layout.STRUCTURAL))
    report = {"category": category.name, "runtime": engine.runtime, "auroc_logical": logical,
              "auroc_structural": structural, "auroc_mean": float(np.nanmean([logical, structural])),
              "ms_per_image": 1000 * float(np.median(seconds[WARM_UP:] or seconds)), "images": len(rows),
              "dataset": category.root.parent.name,
              "stand_ins": engine.metadata.get("stand_ins", []), "model": engine.metadata}

    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("image", "kind", "score"))
    writer.writerows(rows)
    target = workspace.evaluation(category.name, engine.runtime)
    files.write_text(target, table.getvalue())
    files.write_json(target.with_suffix(".json"), report)
    return report


def print_table(reports: dict[str, dict]) -> None:
    columns = ("auroc_logical", "auroc_structural", "auroc_mean", "ms_per_image")
    print(f"\n{'category':24}" + "".join(f"{column:>18}" for column in columns))
    for name, report in reports.items():
        print(f"{name:24}" + "".join(f"{report[column]:18.3f}" for column in columns))
    if len(reports) > 1:
        means = (np.nanmean([report[column] for report in reports.values()]) for column in columns)
        print(f"{'average':24}" + "".join(f"{mean:18.3f}" for mean in means))
    stand_ins = sorted({name for report in reports.values() for name in report["stand_ins"]})
    if stand_ins:
        print(f"made with stand-ins: {', '.join(stand_ins)}; not comparable with published figures")


if __name__ == "__main__":
    run_script(main)
