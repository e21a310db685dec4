"""What plans of all kinds of devices have in common: compiling a training step without its devices, and its sizes."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from nfnet_flax.config import ConfigError
from nfnet_flax.progress import COMPUTING_LINE_S, tracking
from nfnet_flax.recipe import Recipe
from nfnet_flax.units import human_size, scaled

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

    from nfnet_flax.training.state import TrainState

_NUM_EXAMPLES = 1_281_167
"""Number of training images of ImageNet; only the schedule depends on it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSizes:
    """How a step is divided, and the sizes that follow from the recipe alone, per device."""

    topology: str
    device_kind: str
    num_devices: int
    images_per_device: int
    """Number of images per device; with `spatial`, of a group of devices, each of which has a part of their height."""
    images_per_turn: int
    """Number of these images that are computed at a time: a part of the batch."""
    batch_size: int
    image_size: int
    rematerialization: str
    num_parameters: int
    parameter_bytes: int
    """Size of a device's share of parameters and running statistics."""
    state_bytes: int
    """Size of a device's share of parameters, optimizer state and EMA together."""
    compile_s: float


def compile_step(recipe: Recipe, topology: str, mesh: "Mesh") -> "tuple[TrainState, jax.stages.Compiled]":
    """The compiled training step of a recipe on the mesh of a topology, and the shapes of its state; raises
    `ConfigError` as `plan` does."""
    import jax

    try:
        state, lowered = lower_step(recipe, mesh)
        with tracking(f"compiling the step for {topology}", first_line_s=COMPUTING_LINE_S):
            return state, lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"the step does not compile for {topology}: {str(error).splitlines()[0]}") from error


def lower_step(recipe: Recipe, mesh: "Mesh") -> "tuple[TrainState, jax.stages.Lowered]":
    """The training step of a recipe on a mesh, ready to be compiled, and the shapes of its state. No memory of the
    devices is allocated, and no images are opened.

    Raises:
      ConfigError: the batch cannot be divided over the mesh, or the objective's arrays (a teacher) cannot be read.
    """
    import jax
    import jax.numpy as jnp

    from nfnet_flax.objectives import RunFacts
    from nfnet_flax.parallel.mesh import batch_sharding, replicated
    from nfnet_flax.training.build import build_optimizer, build_structure
    from nfnet_flax.training.state import abstract_state
    from nfnet_flax.training.step import make_train_step

    batch_size, size = recipe.data.batch_size, recipe.data.image_size
    structure = build_structure(recipe, mesh)
    optimizer = build_optimizer(recipe, structure, _NUM_EXAMPLES)
    state = abstract_state(structure, optimizer, mesh)
    batch = {
        "image": jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.uint8, sharding=batch_sharding(mesh, 4)),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=batch_sharding(mesh)),
    }
    if recipe.data.source.is_multi_label:
        rows = (batch_size, recipe.num_classes)
        batch |= {"label": jax.ShapeDtypeStruct(rows, jnp.uint8, sharding=batch_sharding(mesh, 2))}
    facts = RunFacts(class_names=(), mean=recipe.data.mean, std=recipe.data.std)
    arrays = {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=replicated(mesh))
        for name, value in recipe.objective.arrays(facts).items()
    }
    step = make_train_step(structure, optimizer, recipe.objective, mesh, seed=recipe.seed, reduction=recipe.reduction)
    return state, step.lower(state, batch, arrays)


def sizes_of(recipe: Recipe, topology: str, mesh: "Mesh", state: "TrainState", compile_s: float) -> dict[str, Any]:
    """The fields of `StepSizes`, by name."""
    import jax

    from nfnet_flax.parallel.mesh import count_turns, num_batch_shards

    def nbytes(tree: Any) -> int:
        leaves = jax.tree.leaves(tree)
        return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)

    images = recipe.data.batch_size // num_batch_shards(mesh)
    found = StepSizes(
        topology=topology,
        device_kind=mesh.devices.flat[0].device_kind,
        num_devices=mesh.size,
        images_per_device=images,
        images_per_turn=images // count_turns(recipe.execution.num_microbatches, mesh),
        batch_size=recipe.data.batch_size,
        image_size=recipe.data.image_size,
        rematerialization=recipe.execution.rematerialization,
        num_parameters=sum(leaf.size for leaf in state.params.values()),
        parameter_bytes=nbytes((state.params, state.batch_stats)),
        state_bytes=nbytes(state),
        compile_s=compile_s,
    )
    return {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}


def describe_sizes(found: StepSizes) -> str:
    """How the step is divided, as a line for people."""
    return (
        f"{found.topology}: {found.num_devices} x {found.device_kind}, {found.images_per_device} images of "
        f"{found.image_size} px each, {found.images_per_turn} at a time; rematerialization {found.rematerialization}; "
        f"compiled in {found.compile_s:.0f} s"
    )


def describe_collectives(found: StepSizes, collectives: dict[str, int]) -> list[str]:
    """What a step moves between devices, as lines for people.

    Args:
      found: sizes of the step.
      collectives: kind of collective -> payload of one step in bytes.
    """
    return [
        f"{kind}: {scaled(size)}B per device and step ({size / (4 * found.num_parameters):.2f} x the gradient)"
        for kind, size in collectives.items()
    ]


def describe_state(found: StepSizes) -> str:
    """The memory that does not depend on the program, as the beginning of a line for people."""
    return (
        f"memory per device: parameters {human_size(found.parameter_bytes)}, optimizer and EMA "
        f"{human_size(found.state_bytes - found.parameter_bytes)}"
    )
