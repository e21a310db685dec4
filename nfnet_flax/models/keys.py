"""PRNG keys for a run's initial parameters, for a step, and for each example of a batch."""

import jax
import jax.numpy as jnp

from nfnet_flax.config import require

_INITIAL = 2**32 - 1
"""Number from which the key of the initial parameters is made; larger than any step (an int32), so that it differs from
the key of every step."""


def check_seed(field: str, seed: int) -> None:
    """Raises `ConfigError` for a seed of more than 32 bits: a key uses only the lower 32, so two seeds would be
    equal."""
    require(0 <= seed < 2**32, field, seed, "must lie in [0, 2**32)")


def initial_key(seed: int) -> jax.Array:
    """Key for the initial parameters of a run.

    Raises:
      ConfigError: the seed is negative, or does not fit into 32 bits.
    """
    check_seed("seed", seed)
    return jax.random.fold_in(jax.random.key(seed), _INITIAL)


def key_of_step(seed: int, step: jax.typing.ArrayLike) -> jax.Array:
    """Key for everything that is drawn at random in a step; steps are counted from 0.

    Raises:
      ConfigError: the seed is negative, or does not fit into 32 bits.
    """
    check_seed("seed", seed)
    return jax.random.fold_in(jax.random.key(seed), step)


def example_keys(step_key: jax.Array, rows: jax.typing.ArrayLike) -> jax.Array:
    """One key per example, made from its row in the *global* batch, so that the division over devices has no effect.

    Args:
      step_key: scalar PRNG key of the step.
      rows: (N,) integer positions in the global batch, such as `jnp.arange(N)`.

    Returns:
      (N,) PRNG keys.

    Raises:
      ConfigError: `step_key` is not a single key, or `rows` is not one-dimensional or not integer.
    """
    is_one_key = isinstance(step_key, jax.Array) and step_key.ndim == _num_dims_of_keys(step_key)
    require(is_one_key, "step_key", _named(step_key), "give a single key, such as jax.random.key(0)")
    is_list = jnp.ndim(rows) == 1 and jnp.issubdtype(jnp.result_type(rows), jnp.integer)
    require(is_list, "rows", _named(rows), "give (N,) positions in the global batch, such as jnp.arange(N)")
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(step_key, jnp.asarray(rows))


def check_example_keys(keys: jax.Array | None, num_examples: int) -> None:
    """Raises `ConfigError` unless there is one key for each example, or none at all."""
    if keys is None:
        return
    is_one_each = keys.ndim == 1 + _num_dims_of_keys(keys) and len(keys) == num_examples
    remedy = f"give {num_examples} keys, one for each image (nfnet_flax.models.example_keys)"
    require(is_one_each, "keys", _named(keys), remedy)


def _named(value: jax.typing.ArrayLike) -> str:
    return f"{jnp.result_type(value)} of shape {jnp.shape(value)}"


def _num_dims_of_keys(keys: jax.Array) -> int:
    """Number of axes of a single key: 0, or 1 for JAX's old kind of key, which is an array of integers."""
    return 0 if jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) else 1
