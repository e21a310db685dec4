#!/usr/bin/env bash
# Builds the wheel, installs it alone into a new environment outside of the checkout, and uses it as a user would, in an
# empty folder. Ends at the first thing that is wrong. Needs a package index; takes minutes.
#
#   bash tools/try_wheel.sh [PYTHON]    PYTHON: the interpreter of the new environment; python3 unless given
set -euo pipefail
python=$(command -v "${1:-python3}") || {
    echo "'${1:-python3}' does not start. Give an interpreter that does, such as python3.12" >&2
    exit 2
}
checkout=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH # nothing of the checkout may be found
export JAX_PLATFORMS=cpu PIP_DISABLE_PIP_VERSION_CHECK=1
wrong() {
    echo "wrong: $*" >&2
    exit 1
}
# Runs a command, which must succeed, and checks that what it prints contains a text.
prints() {
    local text=$1 printed
    shift
    echo "+ $*"
    printed=$("$@" 2>&1) || wrong "exit code $? of: $* printed: $printed"
    [[ $printed == *"$text"* ]] || wrong "no '$text' in what this printed: $*: $printed"
}

"$python" -m venv "$folder/all"
"$python" -m venv "$folder/few"
"$folder/all/bin/pip" wheel --quiet --no-deps --wheel-dir "$folder" "$checkout"
wheel=$(echo "$folder"/nfnet_flax-*.whl)
mkdir "$folder/empty"
cd "$folder/empty"

echo "the wheel with all packages that it needs:"
"$folder/all/bin/pip" install --quiet "$wheel"
"$folder/all/bin/pip" check
PATH="$folder/all/bin:$PATH"
hash -r
[[ $(python -c 'import nfnet_flax; print(nfnet_flax.__file__)') == "$folder/all/"* ]] || wrong "another nfnet_flax"
prints "nfnet_flax " nfnet --version
prints "digits " nfnet recipes
prints "written: " nfnet recipes copy digits .
[[ -s digits.py ]] || wrong "no digits.py was written"
prints "finished: 4 steps" nfnet train digits --debug --workdir runs/a
prints "finished: 4 steps" nfnet train digits.py --debug --workdir runs/b # the copy, too
prints "nfnet_f0 " nfnet models
prints "top-1 " nfnet eval --workdir runs/a
python -c '
from pathlib import Path
import numpy as np
from PIL import Image
Path("images").mkdir()
for number in range(3):
    noise = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(f"images/{number}.jpg")
'
prints "images/2.jpg" nfnet predict images --workdir runs/a
prints "nothing is wrong" nfnet doctor --workdir runs/a
echo "+ import nfnet_flax"
python -c '
import subprocess, sys
argv = [sys.executable, "-X", "importtime", "-c", "import nfnet_flax"]
last = subprocess.run(argv, capture_output=True, text=True, check=True).stderr.splitlines()[-1]
took_s = int(last.split("|")[1]) / 1e6
sys.exit(None if took_s < 0.3 else f"wrong: the import takes {took_s} s")
'

echo "the wheel with JAX, Flax, Optax and Pillow only:"
"$folder/few/bin/pip" install --quiet jax flax optax numpy pillow
"$folder/few/bin/pip" install --quiet --no-deps "$wheel"
PATH="$folder/few/bin:$PATH"
hash -r
prints "(2, 3) True" python -c '
import jax, optax
import jax.numpy as jnp
from flax import nnx
import nfnet_flax
from nfnet_flax.optim import adaptive_grad_clip
small = {"widths": (8,), "depths": (1,), "group_width": 4}
model = nfnet_flax.create_model("nfnet_f0", num_classes=3, rngs=nnx.Rngs(0), **small)
model.eval()
logits = model(jnp.ones((2, 32, 32, 3)))
params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
clipped = optax.chain(adaptive_grad_clip(0.01), optax.sgd(0.1))
updates, _ = clipped.update(params, clipped.init(params), params)
print(logits.shape, all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(updates)))
'
for command in --version models recipes "train digits --debug --workdir runs/c" "eval --workdir runs/a" \
    "predict images --workdir runs/a" "doctor --workdir runs/a"; do
    echo "+ nfnet $command, without the packages of the command"
    # shellcheck disable=SC2086
    printed=$(nfnet $command 2>&1) && wrong "nfnet $command succeeded, although packages are missing"
    [[ $printed == "nfnet: error: the package "*"pip install nfnet_flax"* ]] || wrong "nfnet $command printed: $printed"
done
echo "+ pip install nfnet_flax"
printed=$(pip install --dry-run nfnet_flax 2>&1) || wrong "the remedy fails: $printed"
[[ $printed == *"Would install"*tyro* ]] || wrong "pip install nfnet_flax does not install what is missing: $printed"
echo "nothing is wrong"
