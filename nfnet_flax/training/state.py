"""The training state, which holds everything that must survive a restart, and the structure of its network."""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nfnet_flax.models import ExecutionConfig, ModelConfig, build_model
from nfnet_flax.models.keys import initial_key
from nfnet_flax.models.params import (
    BatchStats,
    GraphDef,
    Params,
    mark_prepared,
    split,
)
from nfnet_flax.models.standardization import StandardizationName
from nfnet_flax.parallel.mesh import partition_spec, sharded_axis


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """State after `step` updates. A run continues from it alone: there is no other random state and no data
    position."""

    step: jax.Array
    """Number of updates, an int32 scalar."""
    params: Params
    batch_stats: BatchStats
    """Running statistics of BatchNorm; empty for the normalizer-free networks."""
    opt_state: optax.OptState
    """State of the optimizer, such as momentum; frozen parameters have none."""
    ema_params: Params
    """Moving average of the parameters."""
    ema_batch_stats: BatchStats
    """Moving average of the running statistics."""


class HasInit(Protocol):
    """An object whose `init` makes an optimizer's state: our `Optimizer`, or any transformation of Optax."""

    @property
    def init(self) -> optax.TransformInitFn: ...


@dataclasses.dataclass(frozen=True)
class Normalization:
    """Normalization of images: `(grey level - mean) / std` for each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = Normalization(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))


@dataclasses.dataclass(frozen=True)
class Structure:
    """A network without its arrays."""

    config: ModelConfig
    num_classes: int
    execution: ExecutionConfig
    normalization: Normalization
    """How images are normalised if they are given as grey levels."""
    graphdef: GraphDef
    """Structure of the network in training mode."""
    prepared: GraphDef
    """The same for parameters whose kernels are already standardized (`preparation.prepare`)."""
    shapes: dict[str, jax.ShapeDtypeStruct]
    """Shape and type of each parameter, by name."""
    batch_stat_shapes: dict[str, jax.ShapeDtypeStruct]
    """Shape and type of each running statistic, by name."""
    is_divided: bool
    """Whether each device holds and updates a share of the kernels; False: all of them hold whole kernels."""

    def sharded_axes(self, mesh: Mesh) -> dict[str, int | None]:
        """Name of each parameter -> its axis that is divided over the devices of a mesh, or None."""
        return {
            name: sharded_axis(name, leaf.shape, mesh, self.num_parts) if self.is_divided else None
            for name, leaf in self.shapes.items()
        }

    @property
    def num_parts(self) -> int | None:
        """Number of parts of a batch, if the bits of an update must not depend on the number of devices, else None."""
        return self.execution.num_microbatches if self.execution.reproducible else None

    @property
    def standardization(self) -> StandardizationName:
        """Form of the weight standardization."""
        return self.config.standardization


def model_structure(
    config: ModelConfig,
    num_classes: int,
    execution: ExecutionConfig | None = None,
    normalization: Normalization = IMAGENET,
    *,
    is_divided: bool = True,
) -> Structure:
    """Structure of a network and names of its parameters; allocates nothing.

    Raises:
      ConfigError: as for `build_model`.
    """
    execution = execution or ExecutionConfig()

    model = nnx.eval_shape(lambda: build_model(config, num_classes=num_classes, rngs=nnx.Rngs(0)))
    model.execution = execution
    graphdef, params, batch_stats = split(model)
    mark_prepared(model)
    prepared, _, _ = split(model)
    shapes, batch_stat_shapes = (
        {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in part.items()}
        for part in (params, batch_stats)
    )
    return Structure(
        config=config,
        num_classes=num_classes,
        execution=execution,
        normalization=normalization,
        graphdef=graphdef,
        prepared=prepared,
        shapes=shapes,
        batch_stat_shapes=batch_stat_shapes,
        is_divided=is_divided,
    )


def _initial_arrays(structure: Structure, seed: int) -> tuple[Params, BatchStats]:
    rngs = nnx.Rngs(params=initial_key(seed))
    _, params, batch_stats = split(build_model(structure.config, num_classes=structure.num_classes, rngs=rngs))
    return params, batch_stats


def _state_of(params: Params, batch_stats: BatchStats, optimizer: HasInit) -> TrainState:
    """The state before the first update."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        ema_params=jax.tree.map(jnp.copy, params),
        ema_batch_stats=jax.tree.map(jnp.copy, batch_stats),
    )


def with_weights(state: TrainState, arrays: dict[str, np.ndarray]) -> TrainState:
    """A state with other raw and EMA weights for all names in `arrays`; the shardings do not change.

    Args:
      state: a state that `create_state` made.
      arrays: name of a parameter or running statistic -> new value.
    """

    def placed(current: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {name: _placed(arrays[name], value) if name in arrays else value for name, value in current.items()}

    return dataclasses.replace(
        state,
        params=placed(state.params),
        batch_stats=placed(state.batch_stats),
        ema_params=placed(state.ema_params),
        ema_batch_stats=placed(state.ema_batch_stats),
    )


def _placed(array: np.ndarray, like: jax.Array) -> jax.Array:
    """An array of the host on the devices, with the sharding of another array, which may include other processes."""
    return _sharded(np.asarray(array, like.dtype), like.sharding)


def _sharded(whole: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def placed_everywhere(arrays: dict[str, jax.Array], mesh: Mesh) -> dict[str, jax.Array]:
    """Copies arrays that every process has to every device of the mesh."""
    whole = NamedSharding(mesh, PartitionSpec())
    return {name: _sharded(np.asarray(value), whole) for name, value in arrays.items()}


def abstract_state(structure: Structure, optimizer: HasInit, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of the state; allocates nothing."""
    shapes = jax.eval_shape(
        lambda params, batch_stats: _state_of(params, batch_stats, optimizer),
        structure.shapes,
        structure.batch_stat_shapes,
    )

    axes = structure.sharded_axes(mesh)

    def placed(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # The last key of a parameter, of its momentum and of its EMA is the parameter's name.
        name = path[-1].key if isinstance(path[-1], jax.tree_util.DictKey) else ""
        is_like = name in axes and leaf.shape == structure.shapes[name].shape
        spec = partition_spec(axes[name] if is_like else None)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(placed, shapes)


def create_state(structure: Structure, seed: int, optimizer: HasInit, mesh: Mesh) -> TrainState:
    """The state before the first update, created with its shardings."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(structure, optimizer, mesh))
    # The program runs only once. On CPUs an optimizing compilation takes several times as long as the run itself.
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    options: dict[str, Any] | None = {"xla_backend_optimization_level": 0} if is_cpu else None
    # In two programs: a compiler that divides a parameter as it draws it rounds otherwise than where it is whole.
    whole = NamedSharding(mesh, PartitionSpec())
    drawn = jax.jit(lambda: _initial_arrays(structure, seed), out_shardings=whole, compiler_options=options)()
    state: TrainState = jax.jit(
        lambda params, batch_stats: _state_of(params, batch_stats, optimizer),
        out_shardings=shardings,
        compiler_options=options,
    )(*drawn)
    return state
