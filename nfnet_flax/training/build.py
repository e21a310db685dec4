"""The network's structure and the optimizer of a recipe, made without any image; training and planning use this."""

from jax.sharding import Mesh

from nfnet_flax.optim import Optimizer, make_optimizer, make_schedule
from nfnet_flax.parallel.mesh import check_batch_size, check_image_size
from nfnet_flax.recipe import Recipe
from nfnet_flax.training.state import Normalization, Structure, model_structure


def build_structure(recipe: Recipe, mesh: Mesh) -> Structure:
    """The network's structure; allocates nothing.

    Raises:
      ConfigError: the network is invalid, or its batches cannot be divided over the mesh as the recipe says.
    """
    data, execution = recipe.data, recipe.execution
    check_batch_size("data.batch_size", data.batch_size, mesh, execution.num_microbatches)
    check_image_size("data.image_size", data.image_size, mesh)
    return model_structure(
        recipe.model,
        recipe.num_classes,
        execution,
        Normalization(mean=data.mean, std=data.std),
        is_divided=recipe.optim.is_divisible,
    )


def build_optimizer(recipe: Recipe, structure: Structure, num_examples: int) -> Optimizer:
    """The optimizer with the run's learning rates; allocates nothing.

    Args:
      recipe: recipe of the run.
      structure: structure of the network whose parameters are updated.
      num_examples: number of training examples, which determines the length of an epoch.

    Raises:
      ConfigError: parameter groups do not fit the network, or there are more steps than can be counted.
    """
    steps_per_epoch = num_examples / recipe.data.batch_size
    schedule = make_schedule(
        recipe.optim,
        batch_size=recipe.data.batch_size,
        steps_per_epoch=steps_per_epoch,
        num_steps=recipe.total_steps(num_examples),
    )
    return make_optimizer(recipe.optim, schedule, structure.shapes, steps_per_epoch=steps_per_epoch)
