"""Counts the multiplications of the convolutions and matrix products of a compiled program."""

import math
import re


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
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", text)
    assert labels is not None, text
    total = 2 * out[labels[3].index("b")] * out[labels[3].index("f")] * right[labels[2].index("i")]
    window = _window(text)
    for position in range(len(labels[1]) - 2):
        axis = str(position)
        total *= _products(
            left[labels[1].index(axis)],
            right[labels[2].index(axis)],
            out[labels[3].index(axis)],
            {key: values[position] for key, values in window.items()},
        )
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
