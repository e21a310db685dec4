"""Standardizes all kernels of a network at once, outside of it, and takes the gradient back through this."""

from collections.abc import Callable, Collection, Container, Mapping
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from nfnet_flax.models import standardization
from nfnet_flax.models.params import Params, gain_of, is_standardized
from nfnet_flax.models.standardization import GradientFactors, KernelStatistics, StandardizationName


class Division(Protocol):
    """Which input channels of each kernel are here, and what is known of whole kernels nevertheless."""

    def num_shares(self, name: str) -> int:
        """Number of equal shares of a kernel, of which one is here."""

    def rough_means(self, kernels: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """By name, a number near the mean of each output channel of whole HWIO kernels: (O,)."""

    def sums(
        self, function: Callable[..., tuple[jax.Array, ...]], arrays: Mapping[str, tuple[jax.Array, ...]]
    ) -> dict[str, tuple[jax.Array, ...]]:
        """Sums over whole kernels of what `function(name, *arrays)` gives for parts of them.

        Args:
          function: gives sums over the input channels of the arrays that it is given, for each output channel.
          arrays: by name of the kernel; the first has the input channels that are here as its last but one axis. So
            have the others, or they are vectors with a number for each output channel.
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
    """L2 norm of each output channel of every kernel: (O,)."""


@jax.named_scope("standardize")
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
        return standardization.kernel_sums(kernel, *rough) if rough else (unit_squares(kernel),)

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
        prepared[name] = standardization.apply(params[name], params[gain_of(name)], statistics)
    return prepared, facts


UnitNorms = dict[str, tuple[jax.Array, jax.Array] | None]
"""Name of a parameter -> norms of its gradient and of itself, of each output channel of a whole kernel: (O,); None for
all that is not a kernel."""


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


@jax.named_scope("standardize_gradient")
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
            return (unit_squares(dy),)
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
            (sums[0], sums[1], sums[2]), params[gain_of(name)], facts.statistics[name], size, form
        )
        result.factors[name] = factors
        result.gains[gain_of(name)] = factors.gain
        result.norms[name] = (factors.norm, own_norms[name])
    return result


@jax.named_scope("standardize_gradient")
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


def unit_squares(kernel: jax.Array) -> jax.Array:
    """Sum of squares over each output channel of a kernel (I, O) or HWIO: (O,)."""
    return jnp.sum(jnp.square(kernel), axis=tuple(range(kernel.ndim - 1)))
