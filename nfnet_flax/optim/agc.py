"""Adaptive gradient clipping (Brock et al. 2021, arXiv 2102.06171, section 3 and equation 3)."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class AdaptiveGradClipState(NamedTuple):
    """What the last update saw; it does not influence the next one."""

    clipped_fraction: jax.Array
    """Share of units whose gradient was scaled down."""


def unitwise_norm(x: jax.Array) -> jax.Array:
    """L2 norm of each unit, shaped to broadcast against `x`.

    Scalars and vectors are one unit; (I, O) and (H, I, O) kernels have a unit per index of the later axes, with the
    norm over axis 0; HWIO kernels have one per output channel.

    Raises:
      ValueError: `x` has more than 4 axes.
    """
    if x.ndim > 4:
        raise ValueError(f"adaptive_grad_clip: a parameter of shape {x.shape} has more than 4 axes; mask it out")
    axes: dict[int, tuple[int, ...]] = {0: (), 1: (0,), 2: (0,), 3: (0,), 4: (0, 1, 2)}
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=axes[x.ndim], keepdims=True))


def clip_units(gradient: jax.Array, weight: jax.Array, *, clipping: float, eps: float) -> tuple[jax.Array, jax.Array]:
    """Clips one parameter's gradient; also returns which units were scaled down (arXiv 2102.06171, equation 3)."""
    norm = unitwise_norm(gradient)
    limit = clipping * jnp.maximum(unitwise_norm(weight), eps)
    too_large = norm > limit
    # Where the gradient is too large its norm is positive; the maximum only keeps the unused branch finite.
    factor = jnp.where(too_large, limit / jnp.maximum(norm, 1e-6 * eps), 1.0)
    return gradient * factor, too_large


def adaptive_grad_clip(
    clipping: float, *, eps: float = 1e-3, mask: Any | Callable[[Any], Any] | None = None, is_stacked: Any | None = None
) -> optax.GradientTransformation:
    """Scales each unit's gradient down to at most `clipping` times the norm of its parameters.

    Args:
      clipping: lambda, the largest allowed ratio of gradient norm to parameter norm.
      eps: lower bound of the parameter norm, which lets units that start at zero move.
      mask: tree of booleans (or a function from the parameters to one); False exempts a parameter. The published recipe
        exempts the kernel of the final dense layer. None clips all.
      is_stacked: tree of booleans; True for an array that stacks parameters along a leading axis. Its mask may then be
        an array of one boolean for each. None: nothing is stacked.

    Returns:
      A transformation to put first in an `optax.chain`; its update needs the parameters.
    """
    clip = functools.partial(clip_units, clipping=clipping, eps=eps)

    def init(params: optax.Params) -> AdaptiveGradClipState:
        del params
        return AdaptiveGradClipState(jnp.zeros((), jnp.float32))

    def update(
        updates: optax.Updates, state: AdaptiveGradClipState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AdaptiveGradClipState]:
        del state
        if params is None:
            raise ValueError("adaptive_grad_clip compares gradients with parameters: call update(..., params=params)")
        tree: Any = jax.tree.structure(updates)
        gradients = jax.tree.leaves(updates)
        chosen = mask(params) if callable(mask) else mask
        flags = [True] * len(gradients) if chosen is None else tree.flatten_up_to(chosen)
        stacked = [False] * len(gradients) if is_stacked is None else tree.flatten_up_to(is_stacked)
        clipped, units_clipped, num_units = [], jnp.zeros((), jnp.float32), 0.0
        for gradient, weight, flag, over_stack in zip(
            gradients, tree.flatten_up_to(params), flags, stacked, strict=True
        ):
            if not np.any(flag):
                clipped.append(gradient)
                continue
            scaled, too_large = (jax.vmap(clip) if over_stack else clip)(gradient, weight)
            if not np.all(flag):
                selected = np.reshape(flag, (-1,) + (1,) * (gradient.ndim - 1))
                scaled = jnp.where(selected, scaled, gradient)
                too_large = too_large & selected
            clipped.append(scaled)
            units_clipped += jnp.sum(too_large, dtype=jnp.float32)
            num_units += too_large.size * float(np.mean(flag))
        return tree.unflatten(clipped), AdaptiveGradClipState(units_clipped / max(num_units, 1.0))

    return optax.GradientTransformation(init, update)
