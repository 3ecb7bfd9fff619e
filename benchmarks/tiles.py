"""What tiles are good for: small defects in large photographs, found by the patch memory alone.

Renders good pictures of one product, 2048 pixels wide, and plants one spot 6 pixels wide, darker or lighter than what is there,
in half of the test pictures. Then patch_memory.py sees them as a whole and in tiles: image AUROC, seconds, peak memory.

    python -m benchmarks.tiles --workspace /tmp/tiles
"""

from __future__ import annotations

from pathlib import Path

from csad.data import files
from csad.data.data_sets import Dataset
from csad.data.files import path_argument
from csad.data.layouts import GOOD, STRUCTURAL
from csad.data.workspace import Workspace
from csad.errors import run_script
from csad.evaluation.metrics import auroc
from csad.progress import ProgressBar
from csad.synthetic.writer import Settings, write_dataset

import numpy as np
from PIL import Image
from tabulate import tabulate

from benchmarks.measuring import measured_script, options_of

SIDE, SPOT, CONTRAST = 2048, 6, 60  # pixels, pixels, of 255 levels
CATEGORY = "pushpins"
TRAIN, TEST = 30, 40  # good pictures; of the test's, as many more get a spot


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--workspace", type=path_argument, required=True, help="for pictures and results")
    parser.add_argument("--tiles", nargs="+", default=["1x1", "2x2", "4x4"])
    args = parser.parse_args()
    dataset = args.workspace / "dataset"
    settings = Settings(SIDE, TRAIN, TRAIN // 3, 2 * TEST, 0, 0, seed=1)
    write_dataset(dataset, [CATEGORY], settings, workers=2, overwrite=False)
    draw_spots(dataset / CATEGORY / "test", TEST)
    rows = []
    for tiles in args.tiles:
        workspace = Workspace(args.workspace / tiles)
        options = f"--preset quick --backbone efficientnet_lite0 --tiles {tiles} --overwrite".split()
        usage = measured_script("patch_memory", workspace.root, ["--dataset_root", dataset, *options])
        scores = files.read_array(workspace.scores(CATEGORY, "memory", "struc"))
        good = len(Dataset(dataset).select(None)[0].test(GOOD))
        rows.append((tiles, 100 * auroc(scores[:good], scores[good:]), usage.seconds, usage.peak_mb))
    print(tabulate(rows, ("tiles", "image AUROC", "seconds", "peak MB"), tablefmt="github", floatfmt=".1f"))


def draw_spots(test: Path, count: int) -> None:
    """Turn the last ``count`` good pictures into structural anomalies."""
    for path in ProgressBar(
        sorted((test / GOOD).glob("*.png"))[count:], desc="draw spots", unit="image", leave=False
    ):
        target = test / STRUCTURAL / path.name
        target.parent.mkdir(exist_ok=True)
        rng = np.random.default_rng(int(path.stem))
        image = np.asarray(Image.open(path).convert("RGB")).astype(np.float32)
        row, column = rng.integers(SIDE // 8, SIDE * 7 // 8, 2)
        away = np.hypot(*np.ogrid[-SPOT : SPOT + 1, -SPOT : SPOT + 1])
        change = CONTRAST * np.clip(SPOT / 2 - away + 0.5, 0, 1)[..., None]
        spot = image[row - SPOT : row + SPOT + 1, column - SPOT : column + SPOT + 1]
        spot += change if spot.mean() < 128 else -change
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(target)
        path.unlink()


if __name__ == "__main__":
    run_script(main)
