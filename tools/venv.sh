# Sourced by demo.sh and test.sh with the name of an extra: makes and activates .venv, and installs the package with the
# extra, unless this was already done for the same pyproject.toml. PYTHON chooses the interpreter for a new .venv, and
# VENV another folder for it.
# shellcheck shell=bash
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
if [ ! -x "$VENV/bin/python" ]; then
    "$PYTHON" -c '' || {
        echo "'$PYTHON' does not start. Set PYTHON to an interpreter that does, such as PYTHON=python3.12" >&2
        exit 2
    }
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "Python 3.11 or newer is needed; '$PYTHON' is $("$PYTHON" --version 2>&1). Set PYTHON=python3.11" >&2
        exit 2
    }
    "$PYTHON" -m venv "$VENV"
fi
# shellcheck disable=SC1091
source "$VENV/bin/activate"
stamp=$VENV/installed-$1-$(cksum <pyproject.toml | tr ' ' '-')
if [ ! -e "$stamp" ]; then
    echo "installing nfnet_flax[$1] into $VENV; the first time takes a few minutes"
    python -m pip install --quiet --disable-pip-version-check --editable ".[$1]"
    touch "$stamp"
fi
