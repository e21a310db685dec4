"""The operations of a compiled program, as `hlo.py` reads them from its text."""

import dataclasses
import math
import re

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}


@dataclasses.dataclass(frozen=True)
class Operation:
    """One instruction of a compiled program."""

    name: str
    opcode: str
    result: str
    """Type of its result: `f32[8,128]{1,0}`, or a tuple of them. Spaces of memory are left out."""
    arguments: str
    """What it is given, as in the text: names of operations, or the value of a constant."""
    operands: tuple[str, ...]
    """Names of the operations whose results it is given."""
    attributes: str
    """What the text says after its arguments."""
    cycles: int
    """The compiler's estimate of its cycles; 0 if there is none."""
    source: str
    """Name of the operation in the traced program that it comes from."""
    called: tuple[str, ...]
    """Computations that it runs (for a loop: condition and body), without those that are fused into it."""
    trip_count: int | None
    """Number of turns of a loop, if the compiler gives it."""
    literal: int | None
    """Value of an integer constant."""
    fused: tuple[str, ...]
    """Computations that are fused into it."""
    flops: int
    """FLOPs of a convolution or matrix product: twice the number of multiplications, without those by padding."""
    chain: str
    """For a collective that runs beside other operations, in pieces that are fused into them: the name that its pieces
    share; else empty."""


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of a compiled program."""

    entry: str
    computations: dict[str, list[Operation]]


def size_of(result: str) -> int:
    """Size in bytes of a result of this type; of a tuple, that of its elements together."""
    return sum(
        _BYTES[kind] * math.prod(int(size) for size in shape.split(",") if size)
        for kind, shape in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", result)
        if kind in _BYTES
    )
