"""The one value that holds all that must survive a restart."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from nfnet_flax.models import ModelConfig, build_model
from nfnet_flax.models.params import GraphDef, Params, split
from nfnet_flax.parallel.mesh import replicated


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """State after `step` updates. Restoring it is resuming: there is no random state and no data position besides."""

    step: jax.Array
    """int32 scalar."""
    params: Params
    opt_state: Any
    ema_params: Params


def model_structure(config: ModelConfig, num_classes: int) -> tuple[GraphDef, tuple[str, ...]]:
    """Structure and parameter names of a network; allocates nothing."""
    model = nnx.eval_shape(lambda: build_model(config, num_classes=num_classes, rngs=nnx.Rngs(0)))
    graphdef, params = split(model)
    return graphdef, tuple(params)


def _initial_state(
    config: ModelConfig, num_classes: int, seed: int, optimizer: optax.GradientTransformation
) -> TrainState:
    rngs = nnx.Rngs(params=jax.random.key(seed))
    _, params = split(build_model(config, num_classes=num_classes, rngs=rngs))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema_params=jax.tree.map(jnp.copy, params),
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
