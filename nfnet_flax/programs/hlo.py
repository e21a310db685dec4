"""Reads compiled programs: the data that they move between devices, their FLOPs, and a TPU compiler's time estimate."""

import collections
import dataclasses
import re

from nfnet_flax.programs.operations import Operation, Program, size_of
from nfnet_flax.programs.products import library_flops, product_flops

_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_NOT_OF_TYPES = re.compile(r"S\(\d+\)|/\*index=\d+\*/")


def parse(text: str) -> Program:
    """Reads `compiled.as_text()`. The result of a computation is that of its last operation."""
    computations: dict[str, list[Operation]] = {}
    entry, current = "", None
    results: dict[str, str] = {}
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current, results = computations.setdefault(header[2], []), {}
            entry = header[2] if header[1] else entry
        elif current is not None and (found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line)):
            current.append(_operation(found[1], _NOT_OF_TYPES.sub("", found[2]), results))
            results[found[1]] = current[-1].result
    program = Program(entry, computations)
    for operations in computations.values():
        by_name = {operation.name: operation for operation in operations}
        for position, operation in enumerate(operations):
            if operation.opcode == "custom-call":
                count = library_flops(operation, by_name, program)
                operations[position] = dataclasses.replace(operation, flops=count)
    return program


def _operation(name: str, text: str, results: dict[str, str]) -> Operation:
    opcode = re.search(r" ([a-z][a-z0-9\-]*)\(", text)
    assert opcode is not None, text
    end = _end_of_arguments(text, opcode.end())
    arguments, attributes = text[opcode.end() : end - 1], text[end:]
    called: tuple[str, ...] = ()
    if opcode[1] == "while":
        called = tuple(name for key in ("condition", "body") for name in re.findall(rf"{key}=%?([\w.\-]+)", text))
    elif opcode[1] == "conditional":
        listed = re.search(r"branch_computations=\{([^}]*)\}", text)
        named = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", text)
        called = tuple(re.findall(r"[\w.\-]+", listed[1])) if listed else tuple(named)
    elif opcode[1] == "call":
        called = tuple(re.findall(r"to_apply=%?([\w.\-]+)", text))
    cycles = re.search(r'"estimated_cycles":"(\d+)"', text)
    source = re.search(r'op_name="([^"]*)"', text)
    constant = re.search(r"s32\[\]\S* constant\((\d+)\)", text)
    fused = re.findall(r"calls=%?([\w.\-]+)", text) if opcode[1] == "fusion" else ()
    trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', text)
    return Operation(
        name=name,
        opcode=opcode[1],
        result=text[: opcode.start()],
        arguments=arguments,
        operands=tuple(re.findall(r"%([\w.\-]+)", arguments)),
        attributes=attributes,
        cycles=int(cycles[1]) if cycles else 0,
        source=source[1] if source else "",
        called=called,
        trip_count=int(trips[1]) if trips else None,
        literal=int(constant[1]) if constant else None,
        fused=tuple(fused),
        flops=product_flops(opcode[1], text, results) if opcode[1] in ("convolution", "dot") else 0,
        chain=chain[1] if (chain := re.search(r'chain_id="(\w+)"', text)) else "",
    )


def _end_of_arguments(text: str, start: int) -> int:
    """Index behind the parenthesis that closes what begins at `start`."""
    depth, end = 1, start
    while depth:
        depth += {"(": 1, ")": -1}.get(text[end], 0)
        end += 1
    return end


def trip_count(program: Program, operation: Operation) -> int:
    """How often the computations of an operation run: for a loop, from the compiler, its name, or its condition."""
    if operation.opcode != "while":
        return 1
    if operation.trip_count is not None:
        return operation.trip_count
    if named := re.search(r"turns_(\d+)/while$", operation.source):  # hidden from the compiler by `parallel/turns.py`
        return int(named[1])
    if operation.source.endswith("/carry/while"):  # also from there: for n turns, n - 1 times in all
        return 1
    literals = [each.literal for each in program.computations[operation.called[0]] if each.literal is not None]
    if len(literals) != 1:
        raise ValueError(f"the number of turns of a loop from {operation.source!r} cannot be read")
    return literals[0]


def estimated_cycles(program: Program) -> tuple[int, collections.Counter[str]]:
    """The compiler's estimate of one run, loops multiplied by their trip counts and the most expensive branch taken.

    Returns:
      All cycles, and the cycles of each kind of operation, named by its source and the shape of its result. The blocks
      of a stage count together, as `block*`.
    """
    by_source: collections.Counter[str] = collections.Counter()

    def cost(name: str, times: int, into: collections.Counter[str]) -> int:
        total = 0
        for operation in program.computations[name]:
            if operation.opcode == "conditional":
                branches = []
                for branch in operation.called:
                    inside: collections.Counter[str] = collections.Counter()
                    branches.append((cost(branch, times, inside), inside))
                cycles, inside = max(branches, key=lambda pair: pair[0])
                into.update(inside)
                total += cycles
            elif operation.called:
                turns = times * trip_count(program, operation)
                total += sum(cost(body, turns, into) for body in operation.called)
            elif operation.cycles:
                shape = re.sub(r"\{[^}]*\}", "", operation.result)
                source = re.sub(r"/block\d+/", "/block*/", operation.source)
                into[f"{source}  {shape if len(shape) < 60 else shape[:57] + '...'}"] += operation.cycles * times
                total += operation.cycles * times
        return total

    return cost(program.entry, 1, by_source), by_source


def flops(program: Program) -> int:
    """FLOPs of all convolutions and matrix products in one run on one device: loops are multiplied by their trip
    counts, and all branches are counted."""

    def walk(name: str) -> int:
        total = 0
        for operation in program.computations[name]:
            times = trip_count(program, operation) if operation.called else 1
            inside = sum(walk(body) for body in operation.called + operation.fused)
            total += operation.flops + times * inside
        return total

    return walk(program.entry)


def collective_bytes(program: Program) -> dict[str, int]:
    """Payload of each kind of collective in one run, per device: the size of its results in bytes, with loops
    multiplied by their trip counts."""
    found: collections.Counter[str] = collections.Counter()
    counted: set[str] = set()

    def walk(name: str, times: int) -> None:
        for operation in program.computations[name]:
            kind = operation.opcode.removesuffix("-done")  # the result of an asynchronous start also has the operand
            if kind in _COLLECTIVES and operation.chain not in counted:
                counted.update([operation.chain] if operation.chain else [])
                found[kind] += times * size_of(operation.result)
            for body in operation.called:
                walk(body, times * trip_count(program, operation))
            for body in operation.fused:
                walk(body, times)

    walk(program.entry, 1)
    return dict(found)
