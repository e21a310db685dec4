"""A network as a pure function of a flat `{"stages.0.1.conv0.kernel": array}` dict.

The training state, parameter groups, converters and checkpoints all speak these names.
"""

from typing import Any

import jax
from flax import nnx

Params = dict[str, jax.Array]
GraphDef = Any
"""Structure of a network without its parameters; static and hashable."""


def split(model: nnx.Module) -> tuple[GraphDef, Params]:
    """Structure and named parameters of a network."""
    graphdef, state = nnx.split(model, nnx.Param)
    flat = nnx.to_flat_state(state)
    return graphdef, {".".join(map(str, path)): variable.get_value() for path, variable in flat}


def merge(graphdef: GraphDef, params: Params) -> Any:
    """The network of a structure with these parameters; the inverse of `split`. Cheap, but not for every step: call it
    while tracing."""
    nested: dict[Any, Any] = {}
    for name, value in params.items():
        *parents, leaf = (int(part) if part.isdigit() else part for part in name.split("."))
        node = nested
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = value
    return nnx.merge(graphdef, nested)
