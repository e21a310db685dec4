"""What the operations of a GPU's program read from memory and write to it, and how much of it they only copy.

Each operation is a kernel of its own, which gets its operands from memory and puts its result there. Data that stay in
a cache from one kernel to the next are counted as if they did not.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping

from nfnet_flax.programs.hlo import trip_count
from nfnet_flax.programs.operations import Operation, Program, size_of

_NO_KERNELS = frozenset(
    {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier", "after-all", "while",
     "conditional", "call", "partition-id", "replica-id"}
)  # fmt: skip
_COLLECTIVE = re.compile(r"(all-|reduce-scatter|collective-|async-|send|recv)")
_LIBRARY_CALL = re.compile(r'custom_call_target="__cu')
_ONLY_COPIES = frozenset({"parameter", "copy", "transpose", "bitcast", "reshape", "tuple"})
_TURNS = re.compile(r"turns_\d+/while$")
"""End of the name of a loop over parts of the batch; see `parallel/turns.py`."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An operation that runs on a device."""

    operation: Operation
    times: int
    """How often it runs in one step."""
    num_turns: int
    """Number of turns of the loop over parts of the batch in which it is; 0: it is outside of them."""
    num_bytes: int
    """Number of bytes that it reads and writes each time."""
    flops: int
    """FLOPs of its convolutions and matrix products each time."""

    @property
    def is_copy(self) -> bool:
        """Whether it only copies, possibly into another order of axes. See `kernels_of` for fusions."""
        return self.operation.opcode in ("copy", "copy-start", "transpose")


def kernels_of(program: Program) -> list[Kernel]:
    """The kernels of a program: in branches, those of the branch that moves most. Communication between devices is
    left out, and so are calls of the compiler's own.

    A fusion that only copies has the opcode `copy`.
    """
    return list(_kernels(program.entry, 1, 0, program))


def _kernels(name: str, times: int, num_turns: int, program: Program) -> Iterator[Kernel]:
    operations = {operation.name: operation for operation in program.computations[name]}
    for operation in operations.values():
        if operation.opcode == "conditional":
            branches = (list(_kernels(branch, times, num_turns, program)) for branch in operation.called)
            yield from max(branches, key=lambda branch: sum(each.times * each.num_bytes for each in branch))
        elif operation.called:
            turns = trip_count(program, operation)
            inside = turns if _TURNS.search(operation.source) else num_turns
            for body in operation.called:
                yield from _kernels(body, times * turns, inside, program)
        elif _is_kernel(operation):
            fused = [each for body in operation.fused for each in program.computations[body]]
            flops = operation.flops + sum(each.flops for each in fused)
            if operation.opcode == "fusion" and {each.opcode for each in fused} <= _ONLY_COPIES:
                operation = dataclasses.replace(operation, opcode="copy")
            yield Kernel(operation, times, num_turns, _traffic(operation, operations, program), flops)


def _is_kernel(operation: Operation) -> bool:
    if operation.opcode == "custom-call":
        return _LIBRARY_CALL.search(operation.attributes) is not None
    is_end = operation.opcode.endswith("-done")
    return operation.opcode not in _NO_KERNELS and not is_end and not _COLLECTIVE.match(operation.opcode)


def _traffic(operation: Operation, operations: Mapping[str, Operation], program: Program) -> int:
    if operation.opcode in ("dynamic-slice", "slice", "copy-start"):
        return 2 * size_of(operation.result)
    if operation.opcode == "dynamic-update-slice":
        return 2 * size_of(operations[operation.operands[1]].result)
    if not operation.fused:
        given = sum(size_of(operations[operand].result) for operand in operation.operands)
        return given + size_of(operation.result)
    inside = program.computations[operation.fused[0]]
    read = sum(_read(each, inside) for each in inside if each.opcode == "parameter")
    return read + _written(inside)


def _read(parameter: Operation, inside: list[Operation]) -> int:
    """Number of bytes of a parameter that a fusion needs: only those of slices, where it takes slices of it."""
    whole, found = size_of(parameter.result), 0
    for user in inside:
        if parameter.name not in user.operands:
            continue
        is_first = user.operands[0] == parameter.name
        if is_first and user.opcode in ("dynamic-slice", "slice", "gather"):
            found += size_of(user.result)
        elif not (is_first and user.opcode == "dynamic-update-slice"):  # which writes in place
            return whole
    return min(whole, found)


def _written(inside: list[Operation]) -> int:
    """Number of bytes that a fusion writes: of an array that it updates in place, those of the update."""
    by_name = {operation.name: operation for operation in inside}
    root = inside[-1]
    results = [by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0
    for result in results:
        while result.opcode == "bitcast":
            result = by_name[result.operands[0]]
        is_update = result.opcode == "dynamic-update-slice"
        total += size_of(by_name[result.operands[1]].result if is_update else result.result)
    return total
