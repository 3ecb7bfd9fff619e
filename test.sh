#!/usr/bin/env bash
# Set up (on first use) and run the tests. Arguments go to pytest: ./test.sh -k mask
set -euo pipefail
cd "$(dirname "$0")"
. ./setup_environment.sh requirements-dev.txt
"$python" -m ruff check .
exec "$python" -m pytest "$@"
