"""A run on disk and the parts that a recipe makes: shared by training and evaluation.

Folder of a run: `recipe.json` (resolved), `input.json` (what the input is made of), `checkpoints/STEP`, `best/STEP`,
`metrics.jsonl`, `tensorboard/`.
"""

import dataclasses
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jaxlib
import optax
from flax import nnx
from jax.sharding import Mesh

import nfnet_flax
from nfnet_flax.config import ConfigError, differences, require, to_json
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.pipeline import eval_batches, input_identity, open_split
from nfnet_flax.data.prefetch import Batches
from nfnet_flax.data.random_access import Source
from nfnet_flax.models import build_model
from nfnet_flax.parallel.mesh import check_batch_size, check_image_size, make_mesh
from nfnet_flax.parallel.processes import Processes, check_agreement
from nfnet_flax.recipe import Recipe, read_recipe, recipe_differences, save_recipe
from nfnet_flax.training import checkpoint
from nfnet_flax.training.build import build_training
from nfnet_flax.training.evaluation import EvalStep, make_eval_step
from nfnet_flax.training.gradient import Batch, Metrics
from nfnet_flax.training.state import (
    Structure,
    TrainState,
    abstract_state,
    create_state,
    with_weights,
)
from nfnet_flax.weights.entries import Arrays
from nfnet_flax.weights.portable import stored_arrays


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a recipe makes on the devices at hand."""

    recipe: Recipe
    mesh: Mesh
    structure: Structure
    optimizer: optax.GradientTransformationExtraArgs
    schedule: optax.Schedule
    num_steps: int
    train_source: Source
    eval_source: Source
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    eval_step: EvalStep

    def initial_weights(self) -> Arrays:
        """What `init_from` gives; nothing without it.

        Raises:
          ConfigError: the file cannot be read or does not fit the network.
        """
        recipe = self.recipe
        if recipe.init_from is None:
            return {}
        model = nnx.eval_shape(lambda: build_model(recipe.model, num_classes=recipe.num_classes, rngs=nnx.Rngs(0)))
        return stored_arrays(recipe.init_from, model, skip=recipe.init_from_skip)

    def create_state(self, weights: Arrays) -> TrainState:
        """The state before the first update: random, but for the weights that are given."""
        recipe = self.recipe
        state = create_state(self.structure, recipe.seed, self.optimizer, self.mesh)
        return with_weights(state, weights, self.structure)

    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the state."""
        return abstract_state(self.structure, self.optimizer, self.mesh)

    def input_identity(self) -> dict[str, Any]:
        """What decides every byte of every batch."""
        return input_identity(
            self.recipe.data,
            seed=self.recipe.seed,
            train_source=self.train_source,
            eval_source=self.eval_source,
        )

    def eval_batches(self) -> Batches:
        """This process's rows of the held-out set; to be closed."""
        return eval_batches(
            self.recipe.data,
            self.eval_source,
            process_index=jax.process_index(),
            num_processes=jax.process_count(),
        )


def assemble(recipe: Recipe) -> Setup:
    """Builds the mesh, the network's structure, the optimizer, the sources and the two steps; trains nothing.

    Raises:
      ConfigError: the recipe does not fit the devices, or its parameter groups do not fit the network.
    """
    mesh = make_mesh(fsdp=recipe.execution.fsdp, spatial=recipe.execution.spatial)
    data = recipe.data
    check_batch_size("data.eval_batch_size", data.eval_batch_size, mesh, recipe.execution.num_microbatches)
    check_image_size("data.eval_image_size", data.eval_image_size, mesh)
    train_source, eval_source = open_split(data, "train"), open_split(data, "eval")
    for source in (train_source, eval_source):
        remedy = f"must be at least {len(source.class_names)}, as the images have so many classes"
        require(recipe.num_classes >= len(source.class_names), "num_classes", recipe.num_classes, remedy)
    training = build_training(recipe, mesh, len(train_source))
    return Setup(
        recipe=recipe,
        mesh=mesh,
        structure=training.structure,
        optimizer=training.optimizer,
        schedule=training.schedule,
        num_steps=training.num_steps,
        train_source=train_source,
        eval_source=eval_source,
        train_step=training.step,
        eval_step=make_eval_step(training.structure, mesh, mean=data.mean, std=data.std),
    )


def check_same_run(processes: Processes, recipe: Recipe, workdir: Path, timeout_s: float) -> None:
    """Checks that all processes are about to run the same; before any of them computes.

    Raises:
      ConfigError: recipe, workdir or versions differ, or a process did not say in time.
    """

    def fields(data: Any, path: str) -> dict[str, str]:
        if not isinstance(data, dict):
            return {path: repr(data)}
        return {name: text for key, value in data.items() for name, text in fields(value, f"{path}.{key}").items()}

    shared = dataclasses.replace(recipe, data=recipe.data.with_execution_of(DataConfig(prefetch_batches=2)))
    versions = {"nfnet_flax": nfnet_flax.__version__, "jax": jax.__version__, "jaxlib": jaxlib.__version__}
    facts = {
        **versions,
        "python": platform.python_version(),
        "workdir": str(workdir.absolute()),
        **fields(to_json(shared), "recipe"),
    }
    check_agreement(processes, facts, timeout_s)


def claim(processes: Processes, workdir: Path, recipe: Recipe, identity: dict[str, Any], timeout_s: float) -> None:
    """Makes the folder of a run by process 0, and checks in all that it is theirs: the same recipe and input.

    Raises:
      ConfigError: it cannot be written, belongs to another recipe or input, or is not the same folder in all processes.
    """
    if processes.is_first:
        claim_workdir(workdir, recipe)
        claim_input(workdir, identity)
    processes.barrier("claimed", timeout_s)
    if not processes.is_first:
        remedy = f"is not the folder that process 0 sees, as process {processes.index} finds no recipe.json in it: "
        remedy += "give one on a file system that all hosts share"
        require((workdir / "recipe.json").exists(), "workdir", str(workdir), remedy)
        claim_workdir(workdir, recipe)
        claim_input(workdir, identity)


def claim_workdir(workdir: Path, recipe: Recipe) -> None:
    """Makes the folder of a run, or checks that it already belongs to the same recipe.

    Raises:
      ConfigError: the folder cannot be written, or belongs to another recipe; the differing fields are named.
    """
    stored = workdir / "recipe.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not stored.exists():
            partial = workdir / f".recipe.json.{os.getpid()}"
            save_recipe(recipe, partial)
            partial.replace(stored)
        # Not `os.access`: it says yes on read-only file systems and to root.
        probe = workdir / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"workdir {str(workdir)!r} cannot be written ({error.strerror}): give another one") from error
    if lines := recipe_differences(read_recipe(stored), recipe):
        raise ConfigError(
            f"workdir {str(workdir)!r} belongs to another recipe; give another workdir, or the same values as before:\n"
            + "\n".join(f"  {line}" for line in lines)
        )


def claim_input(workdir: Path, identity: dict[str, Any]) -> None:
    """Records what the input of a run is, or checks that it still is the same.

    Raises:
      ConfigError: the images, their number or order, or how batches are made of them changed; what did is named.
    """
    stored = workdir / "input.json"
    if not stored.exists():
        if checkpoint.latest_step(workdir) is not None:
            raise ConfigError(f"workdir {str(workdir)!r} holds checkpoints but no input.json: start in a new workdir")
        partial = workdir / f".input.json.{os.getpid()}"
        partial.write_text(json.dumps(identity, indent=1) + "\n")
        partial.replace(stored)
    try:
        recorded = json.loads(stored.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(stored)!r} cannot be read ({error}): start in a new workdir") from error
    if lines := differences(recorded, identity):
        raise ConfigError(
            f"workdir {str(workdir)!r} was trained on another input; give back the same images, or another workdir:\n"
            + "\n".join(f"  {line}" for line in lines)
        )
