"""What a person can get wrong, told in one sentence instead of a traceback."""

from __future__ import annotations

import errno
import io
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable

from tqdm import tqdm

# What json, numpy and torch raise for a file that is none of theirs; torch takes its first bytes for a pickle's instructions.
DAMAGED = (ValueError, RuntimeError, EOFError, LookupError, TypeError, AttributeError, struct.error, pickle.UnpicklingError,
           zipfile.BadZipFile)


class UserError(Exception):
    """A mistake the user can mend; the message says what was expected, where, and what to do."""


def disk_is_full(problem: Exception) -> bool:
    return isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def in_a_sentence(problem: Exception) -> str | None:
    """What to tell the user about a problem that is theirs to mend; None for all others."""
    if isinstance(problem, UserError):
        return str(problem)
    if disk_is_full(problem):
        return (f"the disk is full while writing {problem.filename or 'a file'}; "
                "free some space and run the same command again, finished files are kept")
    if isinstance(problem, MemoryError) or type(problem).__name__ == "OutOfMemoryError":  # the second is PyTorch's, on a GPU
        return (f"memory ran out ({(str(problem).splitlines() or ['no more to be had'])[0]}); "
                "take a smaller batch or smaller pictures")
    if isinstance(problem, OSError) and problem.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (f"no permission to write or read {problem.filename or 'a file'}; "
                "change its permissions or choose another --workspace")
    if isinstance(problem, OSError) and problem.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
                                                                  errno.ELOOP):
        return f"{problem.filename or 'a path'} cannot be used here ({problem.strerror}); name another file or folder"
    return None


def run_script(main: Callable[[], None]) -> None:
    """Run a stage script; a mistake ends it with one sentence on stderr and exit status 2.

    Programming errors keep their traceback: they are ours to mend, not the user's.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text, nor text that a terminal knows
    try:
        main()
    except KeyboardInterrupt:
        _stop("interrupted; everything finished so far is kept, the same command continues from there")
    except BrokenPipeError:
        # The reader of our output (head, less) went away. What came after is not done, so this is no success.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # or the interpreter complains once more when it flushes
        _stop("whoever read the output went away; what is finished is kept, the same command continues from there")
    except Exception as problem:
        sentence = in_a_sentence(problem)
        if sentence is None:
            raise
        _stop(sentence)


def _stop(sentence: str) -> None:
    for bar in list(getattr(tqdm, "_instances", ())):  # an unfinished progress bar would have the sentence on its line
        bar.close()
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(2)
