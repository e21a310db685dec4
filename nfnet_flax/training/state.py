"""The one value that holds all that must survive a restart."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from nfnet_flax.models import ModelConfig, build_model
from nfnet_flax.models.params import BatchStats, GraphDef, Params, split
from nfnet_flax.parallel.mesh import replicated


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """State after `step` updates. Restoring it is resuming: there is no random state and no data position besides."""

    step: jax.Array
    """int32 scalar."""
    params: Params
    batch_stats: BatchStats
    """Running statistics of BatchNorm; empty for the normalizer-free networks."""
    opt_state: Any
    ema_params: Params
    ema_batch_stats: BatchStats


def model_structure(config: ModelConfig, num_classes: int) -> tuple[GraphDef, tuple[str, ...]]:
    """Structure and parameter names of a network; allocates nothing."""
    model = nnx.eval_shape(lambda: build_model(config, num_classes=num_classes, rngs=nnx.Rngs(0)))
    graphdef, params, _ = split(model)
    return graphdef, tuple(params)


def _initial_state(
    config: ModelConfig, num_classes: int, seed: int, optimizer: optax.GradientTransformation
) -> TrainState:
    rngs = nnx.Rngs(params=jax.random.key(seed))
    _, params, batch_stats = split(build_model(config, num_classes=num_classes, rngs=rngs))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        ema_params=jax.tree.map(jnp.copy, params),
        ema_batch_stats=jax.tree.map(jnp.copy, batch_stats),
    )


def with_weights(state: TrainState, arrays: dict[str, np.ndarray]) -> TrainState:
    """A state whose raw and EMA weights are replaced where `arrays` names them, with the shardings that it has."""

    def placed(current: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {n: jax.device_put(arrays[n], v.sharding) if n in arrays else v for n, v in current.items()}

    return dataclasses.replace(
        state,
        params=placed(state.params),
        batch_stats=placed(state.batch_stats),
        ema_params=placed(state.ema_params),
        ema_batch_stats=placed(state.ema_batch_stats),
    )


def abstract_state(
    config: ModelConfig, num_classes: int, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes, types and shardings of the state; allocates nothing."""
    shapes = jax.eval_shape(lambda: _initial_state(config, num_classes, 0, optimizer))
    sharding = replicated(mesh)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)


def create_state(
    config: ModelConfig, num_classes: int, seed: int, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The state before the first update, born with its shardings."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, num_classes, optimizer, mesh))
    return jax.jit(lambda: _initial_state(config, num_classes, seed, optimizer), out_shardings=shardings)()
