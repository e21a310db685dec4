#!/usr/bin/env bash
# Formats, lints, type-checks and tests, in the same .venv as the demo. Takes seconds to start when nothing changed.
#
#   bash tools/test.sh [PYTEST OPTION ...]           everything
#   bash tools/test.sh --fast [PYTEST OPTION ...]    the same checks, and only the tests that changes break most often
#
# --only-tests, after --fast or in its place, leaves the static checks out.
set -euo pipefail
cd "$(dirname "$0")/.."

# The files that --fast tests: two minutes on two idle cores, with static checks. `pytest --durations=0` times new tests.
fast_files=(
    tests/test_{structure,docs,paths,recipes,options,cli,metrics,lease,optim,weight_files,hlo}.py
    tests/test_{classes,image_folder,data,transforms,constraints,figures}.py
)
too_slow=( # tests in these files that --fast leaves out
    tests/test_structure.py::test_models_and_step_need_only_jax_flax_optax_and_pillow
    tests/test_docs.py::test_commands_and_code_run
    tests/test_recipes.py::test_a_debug_run_goes_through_everything
    tests/test_cli.py::test_divergence_stops_before_anything_is_saved
    tests/test_lease.py::test_the_second_start_of_a_run_ends_with_code_2_and_changes_nothing
    tests/test_optim.py::test_published_trajectory
    tests/test_optim.py::test_the_heads_kernel_alone_is_exempt
    tests/test_optim.py::test_decay_spares_biases_and_gains
    tests/test_weight_files.py::test_many_problems_are_counted_by_layer
)
chosen=()
if [ "${1:-}" = --fast ]; then
    shift
    chosen=("${fast_files[@]}" "${too_slow[@]/#/--deselect=}")
fi
only_tests=false
if [ "${1:-}" = --only-tests ]; then
    shift
    only_tests=true
fi

source tools/venv.sh test
export JAX_PLATFORMS=cpu
if ! $only_tests; then
    ruff format --check .
    ruff check .
    mypy
fi
pytest -n 2 --dist loadfile --no-loadscope-reorder ${chosen[@]+"${chosen[@]}"} "$@"
