"""Shows where the time of our training step is spent, by JAX's profiler, for one part and for several parts.

`JAX_PLATFORMS=cpu python tools/profile_step.py [--model nfnet_f0 --batch 8 --size 128 --dtype float32]`. Times are
summed over the threads that ran an operation. Operations that ran at the same time are all counted; if one operation
was divided over several threads, the helping threads are not. So the sum is neither the wall time nor the time of all
cores: only compare the lines with one another.
"""

import argparse
import collections
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
from jax.profiler import ProfileData

from nfnet_flax.models import model_config
from nfnet_flax.programs.hlo import parse
from nfnet_flax.programs.memory_traffic import kernels_of
from nfnet_flax.programs.operations import Operation
from nfnet_flax.runtime import keep_freed_memory
from nfnet_flax.training.state import model_structure
from tools.bench_step import our_training, timed
from tools.figures import Row, write_figures


def kinds_of(text: str) -> dict[str, tuple[str, str]]:
    """Name of each instruction of a compiled program -> phase of the step and kind of work."""
    program = parse(text)

    def opcodes(operation: Operation) -> set[str]:
        inside = operation.fused + (operation.called if operation.opcode == "call" else ())  # a loop only waits
        return {operation.opcode}.union(*(opcodes(each) for name in inside for each in program.computations[name]))

    return {
        operation.name: (_phase(operation.source), _kind(opcodes(operation)))
        for operations in program.computations.values()
        for operation in operations
    }


def _phase(path: str) -> str:
    if "/cond/branch" in path:
        return "update"
    if "transpose(jvp" in path:
        return "backward"
    if "jvp(" in path:
        return "forward"
    return "loop over the parts" if "/while" in path else "rest"


def _kind(opcodes: set[str]) -> str:
    if opcodes & {"convolution", "dot"}:
        return "convolutions" if "convolution" in opcodes else "matrix products"
    return "with a transpose" if opcodes & {"transpose", "copy"} else "element-wise, sums, cuts"


def passes_of_update(text: str, num_parameters: int) -> float:
    """How often the update of a compiled program reads or writes an array of the size of all parameters."""
    kernels = [kernel for kernel in kernels_of(parse(text)) if _phase(kernel.operation.source) == "update"]
    return sum(kernel.times * kernel.num_bytes for kernel in kernels) / (4 * num_parameters)


def profile(options: argparse.Namespace, num_parts: int | None) -> tuple[float, collections.Counter[tuple[str, str]]]:
    """Wall time of a step in milliseconds, and milliseconds of each phase and kind of work; all are medians."""
    step = our_training(options, "ours", num_parts, library=False, reproducible=options.reproducible)
    kinds = kinds_of(step.text)
    shapes = model_structure(model_config(options.model), 1000).shapes
    count = sum(math.prod(shape.shape) for shape in shapes.values())
    print(f"the update reads and writes all parameters {passes_of_update(step.text, count):.1f} times", flush=True)
    for _ in range(2):
        step.run()
    wall = statistics.median(timed(step.run) for _ in range(options.steps))
    tables = [traced(step.run, kinds) for _ in range(options.steps)]
    keys = set().union(*tables)
    return 1e3 * wall, collections.Counter({key: statistics.median(table[key] for table in tables) for key in keys})


def traced(run: Callable[[], None], kinds: dict[str, tuple[str, str]]) -> collections.Counter[tuple[str, str]]:
    """Milliseconds of each phase and kind of work in one step."""
    found: collections.Counter[tuple[str, str]] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (file,) = Path(folder).rglob("*.xplane.pb")
        trace = ProfileData.from_file(str(file))
    for event in (event for plane in trace.planes for line in plane.lines for event in line.events):
        name: Any = dict(event.stats).get("hlo_op")
        if name in kinds:
            found[kinds[name]] += event.duration_ns / 1e6
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nfnet_f0", help="one of `nfnet models`")
    parser.add_argument("--batch", type=int, default=8, help="number of images of a step")
    parser.add_argument("--size", type=int, default=128, help="height and width of the images, in pixels")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="type of the computation")
    parser.add_argument("--microbatches", type=int, default=4, help="number of parts in the second step")
    parser.add_argument("--reproducible", action="store_true", help="add the parts in the fixed order")
    parser.add_argument("--steps", type=int, default=7, help="number of steps that are timed, and that are traced")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the table there, as docs/figures/ has them"
    )
    options = parser.parse_args()
    keep_freed_memory()  # as `nfnet train` does
    walls, tables = zip(*(profile(options, parts) for parts in (None, options.microbatches)), strict=True)
    heads = ("one part", f"{options.microbatches} parts")
    print(f"{options.model}, batch {options.batch}, {options.size} px, {options.dtype}; ms of a step")
    print(f"{'':<48}{heads[0]:>10}{heads[1]:>10}{'more':>10}")
    rows: list[Row] = []

    def show(phase: str, kind: str, one: float, several: float) -> None:
        print(f"{phase:<22}{kind:<26}{one:>10.0f}{several:>10.0f}{several - one:>+10.0f}")
        rows.append({"phase": phase, "work": kind, heads[0]: round(one), heads[1]: round(several)})

    for key in sorted(set(tables[0]) | set(tables[1]), key=lambda key: -tables[0][key]):
        show(*key, *(table[key] for table in tables))
    show("sum over threads", "", *(sum(table.values()) for table in tables))
    show("wall time", "", *walls)
    if options.json:
        write_figures(options.json, rows)


if __name__ == "__main__":
    main()
