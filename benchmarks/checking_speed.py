"""How long check_dataset.py takes for large pictures: seconds, processor time, peak memory.

python -m benchmarks.checking_speed --workspace /tmp/checking --images 2000 --side 1024
"""

from __future__ import annotations

from pathlib import Path

from csad.data import images
from csad.data.files import path_argument
from csad.errors import run_script
from csad.progress import ProgressBar
from csad.synthetic.writer import Settings, write_dataset

import numpy as np
from PIL import Image

from benchmarks.measuring import measured_script, options_of

RENDERED = 8


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument(
        "--workspace", type=path_argument, required=True, help="an empty folder, or one with pictures of this"
    )
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--side", type=int, default=1024, help="in pixels")
    args = parser.parse_args()
    rendered, dataset = args.workspace / "rendered", args.workspace / "dataset"
    write_dataset(rendered, ["pushpins"], Settings(args.side, RENDERED, 0, 0, 0, 0), 2, overwrite=False)
    write_shifted(sorted(rendered.rglob("train/good/*.png")), dataset, args.images)
    log = args.workspace / "check_dataset.log"
    # 4: small shifts are copies.
    usage = measured_script(
        "check_dataset", args.workspace, ["--dataset_root", dataset], log, accepted=(0, 4)
    )
    print(
        f"{args.images} images of {args.side} pixels: {usage.seconds:.1f} s, "
        f"{usage.processor_seconds:.1f} s of processor time, {usage.peak_mb:.0f} MB"
    )


def write_shifted(rendered: list[Path], folder: Path, count: int) -> None:
    """Pictures of ``folder``/photos, each a rendered one moved round by another distance, which is quicker than rendering it."""
    sources, rng = [images.read_rgb(path) for path in rendered], np.random.default_rng(0)
    for index in ProgressBar(range(count), desc="write pictures", unit="image", leave=False):
        source = sources[index % len(sources)]
        target = folder / "photos" / "train" / "good" / f"{index:05d}.png"
        distance = rng.integers(len(source), size=2)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            Image.fromarray(np.roll(source, distance, (0, 1))).save(target, compress_level=1)


if __name__ == "__main__":
    run_script(main)
