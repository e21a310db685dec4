"""A small builder of ONNX graphs: nodes, constants, and names that can be read."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from nfnet_flax.export.options import StoredDtype

Attribute = int | float | str | Sequence[int]
"""Value of a node's attribute."""


@dataclasses.dataclass(frozen=True)
class Images:
    """A value of the graph with the axes (N, channels, height, width)."""

    name: str
    channels: int
    height: int
    width: int


class Graph:
    """Collects the nodes and constants of an ONNX graph. A node and its output have the same name."""

    def __init__(self, dtype: StoredDtype) -> None:
        self.dtype: StoredDtype = dtype
        """Type in which the graph computes."""
        self.nodes: list[Any] = []
        """`onnx.NodeProto`, in the order of the computation."""
        self.constants: list[Any] = []
        """`onnx.TensorProto`."""
        self._names: set[str] = set()

    def node(self, operator: str, inputs: Sequence[str], name: str, **attributes: Attribute) -> str:
        """Adds a node with one output; returns the name of both."""
        from onnx import helper

        self._claim(name)
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, name: str, value: np.ndarray) -> str:
        """Adds an array in the type of the graph; integers, such as shapes, stay int64. Returns its name."""
        from onnx import numpy_helper

        self._claim(name)
        kind = np.dtype(np.int64 if value.dtype.kind == "i" else self.dtype)
        with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite, which the comparison finds
            array = np.ascontiguousarray(value.astype(kind))
        self.constants.append(numpy_helper.from_array(array.reshape(value.shape), name))
        return name

    def elementwise(self, operator: str, x: Images, name: str, **attributes: Attribute) -> Images:
        """Adds a node with one input and an output of the same shape."""
        return dataclasses.replace(x, name=self.node(operator, [x.name], name, **attributes))

    def _claim(self, name: str) -> None:
        assert name not in self._names, f"two values are named {name}"
        self._names.add(name)
