"""Score images with an exported model, and say what is wrong with them.

    python predict.py photos/ extra.png --model ckpt/onnx_models/screw_bag.onnx

Every image gets a score, a verdict against the threshold, each branch's contribution to the score, the spot that looks most
unusual, and the components of which there is too much or too little. One line per image goes to OUTPUT/predictions.csv and
OUTPUT/predictions.jsonl as soon as it is scored; --save_maps adds a picture of each to OUTPUT/maps/. With --watch the
folders are checked once a second, and new or changed files scored, until Ctrl-C; started again, it continues where it was.
A folder that goes away for a while, like an unmounted share, is named and waited for; nothing is scored twice.
An unreadable file is reported and skipped; files that are not images are counted and named.

With --ray the workers of a Ray cluster score, also what lists (.csv, .parquet) name and object stores hold (s3://, gs://). The
same lines then go to OUTPUT/parts/, and the same command, started again, continues where it was (docs/cluster.md).

Exit status: 0 every image is normal, 4 some are anomalous, 3 some are unreadable or undecided, 2 nothing was done (one
sentence says why).
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

import csad
from csad.data.files import path_argument
from csad.data.listing import count
from csad.errors import OptionParser, UserError, defer_interrupts, run_script
from csad.evaluation.thresholds import threshold_of
from csad.inference.folders import input_images, no_images, path_or_url
from csad.inference.inspection import Picture, read_picture, verdicts_on
from csad.inference.predictions import Output, common_folder
from csad.inference.runtimes import device_name, open_model
from csad.inference.verdicts import ANOMALOUS, UNDECIDED, UNREADABLE
from csad.inference.watching import is_put_off, watch

MAP_SIDE = 768  # longer side of each picture that --save_maps draws
MAX_LISTED = 5  # files left out that are named
OF_ONE = {  # reasons why files are left out, where it is a single one
    "they are not images": "it is not an image",
    "they are named more than once": "it is named more than once",
    "their row in the list is empty": "its row in the list is empty",
}


def main() -> None:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"CSAD {csad.__version__}")
    parser.add_argument(
        "images",
        nargs="+",
        type=path_or_url,
        metavar="IMAGE_OR_FOLDER",
        help="folders are searched with all below; with --ray lists (.csv, .parquet) and URLs, too",
    )
    parser.add_argument(
        "--model", type=path_argument, required=True, help=".pth, .onnx or .xml written by export_model.py"
    )
    parser.add_argument(
        "--false_positive_rate",
        type=float,
        help="fraction of good images that may be called anomalous; the threshold follows from the validation "
        "images' scores in the model (default: 0.01, or the threshold that was set in the model)",
    )
    parser.add_argument(
        "--threshold", type=float, help="call higher scores anomalous, whatever the model says"
    )
    parser.add_argument(
        "--output",
        type=path_argument,
        default=Path("predictions"),
        help="folder to write to (default: predictions)",
    )
    parser.add_argument("--save_maps", action="store_true", help="draw what was found into OUTPUT/maps")
    parser.add_argument("--watch", action="store_true", help="go on and score files as they appear")
    parser.add_argument("--batch_size", type=int, default=8, help="images scored together (default: 8)")
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
    images, left_out = input_images(args.images, args.output)
    if not images and not args.watch:
        raise no_images(args.images)
    engine = open_model(args.model, device_name(args.device, args.model))
    if not engine.has_maps and args.save_maps:
        raise UserError(
            f"{args.model} gives scores only; export it again with --with_map, or leave --save_maps"
        )
    threshold, description = threshold_of(
        engine.metadata, args.threshold, args.false_positive_rate, str(args.model)
    )
    suffix = f": {description}" if description else ""
    print(f"{engine.runtime} on {engine.device}, {engine.precision}; threshold {threshold:.4g}{suffix}")

    def read(path: Path | str) -> Picture:
        return read_picture(Path(path), path, engine, MAP_SIDE if args.save_maps else None)

    with (
        Output(args.output, common_folder(args.images), go_on=args.watch) as output,
        defer_interrupts() if args.watch else nullcontext(lambda: False) as interrupted,
    ):
        rounds = watch(args.images, args.output, output.scored) if args.watch else [images]
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
    maps = args.output / "maps" if args.save_maps else None
    end(output.counts, {"they are not images": left_out}, output.table, maps)


def score_on_cluster(args: argparse.Namespace) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Score on a Ray cluster; the model is opened here, too, for its threshold and to refuse it early."""
    from csad.cluster import scoring  # here, as nothing else needs it

    for option in ("watch", "save_maps"):
        if getattr(args, option):
            raise UserError(f"--{option} does not go with --ray; leave one of them")
    if args.shard_size is not None and args.shard_size < 1:
        raise UserError(f"--shard_size is {args.shard_size}; it must be 1 or more")
    engine = open_model(args.model, "cpu")
    threshold, description = threshold_of(
        engine.metadata, args.threshold, args.false_positive_rate, str(args.model)
    )
    print(f"threshold {threshold:.4g}{f': {description}' if description else ''}")
    return scoring.score(args, threshold)


def end(
    counts: Mapping[str, int],
    left_out: Mapping[str, Sequence[Path | str]],
    table: Path,
    maps: Path | None = None,
) -> NoReturn:
    """Say what came of the run and where it lies, and leave with its exit status."""
    total = ", ".join(f"{number} {verdict}" for verdict, number in counts.items())
    print(f"{total}; see {table}" + (f" and the pictures in {maps}" if maps and maps.is_dir() else ""))
    for reason, names in left_out.items():
        if names:
            print(
                f"{count(len(names), 'file')} {'was' if len(names) == 1 else 'were'} left out because "
                f"{OF_ONE.get(reason, reason) if len(names) == 1 else reason}: {', '.join(map(str, names[:MAX_LISTED]))}"
                f"{' and others' if len(names) > MAX_LISTED else ''}"
            )
    raise SystemExit(3 if counts[UNREADABLE] + counts[UNDECIDED] else 4 if counts[ANOMALOUS] else 0)


def run() -> None:
    """The installed command."""
    run_script(main)
