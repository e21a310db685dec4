"""Counts the multiplications of the convolutions and matrix products of a compiled program."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from nfnet_flax.programs.operations import Operation, Program


def product_flops(opcode: str, text: str, results: dict[str, str]) -> int:
    """FLOPs of an instruction: two for each multiplication; those by padding or by the holes of a dilation do not
    count.

    Args:
      opcode: `convolution` or `dot`.
      text: the instruction after its name, as in `f32[8,16] dot(%x, %y), lhs_contracting_dims={1}, ...`.
      results: name -> type of the result, for the instructions before it.
    """
    operands = re.search(rf" {opcode}\(([^)]*)\)", text)
    assert operands is not None, text
    left, right = (_shape(results[name]) for name in re.findall(r"%?([\w.\-]+)(?:,|$)", operands[1])[-2:])
    out = _shape(text)
    if opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", text)
        axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
        return 2 * math.prod(out) * math.prod(left[axis] for axis in axes)
    return _convolution_flops(left, right, out, text, _NOT_PADDED)


def library_flops(call: Operation, operations: Mapping[str, Operation], program: Program) -> int:
    """FLOPs of a call of cuDNN or cuBLAS, counted as in `product_flops`; 0: it is another call. Zeros that were put
    around and between the elements of a convolution's input before the call do not count.

    Args:
      call: the call.
      operations: name -> operation, for the operations of its computation.
      program: the program.
    """
    target = re.search(r'custom_call_target="__(cudnn\$conv|cublas\$)([\w$]*)"', call.attributes)
    if target is None:
        return 0
    left, right = (_shape(operations[name].result) for name in call.operands[:2])
    out = _shape(call.result)
    if target[1] == "cublas$":
        contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', call.attributes)
        axes = [int(axis) for axis in re.findall(r"\d+", contracted[1])] if contracted else []
        return 2 * math.prod(out) * math.prod(left[axis] for axis in axes)
    # Labels and window of each call are those of the forward convolution.
    if target[2] == "BackwardInput":
        return _convolution_flops(out, right, left, call.attributes, _NOT_PADDED)
    padding = _padding_of(call.operands[0], operations, program)
    kernel, result = (out, right) if target[2] == "BackwardFilter" else (right, out)
    return _convolution_flops(left, kernel, result, call.attributes, padding)


@dataclasses.dataclass(frozen=True)
class _Padding:
    """Zeros that a convolution's input has already, along each axis; empty: none."""

    low: tuple[int, ...] = ()
    high: tuple[int, ...] = ()
    between: tuple[int, ...] = ()
    """Number of zeros between neighbours."""


_NOT_PADDED = _Padding()


def _padding_of(name: str, operations: Mapping[str, Operation], program: Program) -> _Padding:
    operation = operations[name]
    if operation.opcode == "get-tuple-element" and (index := re.search(r"index=(\d+)", operation.attributes)):
        fusion = operations[operation.operands[0]]
        position = int(index[1])
    else:
        fusion, position = operation, 0
    if fusion.opcode == "fusion":
        inside = {each.name: each for each in program.computations[fusion.fused[0]]}
        root = next(reversed(inside.values()))
        return _padding_of(root.operands[position] if root.opcode == "tuple" else root.name, inside, program)
    found = re.search(r"padding=([\d_x\-]+)", operation.attributes)
    if operation.opcode != "pad" or found is None:
        return _NOT_PADDED
    axes = [(*map(int, axis.split("_")), 0)[:3] for axis in found[1].split("x")]
    low, high, between = zip(*axes, strict=True)
    return _NOT_PADDED if min(*low, *high) < 0 else _Padding(low, high, between)


def _convolution_flops(
    left: Sequence[int], kernel: Sequence[int], out: Sequence[int], text: str, padding: _Padding
) -> int:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", text)
    assert labels is not None, text
    total = 2 * out[labels[3].index("b")] * out[labels[3].index("f")] * kernel[labels[2].index("i")]
    window = _window(text)
    for position in range(len(labels[1]) - 2):
        axis = str(position)
        of_left = labels[1].index(axis)
        size, along = left[of_left], {key: values[position] for key, values in window.items()}
        if padding != _NOT_PADDED:
            low, high, between = (each[of_left] for each in (padding.low, padding.high, padding.between))
            before = int(along.get("pad", "0_0").split("_")[0])
            size = (size - low - high - 1) // (between + 1) + 1
            along |= {"pad": f"{before + low}_0", "lhs_dilate": str(between + 1)}
        total *= _products(size, kernel[labels[2].index(axis)], out[labels[3].index(axis)], along)
    return total


def _shape(result: str) -> list[int]:
    found = re.search(r"\b[a-z]+\d*\[([\d,]*)\]", result)
    assert found is not None, result
    return [int(size) for size in found[1].split(",") if size]


def _window(text: str) -> dict[str, list[str]]:
    """`window={size=3x3 pad=1_1x1_1}` -> the values of each axis."""
    found = re.search(r"window=\{([^}]*)\}", text)
    return {key: value.split("x") for key, value in (part.split("=") for part in (found[1] if found else "").split())}


def _products(size: int, kernel: int, out: int, window: dict[str, str]) -> int:
    """Number of pairs of an output position and a kernel position that use an element of the input, along one axis."""
    stride, spread, dilation = (int(window.get(key, "1")) for key in ("stride", "lhs_dilate", "rhs_dilate"))
    low = int(window.get("pad", "0_0").split("_")[0])
    positions = (o * stride + k * dilation - low for o in range(out) for k in range(kernel))
    return sum(position % spread == 0 and 0 <= position <= (size - 1) * spread for position in positions)
