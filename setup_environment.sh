# Sourced by demo.sh, test.sh and .ci/run: a virtual environment in .venv with everything in it, made on first use.
# $1 is the requirements file. CSAD_VENV puts the environment elsewhere; PYTHON names the interpreter to make it with.

environment="${CSAD_VENV:-.venv}"
requirements="$1"
sum="$(cat requirements*.txt | cksum | cut -d' ' -f1)"
installed="$(cat "$environment/.installed" 2>/dev/null || true)"
# What the tests need includes all the rest.
if [ "$installed" != "$sum $requirements" ] && [ "$installed" != "$sum requirements-dev.txt" ]; then
    base="${PYTHON:-python3}"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || {
        echo "error: Python 3.10 or newer is needed; name one with PYTHON=/path/to/python3" >&2
        exit 2
    }
    echo "Setting up $environment (first time: several GB of packages, a few minutes) ..."
    "$base" -m venv "$environment" || {
        echo "error: python3 -m venv failed; on Debian and Ubuntu install the package python3-venv" >&2
        exit 2
    }
    "$environment/bin/pip" install --quiet --upgrade pip
    "$environment/bin/pip" install --quiet -r "$requirements"
    echo "$sum $requirements" > "$environment/.installed"
fi
python="$environment/bin/python"
