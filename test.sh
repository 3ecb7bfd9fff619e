#!/usr/bin/env bash
# Set up (on first use) and run the tests. Arguments go to pytest: ./test.sh -k mask; -n 0 runs one at a time, for a debugger
set -euo pipefail
cd "$(dirname "$0")"
. .ci/setup_environment.sh
"$python" -m ruff check .
"$python" -m ruff format --check --quiet .
"$python" -m mypy
# Two threads a test: as many files at a time as there are cores, four at most.
exec "$python" -m pytest -n logical --maxprocesses 4 --dist loadfile "$@"
