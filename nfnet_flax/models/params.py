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

from collections.abc import Callable, Collection, Container, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from nfnet_flax.config import ConfigError, require
from nfnet_flax.models import standardization
from nfnet_flax.models.classifier import Classifier
from nfnet_flax.models.layers import WSConv
from nfnet_flax.models.standardization import GradientFactors, KernelStatistics, StandardizationName

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


class Division(Protocol):
    """Which input channels of each kernel are here, and what is known of whole kernels nevertheless."""

    def num_shares(self, name: str) -> int:
        """Number of equal shares of a kernel, of which one is here."""

    def rough_means(self, kernels: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """By name, a number near the mean of each output channel of whole HWIO kernels: (1, 1, 1, O)."""

    def sums(
        self, function: Callable[..., tuple[jax.Array, ...]], arrays: Mapping[str, tuple[jax.Array, ...]]
    ) -> dict[str, tuple[jax.Array, ...]]:
        """Sums over whole kernels of what `function(name, *arrays)` gives for parts of them.

        Args:
          function: gives sums over the input channels of the arrays that it is given, for each output channel.
          arrays: by name of the kernel; the first has the input channels that are here as its last but one axis. So
            have the others, or they belong to whole output channels, with 1 in place of this axis.
        """


class Undivided:
    """Whole kernels are here."""

    def num_shares(self, name: str) -> int:
        del name
        return 1

    def rough_means(self, kernels: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return {name: standardization.rough_mean(kernel) for name, kernel in kernels.items()}

    def sums(
        self, function: Callable[..., tuple[jax.Array, ...]], arrays: Mapping[str, tuple[jax.Array, ...]]
    ) -> dict[str, tuple[jax.Array, ...]]:
        return {name: function(name, *given) for name, given in arrays.items()}


UNDIVIDED = Undivided()


class KernelFacts(NamedTuple):
    """What is found out about whole kernels on the way to a prepared network, and needed on the way back."""

    statistics: dict[str, KernelStatistics]
    """Statistics of each kernel that was standardized."""
    norms: dict[str, jax.Array]
    """L2 norm of each output channel of every kernel, with the reduced axes kept."""


def prepare(params: Params, form: StandardizationName, division: Division = UNDIVIDED) -> tuple[Params, KernelFacts]:
    """Parameters with standardized kernels: once for many calls of a network that is marked as prepared.

    Args:
      params: parameters of a network; of kernels, the input channels that are here.
      form: of the weight standardization.
      division: says which those are.

    Returns:
      The parameters with standardized kernels, and the facts about the kernels that `pull_back` needs.
    """
    kernels = {name: kernel for name, kernel in params.items() if name.endswith(".kernel")}
    rough = division.rough_means({name: kernel for name, kernel in kernels.items() if is_standardized(name, params)})

    def sums_of(name: str, kernel: jax.Array, *rough: jax.Array) -> tuple[jax.Array, ...]:
        # Here, beside the cast to the type of the computation, the norm costs no pass over the kernel of its own.
        return standardization.kernel_sums(kernel, *rough) if rough else (_unit_squares(kernel),)

    given = {name: (kernel, rough[name]) if name in rough else (kernel,) for name, kernel in kernels.items()}
    prepared = dict(params)
    facts = KernelFacts({}, {})
    for name, sums in division.sums(sums_of, given).items():
        if name not in rough:
            facts.norms[name] = jnp.sqrt(sums[0])
            continue
        size = standardization.fan_in(kernels[name]) * division.num_shares(name)
        statistics = standardization.statistics_of((sums[0], sums[1]), rough[name], size, form)
        facts.statistics[name] = statistics
        facts.norms[name] = jnp.sqrt(standardization.squared_norm(statistics, size))
        prepared[name] = standardization.apply(params[name], params[_gain_of(name)], statistics)
    return prepared, facts


UnitNorms = dict[str, tuple[jax.Array, jax.Array] | None]
"""Name of a parameter -> norms of its gradient and of itself, of each output channel of a whole kernel (with the
reduced axes kept); None for all that is not a kernel."""


def differentiated(trained: Collection[str], names: Container[str]) -> frozenset[str]:
    """Names of the prepared parameters whose gradients `pull_back` needs to compute those of the `trained` parameters.

    The gradient of a gain is computed from that of its standardized kernel, even if the kernel is not trained.

    Args:
      trained: names of the parameters whose gradient is wanted.
      names: names of all parameters of the network.
    """
    kernels = (f"{name.removesuffix('.gain')}.kernel" for name in trained if name.endswith(".gain"))
    return frozenset(trained) | {name for name in kernels if is_standardized(name, names)}


class UnitGradients(NamedTuple):
    """What is found out about the gradient of each output channel of the kernels, before the gradient itself is
    known."""

    factors: dict[str, GradientFactors]
    """Name of each standardized kernel -> what its gradient is computed with."""
    gains: Params
    """Gradients of the gains of standardized kernels, by their own names."""
    norms: UnitNorms


def unit_gradients(
    gradient: Params,
    params: Params,
    facts: KernelFacts,
    form: StandardizationName,
    division: Division = UNDIVIDED,
    norms_of_params: Mapping[str, jax.Array] | None = None,
) -> UnitGradients:
    """The sums over each output channel that `pull_back` and gradient clipping need, in one pass over the kernels.

    Args:
      gradient: with respect to all prepared parameters, or to those that `differentiated` names; of kernels, the input
        channels that are here.
      params: all parameters of the network, likewise.
      facts: result of `prepare`.
      form: form of the weight standardization.
      division: says which input channels are here.
      norms_of_params: norm of each output channel, to be returned beside those of the gradient; None: those of `facts`.
    """

    def sums_of(
        name: str, dy: jax.Array, kernel: jax.Array | None = None, *statistics: jax.Array
    ) -> tuple[jax.Array, ...]:
        if kernel is None:
            return (_unit_squares(dy),)
        return standardization.gradient_sums(dy, kernel, KernelStatistics(*statistics))

    given = {
        name: (gradient[name], params[name], *facts.statistics[name]) if name in facts.statistics else (gradient[name],)
        for name in facts.norms
        if name in gradient
    }
    own_norms = facts.norms if norms_of_params is None else norms_of_params
    result = UnitGradients({}, {}, dict.fromkeys(gradient))
    for name, sums in division.sums(sums_of, given).items():
        if name not in facts.statistics:
            result.norms[name] = (jnp.sqrt(sums[0]), own_norms[name])
            continue
        size = standardization.fan_in(params[name]) * division.num_shares(name)
        factors = standardization.gradient_factors(
            (sums[0], sums[1], sums[2]), params[_gain_of(name)], facts.statistics[name], size, form
        )
        result.factors[name] = factors
        result.gains[_gain_of(name)] = factors.gain
        result.norms[name] = (factors.norm, own_norms[name])
    return result


def pull_back(
    gradient: Params, params: Params, facts: KernelFacts, units: UnitGradients, frozen: Container[str] = ()
) -> Params:
    """Computes the gradient with respect to the parameters from that with respect to the prepared parameters.

    Args:
      gradient: as `unit_gradients` was given it.
      params: likewise.
      facts: result of `prepare`.
      units: result of `unit_gradients`.
      frozen: names of parameters to leave out.
    """
    kernels = {
        name: standardization.kernel_gradient(gradient[name], params[name], facts.statistics[name], factors)
        for name, factors in units.factors.items()
    }
    result = gradient | kernels | units.gains
    return {name: value for name, value in result.items() if name not in frozen}


def _unit_squares(kernel: jax.Array) -> jax.Array:
    """Sum of squares over each output channel of a kernel (I, O) or HWIO, with the reduced axes kept."""
    return jnp.sum(jnp.square(kernel), axis=tuple(range(kernel.ndim - 1)), keepdims=True)


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
