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
from nfnet_flax.programs.plan import compile_step, mesh_of
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

Computations = dict[str, list[str]]


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
    computations, entry = _computations(text)
    found: dict[str, list[str]] = collections.defaultdict(list)
    for name, source in _reached(entry, computations, _OUTSIDE):
        found[source] += _signatures(name, computations, with_shapes=source != _OUTSIDE)
    return found


def _computations(text: str) -> tuple[Computations, str]:
    found: Computations = {}
    current: list[str] = []
    entry = ""
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = found.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif " = " in line:
            current.append(re.sub(r"S\(\d+\)|/\*index=\d+\*/", "", line.strip().removeprefix("ROOT ")))
    return found, entry


def _reached(name: str, computations: Computations, source: str) -> Iterator[tuple[str, str]]:
    """All computations that run if one does, each with the loop that it belongs to."""
    yield name, source
    for line in computations[name]:
        _, _, opcode, _, rest = _split(line)
        if opcode not in ("conditional", "while", "call"):
            continue
        inside = source
        if named := re.search(r'op_name="([^"]*/turns)_\d+/while"', line):  # the name is from `parallel/reduce.py`
            inside = named[1]
        called = re.findall(r"(?:body|condition|to_apply|\w+_computation)=%?([\w.\-]+)", rest)
        for listed in re.findall(r"branch_computations=\{([^}]*)\}", rest):
            called += re.findall(r"[\w.\-]+", listed)
        for each in called:
            yield from _reached(each, computations, inside)


def _signatures(name: str, computations: Computations, *, with_shapes: bool) -> list[str]:
    """A text for each operation of a computation that computes floating-point numbers. Equal texts mean equal
    operations."""
    lines = {_split(line)[0]: line for line in computations[name]}
    found = []
    for line in lines.values():
        _, result, opcode, operands, rest = _split(line)
        if _computes(line, computations) and not _is_empty_sum(line, lines):
            # A fusion's body has the types of its parameters, and their order does not matter.
            given = "" if opcode == "fusion" else ", ".join(_split(lines[operand])[1] for operand in operands)
            text = f"{result} {opcode}({given}) {_attributes(rest, computations)}"
            found.append(text if with_shapes else _without_shapes(text))
    return found


def _without_shapes(signature: str) -> str:
    signature = re.sub(r"\{[\d,]*:[^{}]*\}", "", _TILES.sub("", signature))
    signature = re.sub(r"\[[\d,]*\](\{[\d,]*\})?", "[]", signature)
    return re.sub(
        r"(, )?\w*(dimensions|slice|slice_sizes|groups|pairs|ids)=(\{[^}]*\}|\[[^\]]*\]\S*|\w+)", "", signature
    )


def _computes(line: str, computations: Computations) -> bool:
    """Whether an operation computes floating-point numbers, and does not only move them."""
    _, result, opcode, _, rest = _split(line)
    if opcode == "fusion":
        return any(_computes(inner, computations) for inner in computations[_called(rest)])
    if opcode == "custom-call":
        return not _MOVING_CALLS.search(rest)
    return opcode not in _MOVES and re.match(r"\(?(bf16|f16|f32|f64)\b", result) is not None


def _called(rest: str) -> str:
    called = re.search(r"calls=%?([\w.\-]+)", rest)
    assert called is not None, rest
    return called[1]


def _split(line: str) -> tuple[str, str, str, list[str], str]:
    """Name, type, opcode, operands and attributes of an instruction."""
    label, text = line.split(" = ", 1)
    opcode = re.search(r" ([a-z][a-z0-9\-]*)\(", f" {text}")
    assert opcode is not None, line
    start = opcode.end() - 1
    depth, end = 1, start
    while depth:
        depth += {"(": 1, ")": -1}.get(text[end], 0)
        end += 1
    operands = re.findall(r"%([\w.\-]+)", text[start : end - 1])
    return label.lstrip("%"), text[: max(opcode.start() - 1, 0)].strip(), opcode[1], operands, text[end:]


def _attributes(rest: str, computations: Computations) -> str:
    """Attributes that determine what is computed, with the bodies of fusions in place of their names."""
    algorithm = re.findall(r'"(?:emitter|kernel_window_bounds|output_window_bounds)":(?:"\w*"|\[[^\]]*\])', rest)
    kept = re.sub(r"(, )?(metadata|backend_config|frontend_attributes|channel_id|sharding)=(\{.*|\d+)", "", rest)
    while found := re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", kept):
        kept = kept[: found.start()] + _body(found[1], computations) + kept[found.end() :]
    return f"{kept} {' '.join(algorithm)}"


def _body(name: str, computations: Computations) -> str:
    """A fused computation as text. Each of its results is written by itself, and in it each operation once, from the
    first operand to the result, named by its position. Results are in the order of the alphabet."""
    lines = {_split(line)[0]: line for line in computations[name]}
    root = next(reversed(lines))
    _, _, opcode, operands, _ = _split(lines[root])
    results = operands if opcode == "tuple" else [root]
    return "{" + " and ".join(sorted(_expression(result, lines, computations) for result in results)) + "}"


def _expression(result: str, lines: Mapping[str, str], computations: Computations) -> str:
    position: dict[str, int] = {}
    found: list[str] = []

    def visit(label: str) -> int:
        if label not in position:
            _, kind, opcode, operands, rest = _split(lines[label])
            given = [visit(operand) for operand in operands]
            if opcode in ("copy", "bitcast") or _is_empty_sum(lines[label], lines):
                position[label] = given[0]  # the same numbers
            elif opcode == "fusion" and len(given) == 1 and not _computes(lines[label], computations):
                position[label] = given[0]
            else:
                value = re.match(r".*constant\((.*?)\)", lines[label]) if opcode == "constant" else None
                inside = value[1] if value else ", ".join(map(str, given))
                if opcode == "convolution":
                    inside += f") by {_split(lines[operands[1]])[1]} ("
                found.append(f"{kind} {opcode}({inside}){_attributes(rest, computations)}")
                position[label] = len(found) - 1
        return position[label]

    visit(result)
    return "; ".join(found)


def _is_empty_sum(line: str, lines: Mapping[str, str]) -> bool:
    """Whether an instruction adds along axes of length 1, which changes no number."""
    _, kind, opcode, operands, _ = _split(line)
    if opcode != "reduce":
        return False
    size_before, size_after = (_num_elements(text) for text in (_split(lines[operands[0]])[1], kind))
    return size_before == size_after


def _num_elements(kind: str) -> int:
    shape = re.search(r"\[([\d,]*)\]", kind)
    return math.prod(int(size) for size in shape[1].split(",") if size) if shape else 0
