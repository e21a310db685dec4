#!/usr/bin/env bash
# Makes .venv, installs the package, trains recipes/digits.py and draws its training curve.
# Run it again to continue a run that was stopped; delete runs/digits to start anew.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/venv.sh demo
nfnet train recipes/digits.py --workdir runs/digits "$@"
python tools/plot_curve.py runs/digits
