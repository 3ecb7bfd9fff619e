"""Score images with an exported model, and say what is wrong with them.

    python predict.py photos/ extra.png --model ckpt/onnx_models/screw_bag.onnx

Every image gets a score, a verdict against the threshold, each branch's share of the score, the spot that looks most
unusual, and the components of which there is too much or too little. One line per image goes to OUTPUT/predictions.csv and
OUTPUT/predictions.jsonl as soon as it is scored; --save_maps adds a picture of each to OUTPUT/maps/. With --watch the
folders are looked at once a second and new or changed files scored, until Ctrl-C; started again, it goes on where it was.
An unreadable file is reported and skipped; files that are no images are counted and named.

Exit status: 0 every image is normal, 4 some are anomalous, 3 some could not be read or judged, 2 nothing was done (one
sentence says why).
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
from contextlib import nullcontext
from pathlib import Path

from filelock import FileLock, Timeout

from data import files
from data.files import place
from data.images import SUFFIXES
from deploy.engines import Engine, device_name, open_model
from deploy.inspection import ANOMALOUS, UNDECIDED, UNREADABLE, VERDICTS, Verdict, judge, read_picture
from deploy.thresholds import threshold_of
from errors import UserError, interrupts_wait, run_script
from models.fusion import BRANCHES

READERS = min(4, os.cpu_count() or 1)
AHEAD = 2  # batches being decoded while one is scored
POLL_SECONDS = 1.0
MAP_SIDE = 768  # longer side of each picture that --save_maps draws
NAMED = 5  # files left out that are named
COLUMNS = ("image", "verdict", "score", "threshold", *(f"{branch}_score" for branch in BRANCHES), "unusual_x", "unusual_y",
           "findings")
State = tuple[int, int]  # bytes and time of change of a file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=place, metavar="IMAGE_OR_FOLDER", help="folders are searched with all below")
    parser.add_argument("--model", type=place, required=True, help=".pth, .onnx or .xml written by export_model.py")
    parser.add_argument("--false_positive_rate", type=float,
                        help="share of good images that may be called anomalous; the threshold follows from the validation "
                             "images' scores in the model (default: 0.01, or the threshold that was set in the model)")
    parser.add_argument("--threshold", type=float, help="call higher scores anomalous, whatever the model says")
    parser.add_argument("--output", type=place, default=Path("predictions"), help="folder to write to (default: predictions)")
    parser.add_argument("--save_maps", action="store_true", help="draw what was found into OUTPUT/maps")
    parser.add_argument("--watch", action="store_true", help="go on and score files as they appear")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; for .xml OpenVINO's GPU, NPU, AUTO, too")
    args = parser.parse_args()
    if args.batch_size < 1:
        raise UserError(f"--batch_size is {args.batch_size}; it must be 1 or more")
    if args.watch:
        for folder in args.images:
            if not folder.is_dir():
                raise UserError(f"--watch needs folders, and {folder} is none")
    found = Found(args.images, args.output)
    if not args.watch:
        found.require_images()
    engine = open_model(args.model, device_name(args.device, args.model))
    if not engine.has_maps and args.save_maps:
        raise UserError(f"{args.model} gives scores only; export it again with --with_map, or leave --save_maps")
    threshold, words = threshold_of(engine.metadata, args.threshold, args.false_positive_rate, str(args.model))
    print(f"{engine.runtime} on {engine.device}, {engine.precision}; threshold {threshold:.4g}{f': {words}' if words else ''}")
    top = Path(os.path.commonpath([(path if path.is_dir() else path.parent).resolve() for path in args.images]))
    with (Output(args.output, top, go_on=args.watch) as output,
          interrupts_wait() if args.watch else nullcontext(lambda: False) as interrupted):
        rounds = watch(args.images, args.output, output.scored) if args.watch else [found.images]
        try:
            for verdict in itertools.chain.from_iterable(
                    predict(paths, engine, threshold, args.batch_size, MAP_SIDE if args.save_maps else None)
                    for paths in itertools.takewhile(lambda _: not interrupted(), rounds)):
                output.write(verdict)
                if interrupted():
                    break
        except KeyboardInterrupt:
            if not args.watch:
                raise UserError(f"interrupted; what is scored so far is in {output.table}, and the same command starts anew "
                                "and replaces it") from None
    counts = output.counts
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + f"; see {output.table}")
    if found.left_out:
        named = ", ".join(str(path) for path in found.left_out[:NAMED])
        print(f"{len(found.left_out)} files were left out because they are no images: {named}"
              f"{' and others' if len(found.left_out) > NAMED else ''}")
    raise SystemExit(3 if counts[UNREADABLE] + counts[UNDECIDED] else 4 if counts[ANOMALOUS] else 0)


class Found:
    """The named files, and all images in the named folders, sorted; what lies in ``output`` is our own.

    Attributes:
        images: to be scored.
        left_out: files in the folders that are no images.

    Raises:
        UserError: a place does not exist.
    """

    def __init__(self, places: Sequence[Path], output: Path):
        self.places, self.images, self.left_out = places, [], []
        for one in places:
            if not one.exists() and not one.is_symlink():
                raise UserError(f"there is no {one}; name an image or a folder of images")
            if one.is_dir():
                listed, others = images_in(one, output)
                self.images += list(listed)
                self.left_out += others
            else:
                self.images.append(one)

    def require_images(self) -> None:
        """Raises UserError where there is no image."""
        if not self.images:
            raise UserError(f"no images in {', '.join(map(str, self.places))}; expected files ending in {', '.join(SUFFIXES)}")


def images_in(folder: Path, output: Path) -> tuple[dict[Path, State], list[Path]]:
    """All images below a folder with their states, sorted by path, and all other files; links are followed, once each."""
    own = output.resolve()
    found, others, seen = {}, [], set()
    for here, below, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # a link back to where we have been
            below[:] = []
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if not name.startswith(".") and (Path(here) / name).resolve() != own
                          and not is_ours(Path(here) / name))
        for name in sorted(names):
            path = Path(here) / name
            if name.startswith(".") or (name in ("predictions.csv", "predictions.jsonl")):
                continue
            if not name.lower().endswith(SUFFIXES):
                others.append(path)
                continue
            try:
                status = path.stat()
            except OSError:
                if not path.is_symlink():  # taken away since
                    continue
                found[path] = (0, 0)  # a link to nothing, or to itself, is an image that cannot be read
            else:
                found[path] = (status.st_size, status.st_mtime_ns)
    return dict(sorted(found.items())), others


def is_ours(folder: Path) -> bool:
    """Whether a folder holds the drawings of an earlier run."""
    return folder.name == "maps" and (folder.parent / "predictions.jsonl").exists()


def watch(folders: Sequence[Path], output: Path, scored: dict[str, State]) -> Iterator[list[Path]]:
    """Once per poll the files that are new or changed, and finished: neither empty nor different from one poll ago.

    Args:
        scored: what an earlier run scored, by name.
    """
    before: dict[Path, State] = {}
    while True:
        now = dict(itertools.chain.from_iterable(images_in(folder, output)[0].items() for folder in folders))
        ready = [path for path, state in now.items()
                 if state[0] and before.get(path) == state and scored.get(str(path)) != state]
        # Only what is still there is remembered, so memory follows the folder's size.
        scored = {str(path): now[path] for path in now if str(path) in scored and path not in ready
                  and scored[str(path)] == now[path]} | {str(path): now[path] for path in ready}
        before = now
        yield ready
        time.sleep(POLL_SECONDS)


def predict(paths: Iterable[Path], engine: Engine, threshold: float, batch_size: int,
            shown_side: int | None) -> Iterator[Verdict]:
    """Score images in order. A few are decoded ahead by threads, so memory does not depend on how many there are."""
    paths = iter(paths)

    def read(path: Path):
        return read_picture(path, path, engine, shown_side)

    with ThreadPoolExecutor(READERS) as readers:
        decoding = deque(readers.submit(read, path) for path in itertools.islice(paths, AHEAD * batch_size))
        while decoding:
            batch = [decoding.popleft().result() for _ in range(min(batch_size, len(decoding)))]
            decoding.extend(readers.submit(read, path) for path in itertools.islice(paths, batch_size))
            yield from judge(batch, engine, threshold)


class Output:
    """predictions.csv, predictions.jsonl and maps/, written line by line, so that a line once printed is on the disk.

    Args:
        folder: made if need be; held by one run at a time.
        top: folder to which the names in maps/ are relative.
        go_on: append to the tables of an earlier run instead of replacing them.

    Attributes:
        scored: the states of the files that an earlier run scored, by name.
        counts: of each verdict, what this run wrote.

    Raises:
        UserError: another run writes there.
    """

    def __init__(self, folder: Path, top: Path, go_on: bool = False):
        self.folder, self.top, self.go_on = folder, top, go_on
        self.table = folder / "predictions.csv"
        self.scored: dict[str, State] = {}
        self.counts = dict.fromkeys(VERDICTS, 0)

    def __enter__(self) -> Output:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.folder / ".predict.lock")
        try:
            self.lock.acquire(timeout=0)
        except Timeout as problem:
            raise UserError(f"another predict.py is writing to {self.folder.resolve()}; give this one an --output of its own"
                            ) from problem
        log = self.table.with_suffix(".jsonl")
        if self.go_on and log.exists():
            self._read_log(log)
        mode = "a" if self.go_on and log.exists() else "w"
        if mode == "w":
            self.table.unlink(missing_ok=True)
        fresh = mode == "w" or not self.table.exists()
        self.csv = open(self.table, mode, newline="", encoding="utf-8", errors="backslashreplace")
        self.lines = open(log, mode, encoding="utf-8", errors="backslashreplace")
        self.rows = csv.writer(self.csv, lineterminator="\n")
        if fresh:
            self.rows.writerow(COLUMNS)
        return self

    def _read_log(self, log: Path) -> None:
        """What was scored; a last line that a crash cut off goes, and its image is scored again."""
        content = log.read_bytes()
        whole = content[:content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            files.write_bytes(log, whole)
        for line in whole.splitlines():
            try:
                entry = json.loads(line)
                self.scored[entry["image"]] = (entry["bytes"], entry["changed_ns"])
            except (ValueError, KeyError, TypeError):
                continue

    def __exit__(self, *_) -> None:
        self.csv.close()
        self.lines.close()
        self.lock.release()

    def write(self, verdict: Verdict) -> None:
        if verdict.drawing is not None:
            # A link to an image is called what the link is called: where it leads to may lie outside of `top`.
            name = Path(os.path.relpath(verdict.name.parent.resolve() / verdict.name.name, self.top))
            if name.parts[0] == os.pardir:
                raise UserError(f"{verdict.name} no longer lies in {self.top}, so its picture would not lie in "
                                f"{self.folder}/maps; run the same command again")
            files.write_image(self.folder / "maps" / name.with_name(f"{name.name}.map.png"), verdict.drawing)
        shares = verdict.branch_scores or {}
        self.rows.writerow([verdict.name, verdict.verdict, *("" if value is None else f"{value:.6g}" for value in (
            verdict.score, verdict.threshold, *(shares.get(branch) for branch in BRANCHES))),
            *(verdict.unusual or ("", "")), "; ".join(verdict.findings)])
        try:
            status = verdict.name.stat()
            state = {"bytes": status.st_size, "changed_ns": status.st_mtime_ns}
        except OSError:
            state = {"bytes": None, "changed_ns": None}
        self.lines.write(json.dumps(verdict.as_json() | state, ensure_ascii=False, allow_nan=False) + "\n")
        self.csv.flush()
        self.lines.flush()
        self.counts[verdict.verdict] += 1
        print(verdict, flush=True)


if __name__ == "__main__":
    run_script(main)
