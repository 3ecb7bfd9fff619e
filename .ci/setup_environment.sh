# Sourced by demo.sh, test.sh and .ci/run: makes a virtual environment from requirements.lock on first use, in .venv or
# in CSAD_VENV, with the interpreter that PYTHON names.

environment="${CSAD_VENV:-.venv}"
lock="$(cksum < requirements.lock)"
if [ "$(cat "$environment/.installed" 2>/dev/null || true)" != "$lock" ] || [ ! -x "$environment/bin/python" ]; then
    case "$environment" in
        /*) folder="$environment" ;;
        *) folder="$PWD/$environment" ;;
    esac
    # A misspelt CSAD_VENV may name any folder, or none.
    named_by="CSAD_VENV names another one, where it is set"
    [ -z "${CSAD_VENV:-}" ] || named_by="CSAD_VENV names this folder"
    making="Making the virtual environment $folder"
    if [ -f "$environment/pyvenv.cfg" ] && [ -x "$environment/bin/python" ]; then
        making="Installing into the virtual environment $folder"
    elif [ -e "$environment" ] && { [ ! -d "$environment" ] || [ -n "$(ls -A "$environment")" ]; }; then
        echo "error: $folder exists and is not a virtual environment (no pyvenv.cfg and bin/python in it), so nothing is" \
            "installed into it; name another folder with CSAD_VENV, or remove this one" >&2
        exit 2
    fi
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || {
        echo "error: Python 3.10 or newer is needed; name one with PYTHON=/path/to/python3" >&2
        exit 2
    }
    echo "$making ($named_by): several GB of packages, by requirements.lock; interrupted, the same command continues ..."
    "${PYTHON:-python3}" -m venv "$environment" || {
        echo "error: python3 -m venv failed; on Debian and Ubuntu install the package python3-venv" >&2
        exit 2
    }
    "$environment/bin/pip" install --quiet --require-hashes -r requirements.lock
    echo "$lock" > "$environment/.installed"
fi
python="$environment/bin/python"
