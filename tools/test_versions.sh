#!/usr/bin/env bash
# Tests the package with the versions of packages in docs/constraints/, each in a new environment in a temporary folder:
# the tests of `tools/test.sh --fast`, those of what depends most on the packages, and a debug run. Needs a package
# index; takes minutes for each.
#
#   bash tools/test_versions.sh [--write] [NAME=PYTHON ...] [-- PYTEST OPTION ...]
#
# NAME is a file docs/constraints/NAME.txt, and PYTHON an interpreter; without any, all that CONTRIBUTING.md names. With
# --write the environments get the versions that there are now, in place of those of the files, which are written anew:
# `oldest` the lower bounds of pyproject.toml, the others the newest ones.
set -uo pipefail
cd "$(dirname "$0")/.."
write=false
if [ "${1:-}" = --write ]; then
    shift
    write=true
fi
more=(tests/test_{checkpoint,tensorboard,kept_programs}.py)
pairs=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    pairs+=("$1")
    shift
done
[ "${1:-}" = -- ] && shift
[ ${#pairs[@]} -gt 0 ] || pairs=(oldest=python3.11 newest=python3.11 newest-py313=python3.12 newest-py313=python3.13)

# The versions that an environment must have, as pip reads them.
wanted() {
    if ! $write; then
        cat "docs/constraints/$1.txt"
    elif [ "$1" = oldest ]; then
        "$2" -c '
import re, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
for requirement in project["dependencies"] + project["optional-dependencies"]["test"]:
    name, bound, marker = re.fullmatch(r"([\w-]+)(?:\[.*\])?>=([\d.]+)[^;]*(;.*)?", requirement).groups()
    print(f"{name}=={bound}{marker or str()}")
'
    fi
}

# Writes the constraints file of an environment.
write_file() {
    local name=$1 bin=$2 which="The newest versions"
    [ "$name" = oldest ] && which="The lowest versions that pyproject.toml allows, and what is installed with them"
    {
        echo "# $which: Python $("$bin/python" -c 'import platform; print(platform.python_version())'), Linux x86_64."
        echo "# Written by: bash tools/test_versions.sh --write $name=$("$bin/python" -c 'import sys
print(f"python{sys.version_info.major}.{sys.version_info.minor}")')"
        "$bin/python" -m pip --disable-pip-version-check freeze --exclude-editable | grep -E '^[A-Za-z0-9._-]+==[^ ]+$'
    } >"docs/constraints/$name.txt"
}

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH # the packages of another environment
rows=()
code=0
for pair in "${pairs[@]}"; do
    name=${pair%%=*} python=${pair#*=}
    echo "== $name, $python"
    venv=$folder/venv log=$folder/log
    rm -rf "$venv" "$folder/run"
    ok=1 debug="not run"
    if ! wanted "$name" "$python" >"$folder/constraints.txt"; then
        tests="no constraints"
    elif ! VENV=$venv PYTHON=$python PIP_CONSTRAINT=$folder/constraints.txt bash -eu tools/venv.sh test; then
        tests="not installed"
    else
        $write && write_file "$name" "$venv/bin"
        VENV=$venv bash tools/test.sh --fast --only-tests "${more[@]}" "$@" 2>&1 | tee "$log"
        ok=${PIPESTATUS[0]}
        tests=$(grep -E '^(=+ )?[0-9]+ (passed|failed|error)' "$log" | tail -n 1 | tr -d '=' |
            sed 's/ in .*//; s/^ *//')
        [ "$ok" = 0 ] || tests="FAILED: $tests"
        debug=passed
        JAX_PLATFORMS=cpu "$venv/bin/nfnet" train digits --debug --workdir "$folder/run" >"$log" 2>&1 || {
            debug=FAILED
            cat "$log"
        }
    fi
    [[ $ok = 0 && $debug = passed ]] || code=1
    versions=$("$venv/bin/python" -c '
import platform
from importlib.metadata import version
print(platform.python_version(), *map(version, ("jax", "flax", "numpy", "grain", "orbax-checkpoint")), sep="|")
' 2>/dev/null || echo "$python|||||")
    rows+=("$name|$versions|$tests|$debug")
done
{
    echo "constraints|python|jax|flax|numpy|grain|orbax|tests|debug run"
    printf '%s\n' "${rows[@]}"
} | column -t -s '|'
exit $code
