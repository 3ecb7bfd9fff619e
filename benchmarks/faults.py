"""Bad inputs to every script, and runs that are killed: does each end with a sentence, and is nothing finished harmed?

    python -m benchmarks.faults                         # every row of fault_table.CASES
    python -m benchmarks.faults --kills 60              # runs killed at random, and the same command again
    python -m benchmarks.faults --only 'NaN' --keep x   # some rows, and what they left lies in x/

A bad input passes if the script ends with the expected status and exactly one sentence that names what is expected, without
a traceback, and every file that was there before holds the same bytes. A kill passes if the same command, run again, ends
well and leaves the files of an uninterrupted run, byte by byte; only measured milliseconds may differ.

Everything happens in copies of one tiny finished run. Scripts run in processes forked from this one, in which everything
heavy is imported already, but no thread has been started: each costs its work instead of seconds of imports.
"""

from __future__ import annotations

import argparse
import json
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
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from csad.data.files import write_image
from csad.data.images import read_rgb
from csad.errors import UserError, run_script

from benchmarks import fault_pictures
from benchmarks.fault_table import CASES, CATEGORY, DATA, Case

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = ("torch", "timm", "cv2", "sklearn.cluster", "onnx", "onnxruntime", "openvino", "skimage.segmentation", "settings",
             "pseudo_label", "train_segmentor", "CSAD", "patch_memory", "export_model", "benchmark_performance", "report",
             "csad.station.server", "uvicorn.logging", "logging.config", "encodings.idna", "csad.synthetic.writer")
MODEL = f"work/ckpt/pytorch_models/{CATEGORY}.pth"
STAGE = ["--workspace", "work", "--dataset_root", "data", "--preset", "quick", "--backbone", "efficientnet_lite0", "--device",
         "cpu", "--images.size", "256", "--pseudo_labels.rotations", "2", "--segmentor.epochs", "4",
         "--segmentor.unsupervised_from_epoch", "2", "--segmentor.width", "16", "--lgst.steps", "20", "--lgst.width", "16",
         "--lgst.teacher_channels", "16", "--memory.rows", "50"]
BEFORE = {"predict": ["--output", "new", "--model", MODEL], "serve": ["--port", "0"],
          "make_synthetic_loco": [*(f"--{name}={count}" for name, count in (
              ("image_size", 256), ("train", 10), ("validation", 5), ("test_good", 3), ("test_logical", 3),
              ("test_structural", 3), ("workers", 1))), "--dataset_root", "data", "--categories", CATEGORY]}
# The whole work in order: each starts from what those before it left.
WORK = ("make_synthetic_loco", "pseudo_label", "train_segmentor", "CSAD", "patch_memory", "export_model",
        "export_model --format onnx --with_map", "export_model --format openvino --with_map", "benchmark_performance", "report",
        f"predict data/{CATEGORY}/test --output out --save_maps")
# Stages that are also killed while they replace what is finished.
OVERWRITING = ("pseudo_label", "train_segmentor", "CSAD", "patch_memory")
LONGEST = 40.0  # seconds that any of these may take
TIMINGS = re.compile(rb'"(ms_per_image|preprocessing_ms)": [0-9.]+|\d+\.\d\d +\||[ -]+')  # in reports of exports
LEFT_OVER = (".csad.lock", ".predict.lock")


class Ended(NamedTuple):
    status: int  # negative: the signal that ended it
    out: str
    err: str
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0, metavar="N", help="kill N runs at random instead")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--only", default="", metavar="WORDS", help="rows whose name, kind or command hold these words")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work there, and leave what failed for looking at")
    args = parser.parse_args()
    if not hasattr(os, "fork"):
        raise UserError("this needs a system whose processes can fork: Linux or macOS")
    os.environ["OMP_NUM_THREADS"] = "1"  # before the imports: what is imported here must be safe to fork
    for name in PRELOADED:
        import_module(name)
    with tempfile.TemporaryDirectory() as temporary:
        place = (args.keep or Path(temporary)).resolve()
        place.mkdir(parents=True, exist_ok=True)
        failed = kills(place, args.kills, random.Random(args.seed)) if args.kills else bad_inputs(place, args.only)
    raise SystemExit(1 if failed else 0)


def bad_inputs(place: Path, only: str) -> int:
    """Run the rows of the table and print what came of them; returns the number of failures."""
    finished = place / "ready"
    copy(finish(place / "finished")[-1], finished)
    for index in range(2):
        (finished / "photos").mkdir(exist_ok=True)
        shutil.copy(finished / f"{DATA}/test/good/00{index}.png", finished / "photos")
    known = contents(finished)
    chosen = [case for case in CASES if only in f"{case.name} kind {case.kind} {case.command}"]
    failures, begun = 0, time.monotonic()
    for number, case in enumerate(chosen):
        lab = place / f"case_{number:03d}"
        wrong = judge(case, finished, known, lab)
        if wrong:
            failures += 1
            print("\n       ".join([f"FAILED {lab.name}, kind {case.kind}, {case.name}: {case.command}", *wrong]), flush=True)
        else:
            shutil.rmtree(lab)
    scripts, kinds = (Counter(values) for values in zip(*((case.command.split()[0], case.kind) for case in chosen)))
    print(f"{len(chosen)} bad inputs in {time.monotonic() - begun:.0f} s, {failures} failed\n"
          f"by script: {', '.join(f'{name} {count}' for name, count in scripts.items())}\n"
          f"by kind: {', '.join(f'{kind}: {count}' for kind, count in sorted(kinds.items()))}")
    return failures + (0 if only else encodings(finished, place / "encodings"))


def encodings(finished: Path, lab: Path) -> int:
    """Score one picture in many encodings, each beside what people see in it as a plain PNG; returns the number of failures."""
    copy(finished, lab)
    shown = read_rgb(lab / "photos/000.png")
    shutil.rmtree(lab / "photos")
    (lab / "photos").mkdir()
    listed = fault_pictures.encodings(shown)
    for name, content, seen in listed:
        (lab / "photos" / name).write_bytes(content)
        if not isinstance(seen, str):
            write_image(lab / f"photos/{name}.plain.png", seen)
    ended = run("predict photos --batch_size 1", lab)
    lines = map(json.loads, (lab / "new/predictions.jsonl").read_text().splitlines())
    by_name = {Path(line["image"]).name: line for line in lines}
    wrong, same = [], 0
    for name, _, seen in listed:
        found, plain = by_name.get(name, {"score": None}), by_name.get(f"{name}.plain.png", {"score": None})
        told = [line for line in ended.out.splitlines() if name in line]
        if isinstance(seen, str):
            if found["score"] is not None or not any(seen in line for line in told):
                wrong.append(f"{name}: expected a sentence with '{seen}', got {found['score']} {told}")
        elif found["score"] is None or found["score"] != plain["score"]:
            wrong.append(f"{name}: {found['score']} instead of {plain['score']} {told}")
        else:
            same += 1
    print("\n       ".join([f"{len(listed)} encodings: {same} with the score of their plain PNG, "
                            f"{len(listed) - same - len(wrong)} with a sentence, {len(wrong)} otherwise", *wrong]), flush=True)
    return len(wrong)


def judge(case: Case, finished: Path, known: dict[str, bytes], lab: Path) -> list[str]:
    """Run one row in a copy of the finished run; returns what is wrong, nothing if it ended as it should."""
    copy(finished, lab)
    for prepare in case.prepared:
        prepare(lab)
    before = contents(lab) if case.prepared else known
    ended = run(case.command, lab, case.inside)
    after = contents(lab)
    harmed = [name for name, content in before.items() if after.get(name) != content]
    said = [line for line in ended.err.splitlines() if "error: " in line]
    wrong = []
    if ended.status != case.status:
        wrong.append(f"status {ended.status} instead of {case.status}")
    if "Traceback" in ended.out + ended.err:
        wrong.append(f"a traceback: {ended.err.strip().splitlines()[-1:]}")
    if case.status == 2 and len(said) != 1:
        wrong.append(f"{len(said)} sentences: {said or ended.err[-300:]}")
    if case.said not in ended.out + ended.err:
        wrong.append(f"'{case.said}' is not in: {said or (ended.out + ended.err)[-400:]}")
    if harmed:
        wrong.append(f"harmed: {', '.join(harmed[:5])}")
    for log in lab.glob("*/predictions.jsonl"):
        for line in log.read_text().splitlines():
            json.loads(line, parse_constant=lambda name: wrong.append(f"{name} in {log.name}"))
    return wrong


def kills(place: Path, count: int, rng: random.Random) -> int:
    """Kill runs of all kinds of work in turn and run them again; returns the number of failures."""
    labs = finish(place / "finished")
    lasting = json.loads((place / "finished/seconds.json").read_text())
    work = [(command, labs[index], labs[index + 1], lasting[index]) for index, command in enumerate(WORK)]
    work += [(f"{command} --overwrite", after, after, seconds) for command, _, after, seconds in work if command in OVERWRITING]
    failures, killed = 0, Counter()
    for number in range(count):
        command, ready, after, seconds = work[number % len(work)]
        lab, expected = place / f"kill_{number:03d}", contents(after)
        by = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        after_seconds = rng.uniform(0, seconds)
        copy(ready, lab)
        first = run(command, lab, kill=(by, after_seconds))
        killed["ended before it" if first.status in (0, 4) else by.name] += 1
        again = run(command, lab)
        found = contents(lab)
        wrong = [name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]
        if again.status not in (0, 4) or wrong or "Traceback" in first.err + again.err:
            failures += 1
            print(f"FAILED {lab.name}, {by.name} after {after_seconds:.2f} s: {command}\n       statuses {first.status}, "
                  f"{again.status}; differ: {wrong[:6]}\n       {(first.err + again.err).strip().splitlines()[-1:]}", flush=True)
        else:
            shutil.rmtree(lab)
    print(f"{count} runs killed ({', '.join(f'{name}: {times}' for name, times in killed.items())}) and run again, "
          f"{failures} ended otherwise than an uninterrupted run")
    return failures


def finish(place: Path) -> list[Path]:
    """The folders before the work, and after each part of it."""
    labs = [place / str(index) for index in range(len(WORK) + 1)]
    seconds = []
    if not (place / "seconds.json").exists():
        shutil.rmtree(place, ignore_errors=True)
        labs[0].mkdir(parents=True)
        for command, before, after in zip(WORK, labs, labs[1:]):
            copy(before, after)
            ended = run(command, after)
            if ended.status not in (0, 4):
                raise UserError(f"{command} failed: {ended.err[-2000:]}")
            seconds.append(ended.seconds)
        (place / "seconds.json").write_text(json.dumps(seconds))
    return labs


def copy(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)


def contents(lab: Path) -> dict[str, bytes]:
    """Every file below a folder with its content, or where a link leads, without what may differ (`TIMINGS`)."""
    found = {}
    for path in sorted(lab.rglob("*")):
        name = str(path.relative_to(lab))
        if path.is_symlink():
            found[name] = os.fsencode(os.readlink(path))
        elif path.is_file() and not path.name.startswith(LEFT_OVER) and path.parent != lab:
            content = path.read_bytes()
            found[name] = TIMINGS.sub(b"", content) if name.endswith((".json", ".md")) else content
    return found


def run(command: str, lab: Path, inside: Callable[[], None] | None = None,
        kill: tuple[signal.Signals, float] | None = None) -> Ended:
    """Run a command line in ``lab``, in a forked process.

    Args:
        inside: called in that process before the script, to take something away from it.
        kill: a signal, and the seconds after which it is sent.
    """
    script, *own = shlex.split(command)
    arguments = [*BEFORE.get(script, STAGE), *own]
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        _become(script, arguments, lab, inside)
    status, until = None, begun + (kill[1] if kill else LONGEST)
    while status is None:
        done, raw = os.waitpid(child, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(raw)
        elif time.monotonic() > until:
            os.kill(child, kill[0] if kill else signal.SIGKILL)
            until, kill = begun + LONGEST, None
            time.sleep(0.01)
        else:
            time.sleep(0.005)
    return Ended(status, (lab / "stdout").read_text(errors="replace"), (lab / "stderr").read_text(errors="replace"),
                 time.monotonic() - begun)


def _become(script: str, arguments: list[str], lab: Path, inside: Callable[[], None] | None) -> None:
    """Turn this forked process into a run of a script, as the interpreter would run it; never returns."""
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(lab)
        os.environ["HOME"] = str(lab)
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
