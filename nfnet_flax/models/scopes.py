"""Names of operations, by which a trace or a compiled program shows the layer that an operation belongs to.

An operation of a block's convolution is called `stage2/block0/conv1/...`, in the forward and in the backward pass.
Names are metadata: they change no program and no bit.
"""

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import jax
from flax import nnx


class NamedLayer(nnx.Module):
    """A layer whose operations are named after its place in the network."""

    scope: str = "layer"
    """Name of the attribute that holds the layer; see `name_layers`."""


Layer = TypeVar("Layer", bound=NamedLayer)
P = ParamSpec("P")
T = TypeVar("T")


def scoped(method: Callable[Concatenate[Layer, P], T]) -> Callable[Concatenate[Layer, P], T]:
    """A method of a layer whose operations have the layer's name; not to be called by another such method."""

    @functools.wraps(method)
    def named(layer: Layer, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with jax.named_scope(layer.scope):
            return method(layer, *args, **kwargs)

    return named


def name_layers(network: nnx.Module) -> None:
    """Names each layer after the attribute that holds it; layers of a list are numbered, as in `stem0`."""
    for path, layer in nnx.iter_modules(network):
        if isinstance(layer, NamedLayer) and path:
            start = max(position for position, part in enumerate(path) if isinstance(part, str))
            layer.scope = "".join(map(str, path[start:]))
