"""Score images with an exported model, and say what is wrong with them.

    python predict.py photos/ extra.png --model ckpt/onnx_models/screw_bag.onnx

Every image gets a score, a verdict against the threshold, each branch's contribution to the score, the spot that looks most
unusual, and the components of which there is too much or too little. One line per image goes to OUTPUT/predictions.csv and
OUTPUT/predictions.jsonl as soon as it is scored; --save_maps adds a picture of each to OUTPUT/maps/. With --watch the
folders are looked at once a second and new or changed files scored, until Ctrl-C; started again, it goes on where it was.
A folder that goes away for a while, like an unmounted share, is said and waited for, and nothing is scored twice.
An unreadable file is reported and skipped; files that are no images are counted and named.

With --ray the workers of a Ray cluster score, also what lists (.csv, .parquet) name and object stores hold (s3://, gs://). The
same lines then go to OUTPUT/parts/, and the same command, started again, goes on where it was (docs/cluster.md).

Exit status: 0 every image is normal, 4 some are anomalous, 3 some could not be read or judged, 2 nothing was done (one
sentence says why).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

import csad
from csad.branches import BRANCHES
from csad.data import files
from csad.data.files import place
from csad.data.listing import short_name
from csad.errors import UNUSABLE, UserError, interrupts_wait, run_script
from csad.evaluation.thresholds import threshold_of
from csad.inference.engines import device_name, open_model
from csad.inference.folders import NO_STATE, Found, State, identity, images_in, only_writer, place_or_url
from csad.inference.inspection import (
    ANOMALOUS,
    UNDECIDED,
    UNREADABLE,
    VERDICTS,
    Picture,
    Verdict,
    as_line,
    printable,
    read_picture,
    state_of,
    verdicts_on,
)

POLL_SECONDS = 1.0
READ_ATTEMPTS = 3  # of --watch, one a poll, before a file is called unreadable: it may still be copied
EMPTY_SECONDS = 60  # after which --watch takes an empty file for finished
REMEMBERED = 200_000  # files that --watch remembers beside as many as were there at a time (some 70 MB)
LONGEST_DRAWING = 242  # bytes of a name before ".map.png", with which and a temporary name's 5 it has 255
MAP_SIDE = 768  # longer side of each picture that --save_maps draws
NAMED = 5  # files left out that are named
COLUMNS = (
    "image",
    "verdict",
    "score",
    "threshold",
    *(f"{branch}_contribution" for branch in BRANCHES),
    "unusual_x",
    "unusual_y",
    "findings",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"CSAD {csad.__version__}")
    parser.add_argument(
        "images",
        nargs="+",
        type=place_or_url,
        metavar="IMAGE_OR_FOLDER",
        help="folders are searched with all below; with --ray lists (.csv, .parquet) and URLs, too",
    )
    parser.add_argument(
        "--model", type=place, required=True, help=".pth, .onnx or .xml written by export_model.py"
    )
    parser.add_argument(
        "--false_positive_rate",
        type=float,
        help="share of good images that may be called anomalous; the threshold follows from the validation "
        "images' scores in the model (default: 0.01, or the threshold that was set in the model)",
    )
    parser.add_argument(
        "--threshold", type=float, help="call higher scores anomalous, whatever the model says"
    )
    parser.add_argument(
        "--output", type=place, default=Path("predictions"), help="folder to write to (default: predictions)"
    )
    parser.add_argument("--save_maps", action="store_true", help="draw what was found into OUTPUT/maps")
    parser.add_argument("--watch", action="store_true", help="go on and score files as they appear")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument(
        "--device",
        default="auto",
        help="auto, cpu, cuda, cuda:1, mps; for .xml OpenVINO's GPU, NPU, AUTO, too",
    )
    cluster = parser.add_argument_group("several workers or machines")
    cluster.add_argument("--ray", metavar="ADDRESS", help="local, auto or HOST:PORT of a Ray cluster")
    cluster.add_argument("--column", help="of lists, that holds the images' paths or URLs (default: image)")
    cluster.add_argument("--format", choices=["jsonl", "parquet"], help="of the parts (default: jsonl)")
    cluster.add_argument(
        "--shard_size", type=int, metavar="IMAGES", help="in a part (default: 1000, of few images fewer)"
    )
    cluster.add_argument(
        "--unordered", action="store_true", help="write parts as they are ready, not in their order"
    )
    args = parser.parse_args()
    if args.batch_size < 1:
        raise UserError(f"--batch_size is {args.batch_size}; it must be 1 or more")
    if args.ray:
        end(*score_on_cluster(args), args.output / "parts")
    for option in ("column", "format", "shard_size", "unordered"):
        if getattr(args, option):
            raise UserError(f"--{option} is for --ray; leave it, or name a cluster: --ray local")
    if args.watch:
        for folder in args.images:
            if not Path(folder).is_dir():
                raise UserError(f"--watch needs folders; {folder} is not a folder")
    found = Found(args.images, args.output)
    if not args.watch:
        found.require_images()
    engine = open_model(args.model, device_name(args.device, args.model))
    if not engine.has_maps and args.save_maps:
        raise UserError(
            f"{args.model} gives scores only; export it again with --with_map, or leave --save_maps"
        )
    threshold, words = threshold_of(
        engine.metadata, args.threshold, args.false_positive_rate, str(args.model)
    )
    print(
        f"{engine.runtime} on {engine.device}, {engine.precision}; threshold {threshold:.4g}{f': {words}' if words else ''}"
    )
    top = Path(
        os.path.commonpath([(path if path.is_dir() else path.parent).resolve() for path in args.images])
    )

    def read(path: Path) -> Picture:
        return read_picture(path, path, engine, MAP_SIDE if args.save_maps else None)

    with (
        Output(args.output, top, go_on=args.watch) as output,
        interrupts_wait() if args.watch else nullcontext(lambda: False) as interrupted,
    ):
        rounds = watch(args.images, args.output, output.scored) if args.watch else [found.images]
        attempts: Counter[str] = Counter()
        try:
            for verdict in itertools.chain.from_iterable(
                verdicts_on(paths, engine, threshold, args.batch_size, read)
                for paths in itertools.takewhile(lambda _: not interrupted(), rounds)
            ):
                if not (args.watch and is_put_off(verdict, output.scored, attempts)):
                    output.write(verdict)
                if interrupted():
                    break
        except KeyboardInterrupt:
            if not args.watch:
                raise KeyboardInterrupt(
                    f"interrupted; what is scored so far is in {output.table}, and the same command starts "
                    "anew and replaces it"
                ) from None
    end(output.counts, {"they are no images": found.left_out}, output.table)


def score_on_cluster(args: argparse.Namespace) -> tuple[dict[str, int], dict[str, list[str]]]:
    """See `csad.cluster.scoring.score`; the model is opened here, too, for the threshold and what is wrong with it."""
    from csad.cluster import scoring  # here, as nothing else needs it

    for option in ("watch", "save_maps"):
        if getattr(args, option):
            raise UserError(f"--{option} does not go with --ray; leave one of them")
    if args.shard_size is not None and args.shard_size < 1:
        raise UserError(f"--shard_size is {args.shard_size}; it must be 1 or more")
    engine = open_model(args.model, "cpu")
    threshold, words = threshold_of(
        engine.metadata, args.threshold, args.false_positive_rate, str(args.model)
    )
    print(f"threshold {threshold:.4g}{f': {words}' if words else ''}")
    return scoring.score(args, threshold)


def end(counts: Mapping[str, int], left_out: Mapping[str, Sequence[Path | str]], table: Path) -> NoReturn:
    """Say what came of the run, and leave with its exit status."""
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + f"; see {table}")
    for reason, names in left_out.items():
        if names:
            print(
                f"{len(names)} files were left out because {reason}: {', '.join(map(str, names[:NAMED]))}"
                f"{' and others' if len(names) > NAMED else ''}"
            )
    raise SystemExit(3 if counts[UNREADABLE] + counts[UNDECIDED] else 4 if counts[ANOMALOUS] else 0)


def watch(folders: Sequence[Path], output: Path, scored: dict[str, State]) -> Iterator[list[Path]]:
    """Once per poll the files that are new or changed, and finished: neither empty nor different from one poll ago.

    What goes away is remembered, as it may come back; what is amiss with the folders is said once on stderr.

    Args:
        scored: what was scored, by name, the latest last; kept up to date. What is taken out is given out again.
    """
    before: dict[Path, State] = {}
    were = {folder: identity(folder) for folder in folders}
    limit = len(scored) + REMEMBERED
    while True:
        for folder in folders:
            were[folder] = _say_changes(folder, were[folder])
        now = dict(itertools.chain.from_iterable(images_in(folder, output)[0].items() for folder in folders))
        for path in now.keys() - before.keys():
            if now[path] == NO_STATE and path not in folders and path.is_dir():
                print(f"{path} cannot be listed; what lies in it is not judged", file=sys.stderr)
        ready = [
            path
            for path, state in now.items()
            if before.get(path) == state != scored.get(str(path)) and _is_finished(state)
        ]
        for path in now:
            if str(path) in scored:
                scored[str(path)] = scored.pop(str(path))  # to the end
        scored |= {str(path): now[path] for path in ready}
        limit = max(limit, len(now) + REMEMBERED)
        for name in list(itertools.islice(scored, max(0, len(scored) - limit))):
            del scored[name]  # gone for longest
        before = now
        yield ready
        time.sleep(POLL_SECONDS)


def _say_changes(folder: Path, before: tuple[int, int] | None) -> tuple[int, int] | None:
    """The folder's `identity`; said on stderr where it is not what it was ``before``."""
    now = identity(folder)
    if now is None and before is not None:
        print(
            f"{folder} is gone or cannot be listed; waiting for it, and what was scored is remembered",
            file=sys.stderr,
        )
    elif before is None and now is not None:
        print(f"{folder} is there again", file=sys.stderr)
    elif now != before:
        print(
            f"{folder} is another folder than before (was a share mounted or unmounted?); "
            "what was scored is remembered",
            file=sys.stderr,
        )
    return now


def _is_finished(state: State) -> bool:
    """Whether a file that has settled is to be judged; an empty one only after a while, with a sentence."""
    return state[0] > 0 or state != NO_STATE and time.time_ns() - state[1] > EMPTY_SECONDS * 10**9


def is_put_off(verdict: Verdict, scored: dict[str, State], attempts: Counter[str]) -> bool:
    """Whether a verdict of --watch does not count: the file has changed or gone meanwhile, or may yet become readable.

    Args:
        scored: see `watch`; the file is taken out, so that it is given out again.
        attempts: how often unreadable files were read, by name; kept up to date.
    """
    name, state = str(verdict.name), state_of(verdict.name)
    if (state["bytes"], state["changed_ns"]) == scored.get(name):
        if verdict.verdict != UNREADABLE or attempts[name] == READ_ATTEMPTS - 1:
            attempts.pop(name, None)
            return False
        attempts[name] += 1
    scored.pop(name, None)
    return True


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
        self.lock = only_writer(self.folder)
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
        whole = content[: content.rfind(b"\n") + 1]
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
                raise UserError(
                    f"{verdict.name} no longer lies in {self.top}, so its picture would not lie in "
                    f"{self.folder}/maps; run the same command again"
                )
            drawing = f"{short_name(name.name, LONGEST_DRAWING)}.map.png"
            try:
                files.write_image(self.folder / "maps" / name.with_name(drawing), verdict.captioned_drawing)
            except OSError as problem:
                if problem.errno not in UNUSABLE:
                    raise
                print(
                    f"there is no drawing of {printable(str(verdict.name))}: {problem.strerror}",
                    file=sys.stderr,
                )
        contributions = verdict.contributions or {}
        self.rows.writerow(
            [
                files.to_csv_text(str(verdict.name)),
                verdict.verdict,
                *(
                    "" if value is None else f"{value:.6g}"
                    for value in (
                        verdict.score,
                        verdict.threshold,
                        *(contributions.get(branch) for branch in BRANCHES),
                    )
                ),
                *(verdict.unusual or ("", "")),
                files.to_csv_text("; ".join(verdict.findings)),
            ]
        )
        self.lines.write(as_line(verdict, state_of(verdict.name)))
        self.csv.flush()
        self.lines.flush()
        self.counts[verdict.verdict] += 1
        print(verdict, flush=True)


def run() -> None:
    """The installed command."""
    run_script(main)
