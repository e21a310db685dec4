"""A network as a pure function of a flat `{"stages.0.1.conv0.kernel": array}` dict.

The training state, parameter groups, converters and checkpoints all use these names. A name is the path of attributes
and positions in lists that leads from the network to an `nnx.Param`, or to an `nnx.BatchStat` for running statistics.
The step, the optimizer and the shardings rely on the names, so every family has to follow these rules (`check_names`):

- There are no other variables. In particular, layers have no random state: random numbers are drawn from the keys of
  the examples, which a call is given (`layers.dropout`, `layers.drop_path`).
- Parameters are float32, whatever type the network computes in.
- `X.kernel` is a matrix (I, O) or a convolution kernel HWIO. Its last axis is the output units: adaptive gradient
  clipping takes the norm of each unit over all other axes, and `fsdp` divides the kernel along this axis. The kernel is
  cast to the type of the computation once per step.
- `X.gain` together with `X.kernel` means that the kernel is standardized, once per step and outside of the network: X
  is a `layers.WSConv`, which then uses the kernel as it is. A gain without a kernel (BatchNorm) has no meaning.
- `X.bias` together with `X.kernel` is cast with it.
- `head` is the last layer: the last axis of its parameters is the classes, in the order of the labels.
- All other parameters have no special meaning: a vector is one unit for clipping, and is not divided by `fsdp`. The
  groups of `OptimConfig` are chosen by name, too: by default `*.bias` and `*gain` are not decayed.
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


class KernelFacts(NamedTuple):
    """Facts about kernels that `prepare` computes and `pull_back` needs."""

    statistics: dict[str, KernelStatistics]
    """Statistics of each kernel that was standardized."""
    norms: dict[str, jax.Array]
    """L2 norm of each output channel of every kernel, with the reduced axes kept."""


def prepare(params: Params, form: StandardizationName) -> tuple[Params, KernelFacts]:
    """Standardizes the kernels, once for many calls of a network that is marked as prepared.

    Args:
      params: parameters of a network.
      form: form of the weight standardization.

    Returns:
      The parameters with standardized kernels, and the facts about the kernels that `pull_back` needs.
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
            # Computed here, together with the cast to the compute type, it needs no separate pass over the kernel.
            facts.norms[name] = _unit_norms(kernel)
    return prepared, facts


UnitNorms = dict[str, tuple[jax.Array, jax.Array] | None]
"""Name of a parameter -> for a kernel, the norms of each output channel of its gradient and of itself, with the reduced
axes kept; None for all other parameters."""


def differentiated(trained: Collection[str], names: Container[str]) -> frozenset[str]:
    """Names of the prepared parameters whose gradients `pull_back` needs to compute those of the `trained` parameters.

    The gradient of a gain is computed from that of its standardized kernel, even if the kernel is not trained.

    Args:
      trained: names of the parameters whose gradient is wanted.
      names: names of all parameters of the network.
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
    """Computes the gradient with respect to the parameters from that with respect to the prepared parameters.

    Args:
      gradient: gradient of all prepared parameters, or of those that `differentiated` names.
      params: all parameters of the network.
      facts: result of `prepare`.
      form: form of the weight standardization.
      frozen: names of parameters to leave out.

    Returns:
      The gradient with respect to `params`, and the norms of the kernels. For a standardized kernel the norms follow
      from the same sums as the gradient, without a separate pass over the kernel.
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
    # A kernel is (I, O) or HWIO.
    fan_in = tuple(range(kernel.ndim - 1))
    return jnp.sqrt(jnp.sum(jnp.square(kernel), axis=fan_in, keepdims=True))


def global_norm(gradient: Params, norms: UnitNorms) -> jax.Array:
    """L2 norm of the whole gradient, for which the known norms of the kernels are used."""
    parts = [value if (known := norms[name]) is None else known[0] for name, value in gradient.items()]
    return jnp.sqrt(sum(jnp.sum(jnp.square(part)) for part in parts))


def is_standardized(name: str, names: Container[str]) -> bool:
    """Whether a parameter is a standardized kernel, that is, whether `names` (of all parameters) has a gain for it."""
    return name in names and name.endswith(".kernel") and _gain_of(name) in names  # BatchNorm has a gain alone


def _gain_of(kernel_name: str) -> str:
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
