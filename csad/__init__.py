"""What has to happen before anything else is imported: scripts import this first, and nothing but Python itself is needed for it.

How a script ends while it imports, which `csad.errors.run_script` cannot see: Ctrl-C with one line, and where a package is not
installed with a sentence that has the lines that help, instead of tracebacks.

How a thread of PyTorch's waits for the others: OpenMP looks once, when PyTorch is loaded. By default GNU's OpenMP waits in a
loop, some milliseconds long, before it sleeps. Where something else wants the same cores it takes them from the very threads
that it waits for: two trainings at once on two cores then take four times as long as one, twice as long as one after the other.
Waiting shortly costs a run that has the machine for itself nothing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType

__version__ = "0.1.0"
# Of everything that one run writes and another reads: provenance, checkpoints, progress, and exported models. Raise it with every
# change after which older files would mean something else, also where only what is computed changes.
FORMAT_VERSION = 6
# What decides it; the second, where somebody set it, decides alone.
VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
SPINS = "1000"  # instead of 300,000; what GNU's OpenMP takes itself where it sees more threads of its own than cores
ROOT = Path(__file__).resolve().parents[1]
FEW_PACKAGES = ("predict.py", "serve.py", "csad-predict", "csad-serve")  # do without PyTorch

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def explain(kind: type[BaseException], problem: BaseException, traceback: TracebackType | None) -> None:
    """As `sys.excepthook`: Ctrl-C gets a line and status 130, a missing package a sentence and 2, all else its traceback."""
    if _was_interrupted(problem):
        print("interrupted; the same command starts again", file=sys.stderr)
        sys.stderr.flush()
        raise SystemExit(130)
    package = (problem.name or "").partition(".")[0] if isinstance(problem, ModuleNotFoundError) else ""
    if not package or (ROOT / package).exists() or (ROOT / f"{package}.py").exists():
        sys.__excepthook__(kind, problem, traceback)
        return
    few = Path(sys.argv[0]).name in FEW_PACKAGES and package != "torch"
    requirements = "'.[station]'" if few else "-r requirements.txt"
    environment = ROOT / ".venv"
    activate = f"source {environment}/bin/activate"
    print(
        f"error: the package '{package}' is not installed for {sys.executable}; activate an environment that has everything:\n"
        f"    {activate if (environment / 'bin/activate').exists() else f'python3 -m venv {environment} && {activate}'}\n"
        f"    cd {ROOT} && pip install {requirements}",
        file=sys.stderr,
    )
    sys.stderr.flush()
    raise SystemExit(2)


def _was_interrupted(problem: BaseException | None) -> bool:
    """Whether Ctrl-C is behind it; packages make an ImportError of their own of what interrupts them."""
    while problem is not None and not isinstance(problem, KeyboardInterrupt):
        if not isinstance(problem, ImportError):
            return False
        problem = problem.__cause__ or problem.__context__
    return problem is not None


sys.excepthook = explain
