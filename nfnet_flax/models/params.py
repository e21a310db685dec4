"""A network as a pure function of a flat `{"stages.0.1.conv0.kernel": array}` dict.

The training state, parameter groups, converters and checkpoints all use these names. A name is the path of attributes
and positions in lists that leads from the network to an `nnx.Param`, or to an `nnx.BatchStat` for running statistics.
The step, the optimizer and the shardings rely on the names, so every family has to follow these rules (`check_names`):

- There are no other variables. In particular, layers have no random state: random numbers are drawn from the keys of
  the examples, which a call is given (`layers.dropout`, `layers.drop_path`).
- Parameters are float32, whatever type the network computes in.
- `X.kernel` is a matrix (I, O) or a convolution kernel HWIO. Its last axis is the output units: adaptive gradient
  clipping takes the norm of each unit over all other axes. Devices divide the kernel along the axis before, the input
  channels. It is cast to the type of the computation once per step.
- `X.gain` together with `X.kernel` means that the kernel is standardized, once per step and outside of the network: X
  is a `layers.WSConv`, which then uses the kernel as it is. A gain without a kernel (BatchNorm) has no meaning.
- `X.bias` together with `X.kernel` is cast with it.
- `head` is the last layer: the last axis of its parameters is the classes, in the order of the labels.
- All other parameters have no special meaning: a vector is one unit for clipping, and is whole on every device. The
  groups of `OptimConfig` are chosen by name, too: by default `*.bias` and `*gain` are not decayed.
"""

from collections.abc import Container
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nfnet_flax.config import ConfigError, require
from nfnet_flax.models.classifier import Classifier
from nfnet_flax.models.layers import WSConv

Params = dict[str, jax.Array]
BatchStats = dict[str, jax.Array]
"""Running statistics of BatchNorm; empty for the normalizer-free networks."""
GraphDef = Any
"""Structure of a network without its arrays; hashable, so that it can be a static argument."""


def split(model: nnx.Module) -> tuple[GraphDef, Params, BatchStats]:
    """Structure, named parameters and named running statistics of a network."""
    graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)  # type: ignore[misc]
    return graphdef, _flat(params), _flat(batch_stats)


def batch_stats_of(model: nnx.Module) -> BatchStats:
    """Running statistics as the last call left them."""
    return _flat(nnx.state(model, nnx.BatchStat))


def merge(graphdef: GraphDef, params: Params, batch_stats: BatchStats) -> Any:
    """The network with a given structure and arrays; the inverse of `split`. It is too slow to be called in every step:
    call it while tracing."""
    return nnx.merge(graphdef, _nested(params | batch_stats))


def update(model: nnx.Module, arrays: dict[str, Any]) -> None:
    """Replaces named parameters and statistics of a network in place."""
    nnx.update(model, _nested(arrays))


def is_standardized(name: str, names: Container[str]) -> bool:
    """Whether a parameter is a standardized kernel, that is, whether `names` (of all parameters) has a gain for it."""
    return name in names and name.endswith(".kernel") and gain_of(name) in names  # BatchNorm has a gain alone


def gain_of(kernel_name: str) -> str:
    """Name of the gain of a standardized kernel."""
    return f"{kernel_name.removesuffix('.kernel')}.gain"


def cast(params: Params, compute_dtype: jnp.dtype) -> Params:
    """Casts kernels and their biases to the type that a network computes in; other parameters are unchanged."""
    return {
        name: value.astype(compute_dtype)
        if name.endswith(".kernel") or (name.endswith(".bias") and f"{name.removesuffix('bias')}kernel" in params)
        else value
        for name, value in params.items()
    }


def mark_prepared(model: nnx.Module) -> None:
    """Marks a network's convolutions, so that they take their kernels for standardized."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, WSConv):
            module.is_prepared = True


def check_names(model: Classifier) -> None:
    """Checks that the arrays of a network follow the rules for names (see the docstring of this file).

    Raises:
      ConfigError: an array does not follow them; the message names it.
    """
    of = f"of {type(model).__name__}"
    shapes = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        name = ".".join(map(str, path))
        if any(isinstance(part, str) and (not part or "." in part or part.isdigit()) for part in path):
            raise ConfigError(f"{name} {of}: a part of a name must be an attribute, or the position in an nnx.List")
        if not isinstance(variable, nnx.Param | nnx.BatchStat):
            raise ConfigError(
                f"{name} {of} is an nnx.{type(variable).__name__}: a network holds nnx.Param and nnx.BatchStat alone; "
                "draw what is random from the keys that a call is given (nfnet_flax.models.layers.dropout)"
            )
        value = variable.get_value()
        if isinstance(variable, nnx.Param):
            shapes[name] = value.shape
            require(value.dtype == jnp.float32, f"{name} {of}", str(value.dtype), "parameters must be float32")
    for name, shape in shapes.items():
        if name.endswith(".kernel"):
            remedy = "a kernel is (I, O) or HWIO; give another parameter another name"
            require(len(shape) in (2, 4), f"{name} {of}", shape, remedy)
        if name.startswith("head."):
            remedy = f"the last axis of the head's parameters must be the {model.num_classes} classes"
            require(shape[-1:] == (model.num_classes,), f"{name} {of}", shape, remedy)
    for path, module in nnx.iter_modules(model):
        name = ".".join(map(str, (*path, "kernel")))
        if is_standardized(name, shapes) != isinstance(module, WSConv):
            raise ConfigError(
                f"{name} of {type(module).__name__}: a kernel is standardized if its module has a gain; so a WSConv "
                "needs a gain, and any other module must give its kernel or its gain another name"
            )


def _flat(state: Any) -> dict[str, jax.Array]:
    return {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def _nested(arrays: dict[str, Any]) -> dict[Any, Any]:
    nested: dict[Any, Any] = {}
    for name, value in arrays.items():
        *parents, leaf = (int(part) if part.isdigit() else part for part in name.split("."))
        node = nested
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = value
    return nested
