"""Peak memory and processor seconds of stage 1's mask algebra and component features on one native picture.

The masks are drawn: discs of all sizes, some with holes, some in two pieces, overlapping. What SAM-HQ needs to propose them is
not in it; the process's memory before anything is drawn is printed, too.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Iterator

from csad import settings
from csad.errors import run_script
from csad.pseudo_labels import components, masks, one_picture
from csad.pseudo_labels.masks import PackedMasks
from csad.pseudo_labels.proposers import Proposals

import cv2
import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--masks", type=int, default=255)
    parser.add_argument("--width", type=int, default=1600)
    parser.add_argument("--height", type=int, default=1280)
    args = parser.parse_args()
    shape = args.height, args.width
    print(f"before: {peak():.0f} MB")
    start = time.process_time()
    drawn = PackedMasks.pack(draw(args.masks, shape, 0), shape)
    grounding = PackedMasks.pack(draw(40, shape, 1), shape)
    proposals = Proposals(drawn, np.zeros(shape, bool), grounding, np.zeros(shape, bool))
    report(f"{args.masks} masks and 40 instances of {args.width}x{args.height} drawn", start)
    for category in ("juice_bottle", "pushpins"):  # without and with no_sam
        start = time.process_time()
        candidates, refined = one_picture.refine(proposals, settings.load(category, "paper").pseudo_labels)
        report(f"mask algebra as in {category}: {len(candidates)} candidates", start)
    start = time.process_time()
    picture = np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8)
    labels = masks.merge(candidates)
    parts = masks.label_masks(labels, masks.components_in_sight(labels))
    components.shallow_features(picture, parts)
    report(f"features and crops of {len(parts)} components", start)


def draw(count: int, shape: tuple[int, int], seed: int) -> Iterator[np.ndarray]:
    """Masks (H, W) bool."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        mask = np.zeros(shape, np.uint8)
        centre, radius = (
            (rng.random(2) * shape[::-1]).astype(int),
            int(10 + rng.random() ** 2 * min(shape) / 3),
        )
        cv2.circle(mask, centre.tolist(), radius, 1, cv2.FILLED)
        if number % 3 == 0:
            cv2.circle(mask, centre.tolist(), radius // 2, 0, cv2.FILLED)
        if number % 5 == 0:
            cv2.circle(mask, (rng.random(2) * shape[::-1]).astype(int).tolist(), radius // 2, 1, cv2.FILLED)
        yield mask > 0


def report(what: str, start: float) -> None:
    print(f"{what}: {time.process_time() - start:.1f} s, peak so far {peak():.0f} MB")


def peak() -> float:
    """The process's peak memory in MB (10^6 bytes)."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return kilobytes * 1024 / 1e6


if __name__ == "__main__":
    run_script(main)
