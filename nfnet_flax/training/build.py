"""What a recipe trains with on given devices: shared by training and by planning."""

import dataclasses

import jax
from jax.sharding import Mesh

from nfnet_flax.optim import Optimizer, make_optimizer, make_schedule
from nfnet_flax.parallel.mesh import check_batch_size, check_image_size
from nfnet_flax.recipe import Recipe
from nfnet_flax.training.state import Normalization, Structure, model_structure
from nfnet_flax.training.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Training:
    """The network's structure, the optimizer and the step."""

    structure: Structure
    optimizer: Optimizer
    num_steps: int
    step: jax.stages.Wrapped


def build_training(recipe: Recipe, mesh: Mesh, num_examples: int) -> Training:
    """Builds the training step of a recipe; allocates nothing.

    Args:
      recipe: of the run.
      mesh: that it runs on.
      num_examples: of the training set, which decides the length of an epoch.

    Raises:
      ConfigError: the batch cannot be divided as the recipe says, or parameter groups do not fit the network.
    """
    data, execution = recipe.data, recipe.execution
    check_batch_size("data.batch_size", data.batch_size, mesh, execution.num_microbatches)
    check_image_size("data.image_size", data.image_size, mesh)
    normalization = Normalization(mean=data.mean, std=data.std)
    structure = model_structure(recipe.model, recipe.num_classes, execution, normalization)
    num_steps = recipe.total_steps(num_examples)
    schedule = make_schedule(
        recipe.optim,
        batch_size=data.batch_size,
        steps_per_epoch=num_examples / data.batch_size,
        num_steps=num_steps,
    )
    optimizer = make_optimizer(recipe.optim, schedule, structure.shapes)
    step = make_train_step(structure, optimizer, recipe.objective, mesh, seed=recipe.seed)
    return Training(structure, optimizer, num_steps, step)
