"""How a script ends before its end: what a person can get wrong, told in one sentence, and what a person stops."""

from __future__ import annotations

import argparse
import difflib
import errno
import io
import math
import os
import pickle
import shlex
import signal
import struct
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import csad
from csad.progress import ProgressBar

# What json, numpy and torch raise for a file that is none of theirs; torch takes its first bytes for a pickle's instructions.
DAMAGED = (
    ValueError,
    RuntimeError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    struct.error,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)
UNUSABLE = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)  # a path is, as it is
SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_SIGNAL = 2  # seconds within which two SIGTERMs are one
_last_signal = int(signal.SIGINT)  # that came; Python raises KeyboardInterrupt for the first alone
MAX_SUGGESTED = 3  # names like a misspelt one


class UserError(Exception):
    """A mistake that the user can fix; the message says what was expected, where, and what to do."""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A question after the first half of a sentence, "; did you mean --seed or --seeds?"; "" where no name is like this one."""
    suggested = similar_names(name, names)
    return f"; did you mean {' or '.join(suggested)}?" if suggested else ""


def similar_names(name: str, names: Iterable[str]) -> list[str]:
    """At most `MAX_SUGGESTED` of the names that may be meant by this one.

    Case, dashes and underscores do not count. Of a name of several parts, like --lgst.steps, the last one is enough, and of any
    its beginning.
    """
    wanted, wholes = _plain(name), {known: _plain(known) for known in names}
    if not wanted:
        return []
    parts = {known: (whole, whole.rpartition(".")[2]) for known, whole in wholes.items()}
    suggested = [known for known in parts if wanted in parts[known]]
    if not suggested and len(wanted) > 1:
        suggested = [known for known in parts if wholes[known].startswith(wanted)]
    if not suggested:
        close = difflib.get_close_matches(wanted, wholes.values(), 1)
        close = close or difflib.get_close_matches(wanted, [last for _, last in parts.values()], 1, 0.75)
        suggested = [known for known in parts if close and close[0] in parts[known]]
    return suggested[:MAX_SUGGESTED]


def _plain(name: str) -> str:
    return name.strip("-_. ").lower().replace("-", "_")


class OptionParser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` whose every error is one sentence, with the option or value that was probably meant.

    Options have to be written in full: half of one would mean another as soon as a script gets a new option.

    Args:
        path_option: which one a path without an option was probably meant for, in a script that takes none without.
    """

    def __init__(self, path_option: str | None = None, **options: Any):
        super().__init__(**options, allow_abbrev=False)
        self._path_option = path_option

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        # Before argparse looks: it would first miss the --model of somebody who wrote --modle.
        for argument in given[: given.index("--")] if "--" in given else given:
            name = argument.partition("=")[0]
            if name not in self._option_string_actions and self._parse_optional(argument):
                self._refuse(f"there is no option {name}", name)
        # This one, too: it would first miss the --model of somebody who wrote the path alone.
        if self._path_option and given and not given[0].startswith("-"):
            self._refuse_value(given[0], given)
        parsed, unknown = self.parse_known_args(given, namespace)
        if unknown:
            self._refuse_value(unknown[0], given)
        return parsed

    def _refuse_value(self, value: str, given: Sequence[str]) -> NoReturn:
        what, option = f"'{value}' belongs to no option", self._path_option
        if value and option and option not in (argument.partition("=")[0] for argument in given):
            # What does not exist may be a misspelt option without its dashes.
            is_path = os.sep in value or os.path.exists(value)
            similar = similar_names(value, self._option_string_actions)
            if is_path or not similar or (similar == [option] and _plain(value) != _plain(option)):
                self.error(f"{what}; did you mean {option} {shlex.quote(value)}?")
        self._refuse(what, value)

    def _refuse(self, what: str, name: str) -> NoReturn:
        self.error(what + (did_you_mean(name, self._option_string_actions) or "; --help lists the options"))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices: Sequence[str] = [str(choice) for choice in action.choices]
            name = action.option_strings[-1] if action.option_strings else action.dest
            self.error(
                f"{name} {value}: choose one of {', '.join(choices)}{did_you_mean(str(value), choices)}"
            )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def require_version(provenance: Mapping[str, Any], name: str, advice: str) -> None:
    """Refuse (UserError) what another version of this code wrote."""
    version = provenance.get("format_version")
    if version != csad.FORMAT_VERSION:
        raise UserError(
            f"{name} was written by another version of this code (format {version}, expected {csad.FORMAT_VERSION}); "
            f"{advice}"
        )


def disk_is_full(problem: Exception) -> bool:
    """Whether a file could not be written for want of space, or of quota."""
    return isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def user_message(problem: Exception) -> str | None:
    """What to tell the user about a problem that is theirs to fix; None for all others."""
    if isinstance(problem, UserError):
        return str(problem)
    if isinstance(problem, OSError) and disk_is_full(problem):
        return (
            f"the disk is full while writing {problem.filename or 'a file'}; "
            "free some space and run the same command again, finished files are kept"
        )
    # The second is PyTorch's, on a GPU.
    if isinstance(problem, MemoryError) or type(problem).__name__ == "OutOfMemoryError":
        return (
            f"memory ran out ({(str(problem).splitlines() or ['none is left'])[0]}); "
            "take a smaller batch or smaller pictures"
        )
    if isinstance(problem, OSError) and problem.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            f"no permission to write or read {problem.filename or 'a file'}; "
            "change its permissions or name another file or folder"
        )
    if isinstance(problem, OSError) and problem.errno in UNUSABLE:
        return f"{problem.filename or 'a path'} cannot be used here ({problem.strerror}); name another file or folder"
    return None


@contextmanager
def defer_interrupts() -> Iterator[Callable[[], bool]]:
    """Hold back the first Ctrl-C or SIGTERM, so that a training step or a picture that was begun is finished first.

    Yields a function that says whether one came; loops ask it after every step. A second one ends the run at once, but for a
    SIGTERM right after the first: systems end whole groups of processes, and a parent hands it on to its jobs besides.
    A signal that is ignored stays ignored. Outside the main thread, which alone receives signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came = math.inf  # when, by `time.monotonic`
    before = {
        number: signal.getsignal(number)
        for number in SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN
    }

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: object) -> None:
        nonlocal came
        if number == signal.SIGTERM and 0 <= time.monotonic() - came < SAME_SIGNAL:
            return
        _note_signal(number)
        if came < math.inf:
            restore()
            signal.raise_signal(number)
        came = time.monotonic()

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: came < math.inf
    finally:
        restore()


def run_script(main: Callable[[], None]) -> None:
    """Run a stage script; a mistake ends it with one sentence on stderr and exit status 2.

    Ctrl-C ends it with status 130 and SIGTERM with 143, as shells number them; the message of a KeyboardInterrupt is
    printed. Programming errors keep their traceback: they are ours to fix, not the user's.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files need not be text, nor text that a terminal knows.
        sys.stdout.reconfigure(errors="backslashreplace")
    _note_signal(signal.SIGINT)
    try:
        with sigterm_as_interrupt():
            main()
    except KeyboardInterrupt as problem:
        _stop(
            str(problem)
            or "interrupted; everything finished so far is kept, the same command continues from there",
            128 + _last_signal,
        )
    except BrokenPipeError:
        # The reader of our output (head, less) closed the pipe. The rest is not done, so this is no success. Unless it can be
        # written somewhere, the interpreter complains of what stdout still holds when that is flushed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _stop(
            "error: the reader of the output closed the pipe; what is finished is kept, the same command continues from there"
        )
    except Exception as problem:
        sentence = user_message(problem)
        if sentence is None:
            raise
        _stop(f"error: {sentence}")


def _note_signal(number: int) -> None:
    global _last_signal
    _last_signal = int(number)


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, like Ctrl-C: locks and temporary files are removed, and the user is told what is kept."""

    def terminate(number: int, frame: object) -> None:
        _note_signal(number)
        raise KeyboardInterrupt

    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _stop(sentence: str, status: int = 2) -> None:
    # An unfinished progress bar would have the sentence on its line.
    for bar in list(getattr(ProgressBar, "_instances", ())):
        bar.close()
    print(sentence, file=sys.stderr)
    raise SystemExit(status)
