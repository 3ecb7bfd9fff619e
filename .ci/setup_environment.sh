# Sourced by demo.sh, test.sh and .ci/run: makes a virtual environment from requirements.lock on first use, in .venv or
# in CSAD_VENV, with the interpreter that PYTHON names.

environment="${CSAD_VENV:-.venv}"
lock="$(cksum < requirements.lock)"
if [ "$(cat "$environment/.installed" 2>/dev/null || true)" != "$lock" ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || {
        echo "error: Python 3.10 or newer is needed; name one with PYTHON=/path/to/python3" >&2
        exit 2
    }
    echo "Setting up $environment by requirements.lock (the first time several GB of packages; interrupted, again) ..."
    "${PYTHON:-python3}" -m venv "$environment" || {
        echo "error: python3 -m venv failed; on Debian and Ubuntu install the package python3-venv" >&2
        exit 2
    }
    "$environment/bin/pip" install --quiet --require-hashes -r requirements.lock
    echo "$lock" > "$environment/.installed"
fi
python="$environment/bin/python"
