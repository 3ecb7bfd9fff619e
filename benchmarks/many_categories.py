"""Stages 4 and 5 and the report over many categories: seconds and peak memory of each, and how large their files get.

One rendered category is trained with tiny settings; it then stands under as many names as asked for: images, checkpoints, scores
and maps as hard links, records with the names in them changed, so that every stage reads real files and checks real records.

    python -m benchmarks.many_categories --workspace /tmp/many --numbers 20 100
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from csad.data import files
from csad.data.files import path_argument
from csad.errors import run_script
from csad.progress import ProgressBar
from csad.synthetic.writer import Settings, write_dataset

from tabulate import tabulate

from benchmarks.measuring import measured_script, options_of

CATEGORY = "pushpins"
QUICK = "--preset quick --backbone efficientnet_lite0 --device cpu --images.size 256".split()
TINY = (
    "--segmentor.epochs 3 --segmentor.unsupervised_from_epoch 1 --segmentor.width 16 --memory.rows 50".split()
)
TRAINING = ("pseudo_label", "train_segmentor", "patch_memory")
MEASURED = {  # script -> its largest table
    "export_model.py": "export_report.json",
    "benchmark_performance.py": "score_combine_result.txt",
    "report.py": "report.html",
}
HEADERS = ("categories", "script", "seconds", "processor ms each", "peak MB", "MB of its largest table")


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument(
        "--workspace",
        type=path_argument,
        required=True,
        help="an empty folder, or one that this has trained in before",
    )
    parser.add_argument("--numbers", type=int, nargs="+", default=[20, 100], help="of categories")
    parser.add_argument(
        "--scripts",
        nargs="+",
        default=list(MEASURED),
        choices=list(MEASURED),
        metavar="SCRIPT",
        help=f"what is measured, in this order: {', '.join(MEASURED)}; exports take 14 MB a category",
    )
    args = parser.parse_args()
    trained = args.workspace / "1"
    write_dataset(trained / "dataset", [CATEGORY], Settings(128, 12, 6, 4, 4, 4), workers=2, overwrite=False)
    for script in TRAINING:
        measured_script(script, trained, options(trained), trained / f"{script}.log")
    rows = []
    for number in args.numbers:
        many = args.workspace / str(number)
        multiply(trained, many, number)
        for script in args.scripts:
            name = script.removesuffix(".py")
            usage = measured_script(name, many, options(many), many / f"{name}.log")
            written = (many / MEASURED[script]).stat().st_size / 1e6
            of_processor = 1000 * usage.processor_seconds / number
            rows.append((number, script, usage.seconds, of_processor, usage.peak_mb, written))
            print(tabulate(rows, HEADERS, tablefmt="github", floatfmt=".2f"), flush=True)


def options(workspace: Path) -> list[object]:
    return ["--dataset_root", workspace / "dataset", *QUICK, *TINY]


def multiply(trained: Path, many: Path, number: int) -> None:
    """The trained category under ``number`` names; starts over where there is something already."""
    shutil.rmtree(many, ignore_errors=True)
    of_category = [
        path
        for path in sorted(trained.rglob("*"))
        if path.is_file() and CATEGORY in str(path.relative_to(trained))
    ]
    for index in ProgressBar(range(number), desc="multiply", unit="category", leave=False):
        for path in of_category:
            target = many / str(path.relative_to(trained)).replace(CATEGORY, f"category_{index:04d}")
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".json":
                target.write_text(path.read_text().replace(CATEGORY, f"category_{index:04d}"))
            else:
                os.link(path, target)
    files.write_bytes(many / "ckpt/backbone.json", (trained / "ckpt/backbone.json").read_bytes())


if __name__ == "__main__":
    run_script(main)
