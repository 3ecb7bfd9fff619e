"""Score images with an exported model, and say what is wrong with them.

    python predict.py photos/ extra.png --model ckpt/onnx_models/screw_bag.onnx

Every image gets a score, a verdict against the threshold, each branch's share of the score, the spot that looks most
unusual, and the components of which there is too much or too little. One line per image goes to OUTPUT/predictions.csv and
OUTPUT/predictions.jsonl as soon as it is scored; --save_maps adds a picture of each to OUTPUT/maps/. With --watch the
folders are looked at once a second and new or changed files scored, until Ctrl-C. An unreadable file is reported and skipped.

Exit status: 0 every image is normal, 4 some are anomalous, 3 some could not be read, 2 nothing was done (one sentence says why).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import settings
from data import files, images
from data.layouts import IMAGE_SUFFIXES
from deploy.engines import Engine, open_model
from errors import UserError, run_script
from evaluation.deviations import Deviation, deviations
from models.device import choose_device
from report.pictures import heat_overlay, label_overlay, shrink, side_by_side

READERS = min(4, os.cpu_count() or 1)
AHEAD = 2  # batches being decoded while one is scored
POLL_SECONDS = 1.0
MAP_SIDE = 768  # longer side of each picture that --save_maps draws
NORMAL, ANOMALOUS, UNREADABLE = "normal", "anomalous", "unreadable"
COLUMNS = ("image", "verdict", "score", "threshold", "lgst_score", "patch_histogram_score", "unusual_x", "unusual_y", "findings")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER", help="folders are searched with all below")
    parser.add_argument("--model", type=Path, required=True, help=".pth, .onnx or .xml written by export_model.py")
    parser.add_argument("--false_positive_rate", type=float, default=0.01,
                        help="share of good images that may be called anomalous; the threshold follows from the validation "
                             "images' scores in the model (default: 0.01)")
    parser.add_argument("--threshold", type=float, help="call higher scores anomalous, whatever the model says")
    parser.add_argument("--output", type=Path, default=Path("predictions"), help="folder to write to (default: predictions)")
    parser.add_argument("--save_maps", action="store_true", help="draw what was found into OUTPUT/maps")
    parser.add_argument("--watch", action="store_true", help="go on and score files as they appear")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    args = parser.parse_args()
    if args.batch_size < 1:
        raise UserError(f"--batch_size is {args.batch_size}; it must be 1 or more")
    rounds = watch(args.images, args.output) if args.watch else [find_images(args.images, args.output)]
    engine = open_model(args.model, choose_device(args.device))
    if not engine.metadata.get("with_map", True) and args.save_maps:
        raise UserError(f"{args.model} gives scores only; export it again with --with_map, or leave --save_maps")
    threshold = choose_threshold(args.threshold, args.false_positive_rate, engine.metadata, args.model)
    top = Path(os.path.commonpath([(path if path.is_dir() else path.parent).resolve() for path in args.images]))
    counts = dict.fromkeys((NORMAL, ANOMALOUS, UNREADABLE), 0)
    with Output(args.output, top) as output:
        try:
            for paths in rounds:
                for image in predict(paths, engine, threshold, args.batch_size, MAP_SIDE if args.save_maps else None):
                    output.write(image)
                    counts[image.verdict] += 1
        except KeyboardInterrupt:
            if not args.watch:
                raise UserError(f"interrupted; what is scored so far is in {output.table}, and the same command starts anew "
                                "and replaces it") from None
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + f"; see {output.table}")
    raise SystemExit(3 if counts[UNREADABLE] else 4 if counts[ANOMALOUS] else 0)


def choose_threshold(given: float | None, rate: float, metadata: dict[str, Any], model: Path) -> float:
    """The given threshold, or the one that a share ``rate`` of the validation images' scores exceeds.

    Raises:
        UserError: the rate is no share, or the model does not know its validation scores.
    """
    if given is not None:
        return given
    if not 0 <= rate <= 1:
        raise UserError(f"--false_positive_rate is {rate}; it must lie between 0 and 1")
    if not len(metadata.get("validation_scores", [])):
        raise UserError(f"{model} does not know the scores of validation images; name a --threshold, or export it again from "
                        "the stages' files")
    return float(np.quantile(metadata["validation_scores"], 1 - rate))


def find_images(places: Sequence[Path], output: Path) -> list[Path]:
    """The named files, and all images in the named folders, sorted; what lies in ``output`` is our own.

    Raises:
        UserError: a place does not exist, or there is no image.
    """
    found = list(itertools.chain.from_iterable(
        (path for path, _ in images_in(place, output)) if place.is_dir() else [place] for place in places))
    for place in places:
        if not place.exists():
            raise UserError(f"there is no {place}; name an image or a folder of images")
    if not found:
        raise UserError(f"no images in {', '.join(map(str, places))}; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    return found


def images_in(folder: Path, output: Path) -> list[tuple[Path, tuple[int, int]]]:
    """(path, (bytes, time of change)) of all images below a folder, sorted by path."""
    own = output.resolve()
    ours = (own, own / "maps")  # the second where the output goes to the very folder that is scored
    found = []
    for here, below, names in os.walk(folder):
        below[:] = [name for name in below if not name.startswith(".") and (Path(here) / name).resolve() not in ours]
        for name in names:
            if not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES):
                path = Path(here) / name
                try:
                    status = path.stat()
                except FileNotFoundError:  # taken away since
                    continue
                found.append((path, (status.st_size, status.st_mtime_ns)))
    return sorted(found)


def watch(folders: Sequence[Path], output: Path) -> Iterator[list[Path]]:
    """Once per poll the files that are new or changed, and finished: neither empty nor different from one poll ago.

    Raises:
        UserError: a folder is none.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--watch needs folders, and {folder} is none")
    return _watch(folders, output)


def _watch(folders: Sequence[Path], output: Path) -> Iterator[list[Path]]:
    before: dict[Path, tuple[int, int]] = {}
    scored: dict[Path, tuple[int, int]] = {}
    while True:
        now = dict(itertools.chain.from_iterable(images_in(folder, output) for folder in folders))
        ready = [path for path, state in now.items() if state[0] and before.get(path) == state and scored.get(path) != state]
        # Only what is still there is remembered, so memory follows the folder's size.
        scored = {path: state for path, state in scored.items() if path in now} | {path: now[path] for path in ready}
        before = now
        yield ready
        time.sleep(POLL_SECONDS)


class Picture(NamedTuple):
    """An image as the network and as people see it, or why there is none."""

    path: Path
    pixels: np.ndarray | None = None  # (256, 256, 3) uint8
    shown: np.ndarray | None = None  # at most `MAP_SIDE` long, where maps are drawn
    size: tuple[int, int] = (0, 0)  # width and height in pixels
    problem: str = ""


class Prediction(NamedTuple):
    """What is known about one image; fields are None where the model or the file does not tell."""

    path: Path
    verdict: str
    threshold: float
    score: float | None = None
    lgst_score: float | None = None
    patch_histogram_score: float | None = None
    unusual: tuple[int, int] | None = None  # x and y, in the image's own pixels, of the anomaly map's maximum
    components: Sequence[Deviation] = ()
    drawing: np.ndarray | None = None
    problem: str = ""

    @property
    def findings(self) -> str:
        return self.problem or "; ".join(deviation.words for deviation in self.components)


def predict(paths: Iterable[Path], engine: Engine, threshold: float, batch_size: int,
            shown_side: int | None) -> Iterator[Prediction]:
    """Score images in order. A few are decoded ahead by threads, so memory does not depend on how many there are."""
    paths = iter(paths)
    with ThreadPoolExecutor(READERS) as readers:
        decoding = deque(readers.submit(read, path, shown_side) for path in itertools.islice(paths, AHEAD * batch_size))
        while decoding:
            batch = [decoding.popleft().result() for _ in range(min(batch_size, len(decoding)))]
            decoding.extend(readers.submit(read, path, shown_side) for path in itertools.islice(paths, batch_size))
            readable = [picture for picture in batch if picture.pixels is not None]
            scored = iter(judge(readable, engine, threshold) if readable else [])
            for picture in batch:
                yield (next(scored) if picture.pixels is not None
                       else Prediction(picture.path, UNREADABLE, threshold, problem=picture.problem))


def read(path: Path, shown_side: int | None) -> Picture:
    try:
        image = images.read_rgb(path)
    except UserError as problem:
        return Picture(path, problem=str(problem))
    pixels = images.resize(image, settings.IMAGE_SIZE)
    return Picture(path, pixels, None if shown_side is None else shrink(image, shown_side), image.shape[1::-1])


def judge(pictures: Sequence[Picture], engine: Engine, threshold: float) -> list[Prediction]:
    """Score one batch."""
    batch = torch.from_numpy(np.stack([picture.pixels for picture in pictures]).transpose(0, 3, 1, 2).copy())
    prepared = (batch if engine.metadata.get("raw_input") else images.normalise(batch)).numpy()
    if not engine.metadata.get("with_map", True):
        return [Prediction(picture.path, ANOMALOUS if score > threshold else NORMAL, threshold, float(score))
                for picture, score in zip(pictures, engine.score(prepared))]
    found = engine.findings(prepared)
    predictions = []
    for index, picture in enumerate(pictures):
        anomaly_map, label_map, score = found.anomaly_map[index], found.label_map[index], float(found.score[index])
        row, column = np.unravel_index(anomaly_map.argmax(), anomaly_map.shape)
        width, height = picture.size
        drawing = None if picture.shown is None else side_by_side(
            picture.shown, label_overlay(picture.shown, label_map), heat_overlay(picture.shown, anomaly_map))
        histogram = engine.metadata.get("histogram")
        predictions.append(Prediction(
            picture.path, ANOMALOUS if score > threshold else NORMAL, threshold, score, float(found.lgst_score[index]),
            float(found.patch_histogram_score[index]),
            (int((column + 0.5) * width / anomaly_map.shape[1]), int((row + 0.5) * height / anomaly_map.shape[0])),
            deviations(label_map, histogram) if histogram else (), drawing))
    return predictions


class Output:
    """predictions.csv, predictions.jsonl and maps/, written line by line, so that a line once printed is on the disk.

    Args:
        folder: made if need be; the tables of an earlier run in it are replaced.
        top: folder to which the names in maps/ are relative.
    """

    def __init__(self, folder: Path, top: Path):
        self.folder, self.top = folder, top
        self.table = folder / "predictions.csv"

    def __enter__(self) -> Output:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.csv = open(self.table, "w", newline="", encoding="utf-8", errors="backslashreplace")
        self.lines = open(self.table.with_suffix(".jsonl"), "w", encoding="utf-8", errors="backslashreplace")
        self.rows = csv.writer(self.csv, lineterminator="\n")
        self.rows.writerow(COLUMNS)
        return self

    def __exit__(self, *_) -> None:
        self.csv.close()
        self.lines.close()

    def write(self, image: Prediction) -> None:
        if image.drawing is not None:
            # A link to an image is called what the link is called: where it leads to may lie outside of `top`.
            name = Path(os.path.relpath(image.path.parent.resolve() / image.path.name, self.top))
            if name.parts[0] == os.pardir:
                raise UserError(f"{image.path} no longer lies in {self.top}, so its picture would not lie in {self.folder}/maps; "
                                "run the same command again")
            files.write_image(self.folder / "maps" / name.with_name(name.name.removesuffix(".png") + ".png"), image.drawing)
        self.rows.writerow([image.path, image.verdict, *("" if value is None else f"{value:.6g}" for value in (
            image.score, image.threshold, image.lgst_score, image.patch_histogram_score)), *(image.unusual or ("", "")),
            image.findings])
        self.lines.write(json.dumps({
            "image": str(image.path), "verdict": image.verdict, "score": image.score, "threshold": image.threshold,
            "lgst_score": image.lgst_score, "patch_histogram_score": image.patch_histogram_score, "unusual": image.unusual,
            "components": [one._asdict() | {"words": one.words} for one in image.components],
            "problem": image.problem or None}, ensure_ascii=False) + "\n")
        self.csv.flush()
        self.lines.flush()
        print(sentence(image), flush=True)


def sentence(image: Prediction) -> str:
    if image.score is None:
        return f"{image.verdict:10} {image.path}\n           {image.problem}"
    shares = "" if image.lgst_score is None else (f" = LGST {image.lgst_score:.2f} + patch histogram "
                                                  f"{image.patch_histogram_score:.2f}")
    text = f"{image.verdict:10} {image.path}  score {image.score:.2f}{shares}, threshold {image.threshold:.2f}"
    if image.verdict == ANOMALOUS and image.unusual is not None:
        text += "".join(f"\n           {one.words}" for one in image.components)
        text += f"\n           most unusual spot at x {image.unusual[0]}, y {image.unusual[1]}"
    return text


if __name__ == "__main__":
    run_script(main)
