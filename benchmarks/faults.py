"""Runs that are killed at random, and the same command again: do the files of an uninterrupted run come out?

    python -m benchmarks.faults --kills 60

A kill passes if the same command, run again, ends well and leaves the files of an uninterrupted run, byte by byte;
only measured milliseconds may differ. Stages that replace what is finished (--overwrite) are killed, too.

Everything happens in copies of one tiny workspace. Scripts run in processes forked from one in which everything
heavy is imported, but no thread was started: each costs its work instead of seconds of imports. tests/faults runs
bad inputs in the same way.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from csad.errors import UserError, run_script

from benchmarks.measuring import ROOT, options_of

PRELOADED = (
    "torch timm cv2 sklearn.cluster onnx onnxruntime openvino skimage.segmentation uvicorn.logging logging.config "
    "encodings.idna csad.station.server csad.synthetic.writer pseudo_label train_segmentor CSAD patch_memory "
    "export_model benchmark_performance report check_dataset"
).split()
CATEGORY = "pushpins"
MODEL = f"work/ckpt/pytorch_models/{CATEGORY}.pth"
# Options that scripts get before those of a command, which therefore count.
STAGE = shlex.split(
    "--workspace work --dataset_root data --preset quick --backbone efficientnet_lite0 --device cpu "
    "--images.size 256 --pseudo_labels.rotations 2 --segmentor.epochs 4 --segmentor.unsupervised_from_epoch 2 "
    "--segmentor.width 16 --lgst.steps 20 --lgst.width 16 --lgst.teacher_channels 16 --memory.rows 50"
)
DATASET = shlex.split(
    f"--dataset_root data --categories {CATEGORY} --image_size 256 --train 10 --validation 5 --test_good 3 "
    "--test_logical 3 --test_structural 3 --workers 1"
)
OPTIONS = {
    "make_synthetic_loco": DATASET,
    "predict": ["--output", "new", "--model", MODEL],
    "serve": ["--port", "0"],
}
# The whole work in order: each starts from what those before it left.
OVERWRITABLE = ("pseudo_label", "train_segmentor", "CSAD", "patch_memory")
WORK = [
    "make_synthetic_loco",
    *OVERWRITABLE,
    *("export_model", "export_model --format onnx --with_map", "export_model --format openvino --with_map"),
    *("benchmark_performance", "report", f"predict data/{CATEGORY}/test --output out --save_maps"),
]
MAX_SECONDS = 120.0  # of any of these
# In reports of exports.
TIMINGS = re.compile(rb'"(ms_per_image|preprocessing_ms)": [0-9.]+|\d+\.\d\d +\||[ -]+')
LOCKS = (".csad.lock", ".predict.lock")
HOME = "home"  # in which runtimes keep what is theirs


class Ended(NamedTuple):
    status: int  # negative: the signal that ended it
    out: str
    err: str
    seconds: float


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--kills", type=int, default=60, metavar="N", help="runs to kill (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of when they are killed, and by which signal")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="work there, and leave what failed for looking at"
    )
    args = parser.parse_args()
    if not hasattr(os, "fork"):
        raise UserError("this needs a system whose processes can fork: Linux or macOS")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.keep or Path(temporary)).resolve()
        failures = kill_runs(folder, args.kills, random.Random(args.seed))
    raise SystemExit(1 if failures else 0)


def kill_runs(folder: Path, count: int, rng: random.Random) -> int:
    """Kill runs of all kinds of work in turn and run them again; returns the number of failures."""
    stages, seconds = finish(folder / "finished")
    work = list(zip(WORK, stages, stages[1:], seconds))
    work += [
        (f"{command} --overwrite", after, after, lasts)
        for command, _, after, lasts in work
        if command in OVERWRITABLE
    ]
    failures, endings = 0, Counter[str]()
    for number in range(count):
        command, before, after, lasts = work[number % len(work)]
        lab, expected = folder / f"kill_{number:03d}", contents(after)
        by = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        delay = rng.uniform(0, lasts)
        copy(before, lab)
        first = run(command, lab, kill=(by, delay))
        endings["ended before it" if first.status in (0, 4) else by.name] += 1
        again = run(command, lab)
        differ = differing(contents(lab), expected)
        if again.status not in (0, 4) or differ or "Traceback" in first.err + again.err:
            failures += 1
            print(
                f"FAILED {lab.name}, {by.name} after {delay:.2f} s: {command}\n       statuses {first.status}, "
                f"{again.status}; differ: {differ[:6]}\n       {(first.err + again.err).strip().splitlines()[-1:]}",
                flush=True,
            )
        else:
            shutil.rmtree(lab)
    print(
        f"{count} runs killed ({', '.join(f'{name}: {times}' for name, times in endings.items())}) and run again, "
        f"{failures} ended otherwise than an uninterrupted run"
    )
    return failures


def finish(folder: Path) -> tuple[list[Path], list[float]]:
    """Do all `WORK` in a folder, unless it is done there.

    Returns:
        The workspaces before the work and after each part of it, and the seconds that each part took.
    """
    stages, note = [folder / str(index) for index in range(len(WORK) + 1)], folder / "seconds.json"
    if not note.exists():
        shutil.rmtree(folder, ignore_errors=True)
        stages[0].mkdir(parents=True)
        seconds = []
        for command, before, after in zip(WORK, stages, stages[1:]):
            copy(before, after)
            ended = run(command, after)
            if ended.status not in (0, 4):
                raise UserError(f"{command} failed: {ended.err[-2000:]}")
            seconds.append(ended.seconds)
        note.write_text(json.dumps(seconds))
    return stages, json.loads(note.read_text())


def copy(source: Path, target: Path) -> None:
    """Put a copy of a folder in another one's place, whatever its permissions are."""
    if target.exists():
        for path in (target, *target.rglob("*")):
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o755)
        shutil.rmtree(target)
    shutil.copytree(source, target, symlinks=True)


def contents(lab: Path) -> dict[str, bytes]:
    """Every file in a folder's folders with its content, or where a link leads; no `LOCKS`, `HOME` and `TIMINGS`."""
    files = {}
    for path in sorted(lab.rglob("*")):
        name = str(path.relative_to(lab))
        if path.is_symlink():
            files[name] = os.fsencode(os.readlink(path))
        elif (
            path.is_file()
            and not path.name.startswith(LOCKS)
            and path.relative_to(lab).parts[0] not in (HOME, path.name)
        ):
            content = path.read_bytes()
            files[name] = TIMINGS.sub(b"", content) if name.endswith((".json", ".md")) else content
    return files


def differing(first: dict[str, bytes], second: dict[str, bytes]) -> list[str]:
    """Names of files that are not the same in both `contents`, or only in one of them."""
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


@cache
def preloaded() -> ForkServerContext:
    """Processes forked from a server that has imported `PRELOADED`, with one thread for each.

    A process of its own, as whoever calls this may have started threads, which no fork survives.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # Killed processes leave semaphores behind, which the standard library removes with a warning.
    changes = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore:resource_tracker"}
    with patch.dict(os.environ, changes):
        forkserver.ensure_running()
    return context


def run(
    command: str,
    lab: Path,
    inside: Callable[[], None] | None = None,
    kill: tuple[signal.Signals, float] | None = None,
) -> Ended:
    """Run a command line in a folder, in a process forked from `preloaded`; stdout and stderr are files there.

    Args:
        inside: called in that process before the script, to take something away from it; can be pickled.
        kill: a signal, and the seconds after which it is sent.
    """
    script, *own = shlex.split(command)
    begun = time.monotonic()
    child = preloaded().Process(
        target=_become, args=(script, [*OPTIONS.get(script, STAGE), *own], lab, inside)
    )
    child.start()
    assert child.pid is not None
    for number, seconds in (kill or (signal.SIGKILL, MAX_SECONDS)), (signal.SIGKILL, MAX_SECONDS):
        child.join(seconds)
        if child.exitcode is None:
            with suppress(ProcessLookupError):
                os.kill(child.pid, number)
    child.join()
    assert child.exitcode is not None
    out, err = (
        path.read_text(errors="replace") if path.exists() else "" for path in (lab / "stdout", lab / "stderr")
    )
    return Ended(child.exitcode, out, err, time.monotonic() - begun)


def _become(script: str, arguments: list[str], lab: Path, inside: Callable[[], None] | None) -> None:
    """Turn this forked process into a run of a script, as the interpreter would run it; never returns."""
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(lab)
        os.environ["HOME"] = str(lab / HOME)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), number)
        if inside:
            inside()
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
        sys.argv = [f"{script}.py", *arguments]
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


if __name__ == "__main__":
    run_script(main)
