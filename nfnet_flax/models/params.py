"""A network as a pure function of a flat `{"stages.0.1.conv0.kernel": array}` dict.

The training state, parameter groups, converters and checkpoints all speak these names. A name is the path of attributes
and positions in lists that leads from the network to an `nnx.Param`, or to an `nnx.BatchStat` for running statistics.
What the step, the optimizer and the shardings take from it, and every family has to keep to (`check_names`):

- There are no other variables. In particular, layers hold no random state: what is drawn at random is drawn from the
  keys of the examples that a call is given (`layers.dropout`, `layers.drop_path`).
- Parameters are float32, whatever the network computes in.
- `X.kernel` is a matrix (I, O) or a window HWIO. Its last axis are the output units: adaptive gradient clipping takes
  the norm of each over all other axes, and `fsdp` divides it. It is cast to the type of the computation once per step.
- `X.gain` beside `X.kernel` says that the kernel is standardized, once per step and outside of the network: X is a
  `layers.WSConv`, which then takes the kernel as it is. A gain by itself (BatchNorm) says nothing.
- `X.bias` beside `X.kernel` is cast with it.
- `head` holds the last layer: the last axis of its parameters are the classes, in the order of the labels.
- Anything else is a parameter like any other: a vector is one unit for clipping, and stays whole under `fsdp`. The
  groups of `OptimConfig` go by name, too: by default `*.bias` and `*gain` are not decayed.
"""

from collections.abc import Collection, Container
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from nfnet_flax.config import ConfigError, require
from nfnet_flax.models import standardization
from nfnet_flax.models.classifier import Classifier
from nfnet_flax.models.layers import WSConv
from nfnet_flax.models.standardization import KernelStatistics, StandardizationName

Params = dict[str, jax.Array]
BatchStats = dict[str, jax.Array]
"""Running statistics of BatchNorm; empty for the normalizer-free networks."""
GraphDef = Any
"""Structure of a network without its arrays; static and hashable."""


def split(model: nnx.Module) -> tuple[GraphDef, Params, BatchStats]:
    """Structure, named parameters and named running statistics of a network."""
    graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)  # type: ignore[misc]
    return graphdef, _flat(params), _flat(batch_stats)


def batch_stats_of(model: nnx.Module) -> BatchStats:
    """Running statistics as the last call left them."""
    return _flat(nnx.state(model, nnx.BatchStat))


def merge(graphdef: GraphDef, params: Params, batch_stats: BatchStats) -> Any:
    """The network of a structure with these arrays; the inverse of `split`. Cheap, but not for every step: call it
    while tracing."""
    return nnx.merge(graphdef, _nested(params | batch_stats))


def update(model: nnx.Module, arrays: dict[str, Any]) -> None:
    """Replaces named parameters and statistics of a network in place."""
    nnx.update(model, _nested(arrays))


class KernelFacts(NamedTuple):
    """What is found out about kernels on the way to a prepared network, and needed on the way back."""

    statistics: dict[str, KernelStatistics]
    """Of each kernel that was standardized."""
    norms: dict[str, jax.Array]
    """Of each output channel of every kernel, with the reduced axes kept."""


def prepare(params: Params, form: StandardizationName) -> tuple[Params, KernelFacts]:
    """Parameters with standardized kernels: once for many calls of a network that is marked as prepared.

    Args:
      params: of a network.
      form: of the weight standardization.

    Returns:
      The parameters, and what `pull_back` needs to know of the kernels.
    """
    prepared = dict(params)
    facts = KernelFacts({}, {})
    for name, kernel in params.items():
        if not name.endswith(".kernel"):
            continue
        if is_standardized(name, params):
            statistics = facts.statistics[name] = standardization.kernel_statistics(kernel)
            prepared[name] = standardization.apply(kernel, params[_gain_of(name)], statistics, form)
            facts.norms[name] = jnp.sqrt(standardization.squared_norm(kernel, statistics))
        else:
            # Here, beside the cast to the type of the computation, it costs no pass over the kernel of its own.
            facts.norms[name] = _unit_norms(kernel)
    return prepared, facts


UnitNorms = dict[str, tuple[jax.Array, jax.Array] | None]
"""Name of a parameter -> norms of its gradient and of itself, of each output channel of a kernel (with the reduced axes
kept); None for all that is not a kernel."""


def differentiated(trained: Collection[str], names: Container[str]) -> frozenset[str]:
    """Names of the prepared parameters whose gradient `pull_back` needs for that of the `trained` ones.

    A gain's gradient comes out of that of its standardized kernel, be the kernel trained or not.

    Args:
      trained: names whose gradient is wanted.
      names: of all parameters of the network.
    """
    kernels = (f"{name.removesuffix('.gain')}.kernel" for name in trained if name.endswith(".gain"))
    return frozenset(trained) | {name for name in kernels if is_standardized(name, names)}


def pull_back(
    gradient: Params,
    params: Params,
    facts: KernelFacts,
    form: StandardizationName,
    frozen: Container[str] = (),
) -> tuple[Params, UnitNorms]:
    """Takes a gradient with respect to prepared parameters back through `prepare`.

    Args:
      gradient: of all prepared parameters, or of those that `differentiated` names.
      params: of the network, all of them.
      facts: of `prepare`.
      form: of the weight standardization.
      frozen: names of parameters to leave out.

    Returns:
      The gradient with respect to `params`, and the kernels' norms: where a kernel was standardized they come out of
      the same sums, without a pass over it of their own.
    """
    result = dict(gradient)
    norms: UnitNorms = dict.fromkeys(gradient)
    for name, norm in facts.norms.items():
        if name not in gradient:
            continue
        if name in facts.statistics:
            kernel, gain, statistics = params[name], params[_gain_of(name)], facts.statistics[name]
            sums = standardization.gradient_sums(gradient[name], kernel, statistics)
            back = standardization.kernel_gradient(gradient[name], kernel, gain, statistics, sums, form)
            result[name], result[_gain_of(name)] = back.kernel, back.gain
            norms[name] = (jnp.sqrt(back.squared_norm), norm)
        else:
            norms[name] = (_unit_norms(gradient[name]), norm)
    trained = [name for name in result if name not in frozen]
    return {name: result[name] for name in trained}, {name: norms.get(name) for name in trained}


def _unit_norms(kernel: jax.Array) -> jax.Array:
    # (I, O) or HWIO.
    fan_in = tuple(range(kernel.ndim - 1))
    return jnp.sqrt(jnp.sum(jnp.square(kernel), axis=fan_in, keepdims=True))


def global_norm(gradient: Params, norms: UnitNorms) -> jax.Array:
    """L2 norm over all of a gradient, from the kernels' norms."""
    parts = [value if (known := norms[name]) is None else known[0] for name, value in gradient.items()]
    return jnp.sqrt(sum(jnp.sum(jnp.square(part)) for part in parts))


def is_standardized(name: str, names: Container[str]) -> bool:
    """Whether an array is a kernel that is standardized: one with a gain beside it, of all the names of a network."""
    return name in names and name.endswith(".kernel") and _gain_of(name) in names  # BatchNorm has a gain alone


def _gain_of(kernel_name: str) -> str:
    return f"{kernel_name.removesuffix('.kernel')}.gain"


def cast(params: Params, compute_dtype: jnp.dtype) -> Params:
    """All kernels and their biases in the type that a network computes in; everything else as it is."""
    return {
        name: value.astype(compute_dtype)
        if name.endswith(".kernel") or (name.endswith(".bias") and f"{name.removesuffix('bias')}kernel" in params)
        else value
        for name, value in params.items()
    }


def mark_prepared(model: nnx.Module) -> None:
    """Tells a network's convolutions that their kernels are standardized already."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, WSConv):
            module.is_prepared = True


def check_names(model: Classifier) -> None:
    """Checks that the arrays of a network are what their names say (see above), before anything relies on it.

    Raises:
      ConfigError: one is not; the message names it.
    """
    of = f"of {type(model).__name__}"
    shapes = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        name = ".".join(map(str, path))
        if any(isinstance(part, str) and (not part or "." in part or part.isdigit()) for part in path):
            raise ConfigError(f"{name} {of}: a part of a name is an attribute, or the position in an nnx.List")
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
                f"{name} of {type(module).__name__}: a kernel is standardized if a gain lies beside it; so a WSConv "
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
