"""A network as a pure function of a flat `{"stages.0.1.conv0.kernel": array}` dict.

The training state, parameter groups, converters and checkpoints all speak these names.
"""

from collections.abc import Collection, Container
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from nfnet_flax.config import ConfigError
from nfnet_flax.models import standardization
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
    """Tells a network's convolutions that their kernels are standardized already.

    Raises:
      ConfigError: `prepare` would standardize the kernel of a module that does not standardize it itself, or the other
        way round.
    """
    _, params, _ = split(model)
    for path, module in nnx.iter_modules(model):
        name = ".".join(map(str, (*path, "kernel")))
        if is_standardized(name, params) != isinstance(module, WSConv):
            raise ConfigError(
                f"{name} of {type(module).__name__}: a kernel is standardized if a gain lies beside it; so a WSConv "
                "needs a gain, and any other module must give its kernel or its gain another name"
            )
        if isinstance(module, WSConv):
            module.is_prepared = True


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
