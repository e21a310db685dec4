"""Reading a run on disk: its state, its evaluation, its weights."""

from pathlib import Path
from typing import Literal

import numpy as np

from nfnet_flax.config import ConfigError
from nfnet_flax.models.params import expand
from nfnet_flax.recipe import read_recipe
from nfnet_flax.runtime import prepare
from nfnet_flax.training import checkpoint
from nfnet_flax.training.evaluation import run_evaluation, weights_to_evaluate
from nfnet_flax.training.identity import stored_class_names
from nfnet_flax.training.restoring import restore_newest
from nfnet_flax.training.run import Setup, assemble
from nfnet_flax.training.state import TrainState
from nfnet_flax.weights.portable import WeightsInfo, write_weights


def read_run(workdir: Path) -> tuple[Setup, TrainState]:
    """Parts and newest good state of a run; changes nothing in its folder.

    Raises:
      ConfigError: the folder holds no run or no good checkpoint.
    """
    recipe = read_recipe(workdir / "recipe.json")
    if checkpoint.latest_step(workdir) is None:
        raise ConfigError(f"workdir {str(workdir)!r} holds no checkpoint yet: train first")
    setup = assemble(recipe, stored_class_names(workdir))
    restored = restore_newest(workdir, setup.abstract_state(), is_owner=False)
    assert restored is not None
    return setup, restored[0]


def evaluate(workdir: str | Path) -> dict[str, float]:
    """Evaluates the newest checkpoint of a run on its held-out set; writes nothing.

    Returns:
      The metrics of `run_evaluation` for raw (`eval`) and EMA (`eval_ema`) parameters, and the checkpoint's `step`.

    Raises:
      ConfigError: the folder holds no run or no checkpoint, or an image cannot be decoded.
      InputFailed: the input failed otherwise.
    """
    prepare()
    setup, state = read_run(Path(workdir))
    with setup.eval_batches() as batches:
        metrics = run_evaluation(setup.eval_step, weights_to_evaluate(state), batches, setup.mesh)
    assert metrics is not None  # nothing was there to stop it
    return {"step": int(state.step), **metrics}


def export_weights(workdir: Path, out: Path, *, parameters: Literal["raw", "ema"]) -> Path:
    """Writes the weights of a run's newest checkpoint as `out/weights.safetensors`, and returns that path.

    Raises:
      ConfigError: the folder holds no run or no checkpoint, or the file cannot be written.
    """
    setup, state = read_run(workdir)
    recipe = setup.recipe
    chosen = weights_to_evaluate(state)["eval" if parameters == "raw" else "eval_ema"]
    members = setup.structure.members | setup.structure.batch_stat_members
    arrays = expand({name: np.asarray(value) for part in chosen for name, value in part.items()}, members)
    source = f"run {recipe.name!r}, step {int(state.step)}, seed {recipe.seed}"
    info = WeightsInfo(model=recipe.model, num_classes=recipe.num_classes, source=source, parameters=parameters)
    path = out / "weights.safetensors"
    write_weights(path, info, arrays)
    return path
