"""Adaptive gradient clipping (Brock et al. 2021, arXiv 2102.06171, section 3 and equation 3)."""

import math
from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nfnet_flax.config import require
from nfnet_flax.optim.norms import sum_of_all, whole_norms


class AdaptiveGradClipState(NamedTuple):
    """A measurement of the last update; it does not influence the next one."""

    clipped_fraction: jax.Array
    """Share of units whose gradient was scaled down."""
    unit_ratios: Any = None
    """With `keeps_ratios`, a tree like the parameters: the ratio of gradient to parameter norm of each unit, (units,),
    or None for an exempt parameter; see `agc_statistics`. Otherwise None."""
    clipping: jax.Array | None = None
    """With `keeps_ratios`, lambda. Otherwise None."""


def unitwise_norm(x: jax.Array) -> jax.Array:
    """L2 norm of each unit, in a shape that broadcasts against `x`.

    Scalars and vectors are one unit; (I, O) and (H, I, O) kernels have a unit for each index of the later axes, with
    the norm over axis 0; HWIO kernels have one for each output channel.

    Raises:
      ValueError: `x` has more than 4 axes.
    """
    if x.ndim > 4:
        raise ValueError(f"adaptive_grad_clip: a parameter of shape {x.shape} has more than 4 axes; mask it out")
    axes: dict[int, tuple[int, ...]] = {0: (), 1: (0,), 2: (0,), 3: (0,), 4: (0, 1, 2)}
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=axes[x.ndim], keepdims=True))


def clip_units(
    gradient: jax.Array, norm: jax.Array, weight_norm: jax.Array, *, clipping: float, eps: float
) -> tuple[jax.Array, jax.Array]:
    """Clips one parameter's gradient; also returns which units were scaled down (arXiv 2102.06171, equation 3).

    Args:
      gradient: gradient of the parameter.
      norm: norm of each unit of the gradient, in a shape that broadcasts against it.
      weight_norm: norm of each unit of the parameter.
      clipping: lambda, the largest allowed ratio of `norm` to `weight_norm`.
      eps: lower bound of `weight_norm`.
    """
    limit = clipping * jnp.maximum(weight_norm, eps)
    too_large = norm > limit
    # If the gradient is too large, its norm is positive; the maximum only keeps the unused branch finite.
    factor = jnp.where(too_large, limit / jnp.maximum(norm, 1e-6 * eps), 1.0)
    return gradient * factor, too_large


_Norms = tuple[jax.Array, jax.Array]


def _with_norms(
    gradients: list[jax.Array], weights: list[jax.Array], flags: list[bool], known: list[_Norms | None]
) -> list[_Norms | None]:
    """Norms of the units of each gradient and parameter that is clipped, None for the others."""
    unknown = [index for index, flag in enumerate(flags) if flag and known[index] is None]
    single = [index for index in unknown if gradients[index].ndim <= 1]  # these are one unit each
    found: dict[int, _Norms] = {
        index: (unitwise_norm(gradients[index]), unitwise_norm(weights[index]))
        for index in unknown
        if gradients[index].ndim > 1
    }
    pairs = zip(*(whole_norms([arrays[index] for index in single]) for arrays in (gradients, weights)), strict=True)
    found |= dict(zip(single, pairs, strict=True))
    return [found.get(index, known[index]) if flag else None for index, flag in enumerate(flags)]


def num_units(shape: tuple[int, ...]) -> int:
    """Number of units of a parameter of this shape, each with a norm of its own; see `unitwise_norm`."""
    return 1 if len(shape) <= 1 else math.prod(shape[1:]) if len(shape) < 4 else shape[-1]


def ratios_of(norm: jax.Array, weight_norm: jax.Array, *, eps: float) -> jax.Array:
    """The ratio that clipping limits, norm of the gradient to norm of the parameters, of each unit: (units,)."""
    return jnp.ravel(norm / jnp.maximum(weight_norm, eps)).astype(jnp.float32)


def unit_ratios(
    gradient: Mapping[str, jax.Array],
    params: Mapping[str, jax.Array],
    unit_norms: Mapping[str, tuple[jax.Array, jax.Array] | None],
    clipped: Container[str],
    *,
    eps: float,
) -> dict[str, jax.Array]:
    """The ratios of those parameters that are clipped, by name; arguments as for `adaptive_grad_clip`."""
    names = [name for name in gradient if name in clipped]
    known = [unit_norms.get(name) for name in names]
    norms_of = _with_norms(
        [gradient[name] for name in names], [params[name] for name in names], [True] * len(names), known
    )
    return {name: ratios_of(*norms, eps=eps) for name, norms in zip(names, norms_of, strict=True) if norms is not None}


def adaptive_grad_clip(
    clipping: float,
    *,
    eps: float = 1e-3,
    mask: Any | Callable[[Any], Any] | None = None,
    keeps_ratios: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Scales each unit's gradient down to at most `clipping` times the norm of its parameters.

    Args:
      clipping: lambda, the largest allowed ratio of gradient norm to parameter norm.
      eps: lower bound of the parameter norm, without which units that start at zero would never change.
      mask: tree of booleans, or a function that makes one from the parameters; False exempts a parameter. The published
        recipe exempts the kernel of the final dense layer. None: all parameters are clipped.
      keeps_ratios: whether the state holds the ratio of gradient to parameter norm of each unit, a float32 each, for
        `agc_statistics`.

    Returns:
      A transformation to put first in an `optax.chain`; its update needs the parameters. It also takes `unit_norms`, a
      tree like the parameters: a pair of arrays in it is the norms of the gradient's and the parameter's units, if the
      caller already knows them. Where it has None, or if it is not given, they are computed.

    Raises:
      ConfigError: `clipping` or `eps` is not positive.
    """
    require(clipping > 0, "adaptive_grad_clip: clipping", clipping, "must be positive")
    require(eps > 0, "adaptive_grad_clip: eps", eps, "must be positive")

    def state_of(fraction: jax.Array, ratios: Any) -> AdaptiveGradClipState:
        limit = jnp.asarray(clipping, jnp.float32) if keeps_ratios else None
        return AdaptiveGradClipState(fraction, ratios if keeps_ratios else None, limit)

    def flags_of(tree: Any, params: optax.Params) -> list[bool]:
        chosen = mask(params) if callable(mask) else mask
        return [True] * tree.num_leaves if chosen is None else tree.flatten_up_to(chosen)

    def init(params: optax.Params) -> AdaptiveGradClipState:
        tree: Any = jax.tree.structure(params)
        ratios = [
            jnp.zeros(num_units(leaf.shape), jnp.float32) if flag else None
            for leaf, flag in zip(jax.tree.leaves(params), flags_of(tree, params), strict=True)
        ]
        return state_of(jnp.zeros((), jnp.float32), tree.unflatten(ratios))

    @jax.named_scope("agc")
    def update(
        updates: optax.Updates,
        state: AdaptiveGradClipState,
        params: optax.Params | None = None,
        *,
        unit_norms: Any | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AdaptiveGradClipState]:
        del state, extra_args  # the latter are for other transformations of a chain
        if params is None:
            raise ValueError("adaptive_grad_clip compares gradients with parameters: call update(..., params=params)")
        tree: Any = jax.tree.structure(updates)
        gradients = jax.tree.leaves(updates)
        flags = flags_of(tree, params)
        known = [None] * len(gradients) if unit_norms is None else tree.flatten_up_to(unit_norms)
        norms_of = _with_norms(gradients, tree.flatten_up_to(params), flags, known)
        clipped, are_too_large = list(gradients), []
        ratios = [norms and ratios_of(*norms, eps=eps) for norms in norms_of]
        for index, norms in enumerate(norms_of):
            if norms is not None:
                clipped[index], too_large = clip_units(gradients[index], *norms, clipping=clipping, eps=eps)
                are_too_large.append(too_large)
        count = sum(too_large.size for too_large in are_too_large)
        return tree.unflatten(clipped), state_of(sum_of_all(are_too_large) / max(count, 1), tree.unflatten(ratios))

    return optax.GradientTransformationExtraArgs(init, update)
