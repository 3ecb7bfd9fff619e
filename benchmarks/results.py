"""Makes docs/results.md: runs what is missing of its tables, keeps their figures as JSON, and renders them.

    python -m benchmarks.results --list
    python -m benchmarks.results --only rendered
    python -m benchmarks.results --render

Each table is made by commands of this repository, printed as they run, which write under --work and continue where they
stopped. Its figures go into docs/results/NAME.json, with the commit, the date, the machine, the seeds and the commands;
from these files alone the tables are rendered between their marks in docs/results.md, and the plots beside the files.

The commit is that of the table's first command: what an interrupted run makes later, by newer code, counts as
older rather than newer than it is. A table is marked as made by an older state of the code where a file that decides its
figures was committed since, or had changes that were not committed.
"""

from __future__ import annotations

import argparse
import datetime
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from csad.data import files
from csad.errors import UserError, run_script

from benchmarks import results_content
from benchmarks.measuring import ROOT, describe_machine, machine_in_words, options_of
from benchmarks.peers_worker import PEERS
from benchmarks.results_tables import TABLES, Table

PAGE, FOLDER = ROOT / "docs/results.md", ROOT / "docs/results"
OLDER = "**Made by an older state of the code:**"  # how the line begins that git's history decides
WIDTH = 108
MARKS = re.compile(r"(<!-- results: (\w+) -->\n)(.*?)(<!-- end of \2 -->\n)", re.DOTALL)


def main() -> None:
    parser = options_of(__doc__)
    action = parser.add_mutually_exclusive_group()
    action.add_argument(
        "--list", action="store_true", help="say what each table needs, and how long it takes"
    )
    action.add_argument("--render", action="store_true", help="run nothing, render the page and its plots")
    action.add_argument(
        "--only", nargs="+", choices=list(TABLES), metavar="NAME", help="make these once more"
    )
    folder = files.path_argument
    parser.add_argument("--work", type=folder, default="results_work", help="where commands write")
    parser.add_argument("--dataset_root", type=folder, help="photographs, for tables of some")
    parser.add_argument("--environment", type=folder, default=".venv_peers", help="of the peers")
    parser.add_argument("--methods", nargs="+", default=list(PEERS), choices=list(PEERS), help="of the peers")
    parser.add_argument("--overwrite", action="store_true", help="with --only: start over, not go on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the detection tables")
    args = parser.parse_args()
    if args.list:
        return print("\n".join(describe(name, table) for name, table in TABLES.items()))
    if args.overwrite and not args.only:
        raise UserError("--overwrite starts tables over; name them with --only")
    for name in [] if args.render else args.only or missing(args):
        make(name, TABLES[name], args)
        render([name])
    render(list(TABLES) if args.render else [])


def describe(name: str, table: Table) -> str:
    needs = [f"the table {other}" for other in table.needs]
    needs += ["--dataset_root"] * table.photographs + ["the peers' environment"] * table.peers
    state = f"made on {read(FOLDER, name)['date']}" if record(FOLDER, name).exists() else "not made yet"
    text = f"{name}: {table.title}; needs {', '.join(needs) or 'nothing'}; minutes on two idle cores: {table.minutes}; {state}"
    return textwrap.fill(text, WIDTH, subsequent_indent="    ")


def missing(args: argparse.Namespace) -> list[str]:
    """Tables without figures whose inputs are at hand; says which are left out."""
    names = []
    for name, table in TABLES.items():
        lacks = ["--dataset_root"] * (table.photographs and args.dataset_root is None)
        lacks += [f"{args.environment}"] * (table.peers and not args.environment.exists())
        if lacks:
            print(f"{name}: left out, it needs {' and '.join(lacks)}")
        elif not record(FOLDER, name).exists():
            names.append(name)
    return names


def make(name: str, table: Table, args: argparse.Namespace) -> None:
    """Run a table's commands and keep its figures; UserError if an input is not given, a table that it needs
    was not made, or a command failed."""
    if table.photographs and args.dataset_root is None:
        raise UserError(f"{name} needs photographs; name their folder with --dataset_root")
    begun = args.work / "begun"
    for other in table.needs:
        if not (begun / f"{other}.json").exists():
            raise UserError(f"{name} goes on from {other}; make that with --only {other} first")
    seeds = args.seeds if any("{seed}" in command for command in table.commands) else args.seeds[:1]
    left = [Path(located(path, args)) for path in given(table.files, args)]
    if args.overwrite:  # but for pictures and what other tables left
        for path in left:
            shutil.rmtree(path.parent, ignore_errors=True)
        (begun / f"{name}.json").unlink(missing_ok=True)
    if not (begun / f"{name}.json").exists():
        files.write_json(begun / f"{name}.json", state_of_code(ROOT, table.sources))
    commands = given(table.commands, args)
    for command in commands:
        words = [str(located(word, args)) for word in shlex.split(command)]
        print(f"\n$ python {shlex.join(words)}", flush=True)
        if status := subprocess.run([sys.executable, *words], cwd=ROOT).returncode:
            raise UserError(
                f"{name}: the command above failed (exit status {status}); mend what it says and try again"
            )
    if left[0].name == "all_stages.json":
        dataset = args.dataset_root if table.photographs else args.work / "rendered"
        content = results_content.detection(dataset, dict(zip(seeds, (path.parent for path in left))))
    else:
        by_name = {path.stem.split("_")[-1]: files.read_json(path) for path in left}
        content = by_name if len(by_name) > 1 else by_name.popitem()[1]
    states = [files.read_json(begun / f"{other}.json") for other in (name, *table.needs)]
    figures = {
        "table": name,
        "commit": states[0]["commit"],
        "commits_before": [state["commit"] for state in states[1:]],
        "modified": sorted({path for state in states for path in state["modified"]}),
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(),
        "seeds": list(range(table.draws) or seeds),
        "commands": [f"python {command}" for command in commands],
        "content": content,
    }
    files.write_json(record(FOLDER, name), figures)
    print(f"wrote {record(FOLDER, name)}")


def given(templates: Sequence[str], args: argparse.Namespace) -> list[str]:
    """A table's commands or files with the run's seeds and methods, one for each seed where they name it."""
    return [
        text.format(seed=seed, first=args.seeds[0], methods=" ".join(args.methods))
        for text in templates
        for seed in (args.seeds if "{seed}" in text else args.seeds[:1])
    ]


def located(word: str, args: argparse.Namespace) -> Path | str:
    """A word of a command, of which a path under a default's name becomes one of this machine."""
    folders = {"results_work": args.work, "photographs": args.dataset_root, ".venv_peers": args.environment}
    first, _, rest = word.partition("/")
    return folders[first].absolute() / rest if first in folders else word


def record(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def read(folder: Path, name: str) -> dict[str, Any]:
    return files.read_json(record(folder, name), keys=("commit", "date", "machine", "commands", "content"))


# The state of the code


def git(root: Path, *arguments: str) -> str | None:
    """What git answers; None where it does not know, or there is none."""
    try:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def state_of_code(root: Path, sources: Sequence[str]) -> dict[str, Any]:
    """The commit, and which of the sources have changes that are not committed."""
    modified = git(root, "status", "--porcelain", "--", *sources) or ""
    return {
        "commit": git(root, "rev-parse", "HEAD"),
        "modified": [line.split(maxsplit=1)[1] for line in modified.splitlines()],
    }


def older(root: Path, made: dict[str, Any], sources: Sequence[str]) -> str | None:
    """Why a table is not of today's code, in a sentence; None where it is."""
    if made["modified"]:
        return f"`{made['modified'][0]}` had changes that were not committed."
    last = git(root, "log", "-1", "--format=%H", "--", *sources)
    for commit in (made["commit"], *made["commits_before"]):
        if commit is None or git(root, "cat-file", "-e", f"{commit}^{{commit}}") is None:
            return "git does not know its commit here."
        if last and git(root, "merge-base", "--is-ancestor", last, commit) is None:
            date = git(root, "log", "-1", "--format=%cs", last)
            return f"its files changed since, last in `{last[:7]}` of {date}."
    return None


# The page


def render(plotted: Sequence[str]) -> None:
    """Write the page, and the plots of some tables."""
    for name in plotted:
        if TABLES[name].plots and record(FOLDER, name).exists():
            from benchmarks import results_plots

            content = read(FOLDER, name)["content"]
            for file, function in TABLES[name].plots.items():
                files.write_bytes(FOLDER / file, getattr(results_plots, function)(content))
    files.write_text(PAGE, rendered(PAGE.read_text(encoding="utf-8"), FOLDER, ROOT))


def rendered(text: str, folder: Path, root: Path) -> str:
    """The page's text with each table between its marks as its JSON has it; UserError if a mark names no
    table."""

    def replace(match: re.Match[str]) -> str:
        begin, name, _, end = match.groups()
        if name not in TABLES:
            raise UserError(f"there is no table {name}; choose from {', '.join(TABLES)}")
        return begin + "\n" + "\n".join(section(name, folder, root)) + "\n\n" + end

    return MARKS.sub(replace, text)


def section(name: str, folder: Path, root: Path) -> list[str]:
    """A table's lines: figures, plots, and what made them."""
    if not record(folder, name).exists():
        return [f"Not measured yet: `python -m benchmarks.results --only {name}`."]
    made, table = read(folder, name), TABLES[name]
    reason = older(root, made, table.sources)
    lines = [*textwrap.wrap(f"{OLDER} {reason}", 10**6), ""] if reason else []
    lines += table.render(made["content"])
    for file in table.plots:
        if (folder / file).exists():
            lines += ["", f"![{file.removesuffix('.svg').replace('_', ' ')}](results/{file})"]
    packages = made["machine"]["packages"]
    shown = [package for package in ("torch", "onnxruntime", "openvino") if package in packages]
    versions = ", ".join(f"{package} {packages[package]}" for package in shown)
    seeds = f"seed{'s' * (len(made['seeds']) > 1)} {', '.join(map(str, made['seeds']))}"
    commit = (made["commit"] or "unknown")[:7]
    machine = machine_in_words(made["machine"])
    sentence = f"Commit `{commit}`, measured on {made['date']}, {seeds}; {machine}; {versions}:"
    lines += ["", *textwrap.wrap(sentence, WIDTH), ""]
    for command in made["commands"]:
        lines += wrapped(command)
    return lines


def wrapped(command: str) -> list[str]:
    """A command as an indented block, continued over lines that fit."""
    parts = textwrap.wrap(command, WIDTH - 10, break_long_words=False, break_on_hyphens=False)
    return [
        f"    {'    ' * (number > 0)}{part}" + (" \\" if number < len(parts) - 1 else "")
        for number, part in enumerate(parts)
    ]


if __name__ == "__main__":
    run_script(main)
