"""Compares the compiled steps of several numbers of devices: do they do the same arithmetic?

What decides the bits of an update is computed in loops whose body does not depend on the number of devices
(`parallel/reduce.py`), and in operations on each element by itself. If the compiler makes the same operations of both
for two numbers of devices, fused in the same way, then devices of the same kind round alike. Where the operands lie in
memory, when an operation runs and what it is called does not matter, and neither do operations that only move numbers.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from nfnet_flax.config import ConfigError
from nfnet_flax.programs.hlo import parse
from nfnet_flax.programs.operations import Operation, Program
from nfnet_flax.programs.plan import mesh_of
from nfnet_flax.programs.step_plan import compile_step
from nfnet_flax.recipe import Recipe

_OUTSIDE = "outside of loops"
_MOVES = frozenset(
    {"parameter", "get-tuple-element", "tuple", "copy", "copy-start", "copy-done", "bitcast", "constant", "after-all",
     "async-start", "async-update", "async-done", "opt-barrier", "slice-start", "slice-done", "reshape", "broadcast",
     "transpose", "slice", "concatenate", "reverse", "pad", "iota", "select", "dynamic-slice", "dynamic-update-slice",
     "conditional", "while", "call", "fusion", "partition-id", "replica-id", "all-gather", "all-gather-start",
     "all-gather-done", "all-to-all", "all-to-all-start", "all-to-all-done", "collective-permute",
     "collective-permute-start", "collective-permute-done"}
)  # fmt: skip
"""Operations that compute no number by themselves. What some of them run is compared itself."""
_MOVING_CALLS = re.compile(r'custom_call_target="(AllocateBuffer|AssumeGatherIndicesInBound|ConcatBitcast)"')
_TILES = re.compile(r'"(?:kernel|output)_window_bounds":\[[^\]]*\]')


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The operations of one part of two programs. Those that only move numbers are not counted."""

    source: str
    """The loop, by its place in the traced program, or `outside of loops`, where shapes are left out."""
    num_equal: int
    """Number of operations that are the same in both programs."""
    num_additions: int
    """Number of others in both programs together that only add: IEEE addition has one right result, and the order of
    the additions is that of the tree (`parallel/reduce.py`), so that they cannot round differently."""
    num_other_tiles: int
    """Number of operations that differ only in how many results the compiler computes together. Each result is the sum
    of the same products, cut into the same pieces."""
    other_sums: tuple[str, ...]
    """Operations that differ only in the tiles in which the compiler computes them, but whose sums are cut into other
    pieces, or that cannot be told. Whether they are rounded alike is not known."""
    only_first: tuple[str, ...]
    """Operations of the first program that the second does not have, each as often as it is missing."""
    only_second: tuple[str, ...]

    @property
    def is_equal(self) -> bool:
        """Whether there is no operation that could round differently. How operations are connected is not compared."""
        return not self.other_sums and not self.only_first and not self.only_second


def compare_topologies(recipe: Recipe, topologies: Sequence[str]) -> bool:
    """Compiles a recipe's training step for several topologies, and prints how each differs from the first one.

    Returns:
      Whether all do the same arithmetic.

    Raises:
      ConfigError: a topology is missing, or as for `plan.plan`.
    """
    if len(topologies) < 2:
        raise ConfigError(f"--compare {' '.join(topologies)}: give at least two topologies, such as v5e:2x4 v5e:2x4/4")
    if not recipe.execution.reproducible:
        raise ConfigError("execution.reproducible = False: only sums in a fixed order can have the same bits")
    first, are_equal = None, True
    for name in topologies:
        text = compile_step(recipe, name, mesh_of(recipe, name))[1].as_text()
        if text is None:
            raise ConfigError(f"the compiler for {name} does not show the compiled program: install another libtpu")
        if first is None:
            first = text
            continue
        found = compare(first, text)
        are_equal &= all(each.is_equal for each in found)
        print("\n".join([f"{topologies[0]} and {name}:", *map(_describe, found)]), flush=True)
    return are_equal


def _describe(found: Comparison) -> str:
    lines = [
        f"  {found.source}: {found.num_equal} operations equal, {found.num_additions} only add, "
        f"{found.num_other_tiles} with other tiles for the same sums, {len(found.other_sums)} with sums cut "
        f"differently, {len(found.only_first)} + {len(found.only_second)} differ"
    ]
    for title, operations in (("sums", found.other_sums), ("first", found.only_first), ("other", found.only_second)):
        lines += [f"    {title}: {text if len(text) < 200 else text[:197] + '...'}" for text in operations]
    return "\n".join(lines)


def compare(first: str, second: str) -> list[Comparison]:
    """Compares two compiled programs, given as `compiled.as_text()`, loop by loop."""
    parts = [_parts(text) for text in (first, second)]
    found = []
    for source in sorted(parts[0].keys() | parts[1].keys()):
        one, other = (collections.Counter(each.get(source, ())) for each in parts)
        num_equal = (one & other).total()
        lacking = [list((one - other).elements()), list((other - one).elements())]
        rest = [[text for text in texts if not _only_adds(text)] for texts in lacking]
        num_additions = sum(map(len, lacking)) - sum(map(len, rest))
        pairs = _pairs_but_for_tiles(*rest)
        other_sums = tuple(
            f"{' '.join(_TILES.findall(left))} / {' '.join(_TILES.findall(right))} of {left}"
            for left, right in pairs
            if _pieces_of_sums(left) is None or _pieces_of_sums(left) != _pieces_of_sums(right)
        )
        num_tiles = len(pairs) - len(other_sums)
        found.append(
            Comparison(source, num_equal, num_additions, num_tiles, other_sums, tuple(rest[0]), tuple(rest[1]))
        )
    return found


def _only_adds(signature: str) -> bool:
    computing = set(re.findall(r" ([a-z][a-z\-]*)\(", signature)) - _MOVES
    return computing <= {"add"}  # without any: what is left of sums over axes of length 1


def _pairs_but_for_tiles(first: list[str], second: list[str]) -> list[tuple[str, str]]:
    """Takes operations that differ only in their tiles out of both lists, and returns them."""
    waiting = collections.defaultdict(list)
    for text in second:
        waiting[_TILES.sub("", text)].append(text)
    found = []
    for text in list(first):
        if alike := waiting[_TILES.sub("", text)]:
            partner = alike.pop()
            first.remove(text)
            second.remove(partner)
            found.append((text, partner))
    return found


def _pieces_of_sums(signature: str) -> list[int] | None:
    """The sizes of the pieces into which the sums of a convolution's results are cut; None: this cannot be told.

    The compiler names, for each dimension of the kernel in the order of its layout, how much it takes at a time.
    """
    window = re.search(r'"kernel_window_bounds":\[([^\]]*)\]', signature)
    kernel = re.search(
        r" convolution\([^)]*\) by \w+\[[\d,]*\]\{([\d,]+):[^}]*\}.*? dim_labels=\w+?_(\w+)->", signature
    )
    if window is None or kernel is None:
        return None
    sizes = [int(size) for size in re.findall(r"\d+", window[1])]
    order = [int(axis) for axis in reversed(kernel[1].split(","))]
    if len(order) != len(sizes):
        return None
    # Over outputs nothing is added, and neither over groups, which the compiler writes as a third dimension of space.
    return [size for axis, size in zip(order, sizes, strict=True) if kernel[2][axis] not in "o2"]


def _parts(text: str) -> dict[str, list[str]]:
    """Source of each loop, and `_OUTSIDE` -> signatures of the operations that compute numbers."""
    program = parse(text)
    found: dict[str, list[str]] = collections.defaultdict(list)
    for name, source in _reached(program.entry, program, _OUTSIDE):
        found[source] += _signatures(name, program, with_shapes=source != _OUTSIDE)
    return found


def _reached(name: str, program: Program, source: str) -> Iterator[tuple[str, str]]:
    """All computations that run if one does, each with the loop that it belongs to."""
    yield name, source
    for operation in program.computations[name]:
        # The name is from `parallel/turns.py`.
        named = re.match(r"(.*/turns)_\d+/while$", operation.source) if operation.opcode == "while" else None
        for each in operation.called:
            yield from _reached(each, program, named[1] if named else source)


def _signatures(name: str, program: Program, *, with_shapes: bool) -> list[str]:
    """A text for each operation of a computation that computes floating-point numbers. Equal texts mean equal
    operations."""
    operations = _by_name(program, name)
    found = []
    for operation in operations.values():
        if _computes(operation, program) and not _is_empty_sum(operation, operations):
            # A fusion's body has the types of its parameters, and their order does not matter.
            is_fusion = operation.opcode == "fusion"
            given = "" if is_fusion else ", ".join(operations[operand].result for operand in operation.operands)
            text = f"{operation.result} {operation.opcode}({given}) {_attributes(operation, program)}"
            found.append(text if with_shapes else _without_shapes(text))
    return found


def _by_name(program: Program, computation: str) -> dict[str, Operation]:
    return {operation.name: operation for operation in program.computations[computation]}


def _without_shapes(signature: str) -> str:
    signature = re.sub(r"\{[\d,]*:[^{}]*\}", "", _TILES.sub("", signature))
    signature = re.sub(r"\[[\d,]*\](\{[\d,]*\})?", "[]", signature)
    return re.sub(
        r"(, )?\w*(dimensions|slice|slice_sizes|groups|pairs|ids)=(\{[^}]*\}|\[[^\]]*\]\S*|\w+)", "", signature
    )


def _computes(operation: Operation, program: Program) -> bool:
    """Whether an operation computes floating-point numbers, and does not only move them."""
    if operation.opcode == "fusion":
        return any(_computes(inner, program) for each in operation.fused for inner in program.computations[each])
    if operation.opcode == "custom-call":
        return not _MOVING_CALLS.search(operation.attributes)
    return operation.opcode not in _MOVES and re.match(r"\(?(bf16|f16|f32|f64)\b", operation.result) is not None


def _attributes(operation: Operation, program: Program) -> str:
    """Attributes that determine what is computed, with the bodies of fusions in place of their names."""
    text = operation.attributes
    algorithm = re.findall(r'"(?:emitter|kernel_window_bounds|output_window_bounds)":(?:"\w*"|\[[^\]]*\])', text)
    kept = re.sub(r"(, )?(metadata|backend_config|frontend_attributes|channel_id|sharding)=(\{.*|\d+)", "", text)
    while found := re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", kept):
        kept = kept[: found.start()] + _body(found[1], program) + kept[found.end() :]
    return f"{kept} {' '.join(algorithm)}"


def _body(name: str, program: Program) -> str:
    """A fused computation as text. Each of its results is written by itself, and in it each operation once, from the
    first operand to the result, named by its position. Results are in the order of the alphabet."""
    operations = _by_name(program, name)
    root = next(reversed(operations.values()))
    results = root.operands if root.opcode == "tuple" else (root.name,)
    return "{" + " and ".join(sorted(_expression(result, operations, program) for result in results)) + "}"


def _expression(result: str, operations: Mapping[str, Operation], program: Program) -> str:
    position: dict[str, int] = {}
    found: list[str] = []

    def visit(name: str) -> int:
        if name not in position:
            operation = operations[name]
            given = [visit(operand) for operand in operation.operands]
            if operation.opcode in ("copy", "bitcast") or _is_empty_sum(operation, operations):
                position[name] = given[0]  # the same numbers
            elif operation.opcode == "fusion" and len(given) == 1 and not _computes(operation, program):
                position[name] = given[0]
            else:
                inside = operation.arguments if operation.opcode == "constant" else ", ".join(map(str, given))
                if operation.opcode == "convolution":
                    inside += f") by {operations[operation.operands[1]].result} ("
                found.append(f"{operation.result} {operation.opcode}({inside}){_attributes(operation, program)}")
                position[name] = len(found) - 1
        return position[name]

    visit(result)
    return "; ".join(found)


def _is_empty_sum(operation: Operation, operations: Mapping[str, Operation]) -> bool:
    """Whether an operation adds along axes of length 1, which changes no number."""
    if operation.opcode != "reduce":
        return False
    return _num_elements(operations[operation.operands[0]].result) == _num_elements(operation.result)


def _num_elements(result: str) -> int:
    shape = re.search(r"\[([\d,]*)\]", result)
    return math.prod(int(size) for size in shape[1].split(",") if size) if shape else 0
