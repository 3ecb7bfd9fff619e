"""Folders that are watched: which files are new or changed, and finished; each change is reported once."""

from __future__ import annotations

import itertools
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from csad.inference.folders import NO_STATE, State, identity, images_in, state_of
from csad.inference.verdicts import UNREADABLE, Verdict

POLL_SECONDS = 1.0
READ_ATTEMPTS = 3  # of --watch, one a poll, before a file is called unreadable: it may still be copied
EMPTY_SECONDS = 60  # after which --watch takes an empty file for finished
MAX_REMEMBERED = 200_000  # files that --watch remembers beside as many as were there at a time (some 70 MB)


def watch(folders: Sequence[Path], output: Path, scored: dict[str, State]) -> Iterator[list[Path]]:
    """Once per poll the files that are new or changed, and finished: neither empty nor different from one poll ago.

    What goes away is remembered, as it may come back; problems of the folders are reported once on stderr.

    Args:
        scored: what was scored, by name, the latest last; kept up to date. What is taken out is given out again.
    """
    before: dict[Path, State] = {}
    were = {folder: identity(folder) for folder in folders}
    limit = len(scored) + MAX_REMEMBERED
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
        limit = max(limit, len(now) + MAX_REMEMBERED)
        for name in list(itertools.islice(scored, max(0, len(scored) - limit))):
            del scored[name]  # gone for longest
        before = now
        yield ready
        time.sleep(POLL_SECONDS)


def _say_changes(folder: Path, before: tuple[int, int] | None) -> tuple[int, int] | None:
    """The folder's `identity`; a change since ``before`` is reported on stderr."""
    now = identity(folder)
    if now == before:
        return now
    change = (
        "is another folder than before (was a share mounted or unmounted?); what was scored is remembered"
    )
    if now is None:
        change = "is gone or cannot be listed; waiting for it, and what was scored is remembered"
    elif before is None:
        change = "is there again"
    print(f"{folder} {change}", file=sys.stderr)
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
    name, state = str(verdict.name), state_of(Path(verdict.name))
    if (state["bytes"], state["changed_ns"]) == scored.get(name):
        if verdict.verdict != UNREADABLE or attempts[name] == READ_ATTEMPTS - 1:
            attempts.pop(name, None)
            return False
        attempts[name] += 1
    scored.pop(name, None)
    return True
