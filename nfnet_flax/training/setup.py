"""Everything that is made from a recipe for the available devices and images, in one value."""

import dataclasses
import socket
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nfnet_flax import runtime
from nfnet_flax.config import require
from nfnet_flax.data.held_out import check_distinct
from nfnet_flax.data.pipeline import check_batches_fit, eval_batches, input_identity, open_split, source_record
from nfnet_flax.data.prefetch import Batches
from nfnet_flax.data.random_access import Source
from nfnet_flax.objectives import Arrays, Batch, RunFacts
from nfnet_flax.optim import Optimizer
from nfnet_flax.parallel.mesh import check_batch_size, check_image_size, make_mesh
from nfnet_flax.recipe import Recipe
from nfnet_flax.training.build import build_optimizer, build_structure
from nfnet_flax.training.evaluation import EvalStep, evaluated_names, make_eval_step
from nfnet_flax.training.gradient import Metrics
from nfnet_flax.training.identity import Identity
from nfnet_flax.training.initial import content_of
from nfnet_flax.training.kept_code import code_of
from nfnet_flax.training.kept_programs import KeptPrograms
from nfnet_flax.training.state import (
    Structure,
    TrainState,
    abstract_state,
    create_state,
    placed_everywhere,
    with_weights,
)
from nfnet_flax.training.step import make_train_step
from nfnet_flax.weights.entries import HostArrays

TrainStep = Callable[[TrainState, Batch, Arrays, jax.Array], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything that is made from a recipe for the available devices and images."""

    recipe: Recipe
    mesh: Mesh
    structure: Structure
    optimizer: Optimizer
    num_steps: int
    train_source: Source
    eval_source: Source
    objective_arrays: Arrays
    """Arrays that the step takes besides state and batch (`Objective.arrays`), whole on every device."""
    yes_and_no: tuple[jax.Array, jax.Array]
    """The values of the step's `measures`, on every device."""
    train_step: TrainStep
    eval_step: EvalStep

    def measures(self, step: int) -> jax.Array:
        """Whether a step measures its update, as metrics of it are written."""
        yes, no = self.yes_and_no
        return yes if step % self.recipe.log_every_steps == 0 else no

    def create_state(self, weights: HostArrays) -> TrainState:
        """The state before the first update: random, except for the given weights."""
        recipe = self.recipe
        state = create_state(self.structure, recipe.seed, self.optimizer, self.mesh)
        return with_weights(state, weights)

    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the state."""
        return abstract_state(self.structure, self.optimizer, self.mesh)

    def identity(self, initial: dict[str, str] | None = None) -> Identity:
        """The identity of the run, to be recorded in its folder; `initial` is `InitialWeights.record`."""
        found = input_identity(
            self.recipe.data, seed=self.recipe.seed, train_source=self.train_source, eval_source=self.eval_source
        )
        if self.objective_arrays:  # a teacher's file could be replaced by another one with the same name
            arrays = {name: np.asarray(value) for name, value in self.objective_arrays.items()}
            found["objective"] = {"content": content_of(arrays)}
        return Identity(
            recipe=self.recipe,
            input=found,
            class_names=tuple(self.train_source.class_names),
            environment=runtime.environment(),
            code=code_of(self.recipe),
            initial=initial,
        )

    def eval_batches(self) -> Batches:
        """This process's rows of the held-out set; to be closed by the caller."""
        return eval_batches(
            self.recipe.data,
            self.eval_source,
            process_index=jax.process_index(),
            num_processes=jax.process_count(),
        )


def assemble(recipe: Recipe, class_names: Sequence[str] | None, *, trains: bool = False) -> Setup:
    """Builds the mesh, the network's structure, the optimizer, the sources and the two steps; trains nothing.

    Args:
      recipe: recipe of the run.
      class_names: class names in the order of the run's labels; None: those of the training split, in its order.
      trains: whether the training step will be called, so that reading it from the disk begins at once.

    Raises:
      ConfigError: the recipe does not fit the devices, its parameter groups do not fit the network, or the images have
        other classes.
    """
    mesh = make_mesh(fsdp=recipe.execution.fsdp, spatial=recipe.execution.spatial)
    programs = KeptPrograms(recipe, mesh)
    if trains:
        programs.read_ahead("train")
    data = recipe.data
    check_batches_fit(data, ("train", "eval"), jax.process_count())
    check_batch_size("data.eval_batch_size", data.eval_batch_size, mesh, recipe.execution.num_microbatches)
    check_image_size("data.eval_image_size", data.eval_image_size, mesh)
    train_source = open_split(data, "train", class_names)
    names = train_source.class_names
    eval_source = open_split(data, "eval", names)
    if data.num_held_out is None:
        check_distinct(source_record(train_source), None, eval_source)
    remedy = f"must be at least {len(names)}, the number of classes of the images"
    require(recipe.num_classes >= len(names), "num_classes", recipe.num_classes, remedy)
    if data.source.is_multi_label:
        remedy = f"must be {len(names)}, the number of classes of the images, as an image may have several"
        require(recipe.num_classes == len(names), "num_classes", recipe.num_classes, remedy)
    _check_best_metric(recipe)
    structure = build_structure(recipe, mesh)
    optimizer = build_optimizer(recipe, structure, len(train_source))
    facts = RunFacts(class_names=tuple(names), mean=data.mean, std=data.std)
    objective_arrays = placed_everywhere(recipe.objective.arrays(facts), mesh)
    flags = placed_everywhere({"yes": jnp.asarray(True), "no": jnp.asarray(False)}, mesh)
    num_steps = recipe.total_steps(len(train_source))
    train_step = make_train_step(
        structure, optimizer, recipe.objective, mesh, seed=recipe.seed, reduction=recipe.reduction
    )
    eval_step = make_eval_step(structure, recipe.objective, mesh)
    # Where the objective's arrays come from (a teacher's network) decides programs, too, and is not in the recipe.
    facts_of_programs = None if objective_arrays else (num_steps, len(train_source))
    return Setup(
        recipe=recipe,
        mesh=mesh,
        structure=structure,
        optimizer=optimizer,
        num_steps=num_steps,
        train_source=train_source,
        eval_source=eval_source,
        objective_arrays=objective_arrays,
        yes_and_no=(flags["yes"], flags["no"]),
        train_step=programs.kept(train_step, "train", facts_of_programs),
        eval_step=programs.kept(eval_step, "eval", facts_of_programs),
    )


def facts_of(setup: Setup) -> dict[str, Any]:
    """Where and with what a session of a run trains, for its record (`telemetry.events`)."""
    devices = setup.mesh.devices
    return {
        "num_steps": setup.num_steps,
        "num_processes": jax.process_count(),
        "num_devices": devices.size,
        "device_kind": devices.flat[0].device_kind,
        "host": socket.gethostname(),
        "versions": runtime.versions(),
    }


def _check_best_metric(recipe: Recipe) -> None:
    """Raises `ConfigError` unless an evaluation computes the metric by which the best checkpoint is chosen."""
    names = evaluated_names(recipe.objective, recipe.num_classes, is_multi_label=recipe.data.source.is_multi_label)
    known = ", ".join(f"{prefix}/{name}" for prefix in ("eval", "eval_ema") for name in names)
    remedy = f"{type(recipe.objective).__name__} does not compute it: give one of {known}"
    is_known = recipe.checkpoint.best_metric.partition("/")[2] in names
    require(is_known, "checkpoint.best_metric", recipe.checkpoint.best_metric, remedy)
