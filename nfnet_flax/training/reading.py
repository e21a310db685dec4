"""Reading a run: recipe, class names, metrics and weights, on any machine. Only its folder is needed; it is not
changed."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, cast

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from nfnet_flax import runtime
from nfnet_flax.config import ConfigError, require, require_one_of
from nfnet_flax.config_json import CodeNotLoaded
from nfnet_flax.data.classes import spare_outputs
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.held_out import open_held_out
from nfnet_flax.data.pipeline import check_batches_fit, eval_batches, say_unused
from nfnet_flax.messages import warn
from nfnet_flax.models import Classifier, build_model
from nfnet_flax.models.params import split
from nfnet_flax.parallel.mesh import check_batch_size, make_mesh, replicated
from nfnet_flax.paths import hub_name, local_path, run_folder
from nfnet_flax.recipe import Recipe, read_recipe
from nfnet_flax.training import layout
from nfnet_flax.training.evaluation import make_eval_step, run_evaluation
from nfnet_flax.training.kept_code import change_of_code
from nfnet_flax.training.layout import BEST, CHECKPOINTS, steps_in
from nfnet_flax.training.metrics import Row, read_rows
from nfnet_flax.training.record import stored_class_names, stored_input
from nfnet_flax.training.restoring import read_arrays
from nfnet_flax.training.state import Normalization, model_structure
from nfnet_flax.weights import network_of, open_weights
from nfnet_flax.weights.convert import target_in
from nfnet_flax.weights.entries import HostArrays
from nfnet_flax.weights.portable import Preprocessing, WeightsInfo, write_weights
from nfnet_flax.weights.timm_folder import is_folder

Which = Literal["newest", "best"] | int
"""Which checkpoint of a run: the newest undamaged one, the best undamaged one, or the number of a step."""
Parameters = Literal["ema", "raw"]
_FIELDS: dict[Parameters, tuple[str, str]] = {
    "raw": ("params", "batch_stats"),
    "ema": ("ema_params", "ema_batch_stats"),
}
"""Kind of parameters -> fields of `TrainState` with the parameters and with the running statistics."""


class Run:
    """The results of a run so far. Only its folder is needed: neither images nor particular devices."""

    def __init__(self, workdir: str | os.PathLike[str]) -> None:
        """Reads the recipe.

        Args:
          workdir: folder of the run, which may still be training.

        Raises:
          CodeNotLoaded: the recipe names classes of a user's own code that is not loaded: import the code first, or
            pass its file to `nfnet_flax.load_code`.
          ConfigError: it is not the folder of a run.
        """
        self.workdir = run_folder("workdir", workdir)
        try:
            self.recipe: Recipe = read_recipe(self.workdir / layout.RECIPE)
        except CodeNotLoaded as error:
            kept = self.workdir / layout.CODE
            raise CodeNotLoaded(f"{error}; copies are in {kept}" if kept.exists() else f"{error}") from error

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of the labels, that is, of the first outputs of the network.

        Raises:
          ConfigError: they are not recorded, or their file is damaged.
        """
        names = stored_class_names(self.workdir)
        if names is None:
            raise ConfigError(
                f"workdir {str(self.workdir)!r} holds no {layout.CLASSES}, which says what the labels mean: "
                "copy it from where the run was trained"
            )
        return names

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, newest first. Only names are read, so damaged checkpoints are included."""
        return steps_in(self.workdir / CHECKPOINTS)

    def metrics(self) -> list[Row]:
        """The metrics, one row for each step that has any, in order: `step`, and numbers by name (None: not finite).

        Raises:
          StorageFailed: the file cannot be read.
        """
        return read_rows(self.workdir / layout.METRICS)

    def weights(self, parameters: Parameters = "ema", checkpoint: Which = "newest") -> HostArrays:
        """Parameters and running statistics by the names of the network, compared with their checksums.

        Args:
          parameters: "ema" for the moving average, or "raw" for the parameters as trained.
          checkpoint: which checkpoint. For "newest" and "best", a warning names a damaged checkpoint, and the one
            before it is used.

        Raises:
          ConfigError: an argument is not valid, there is no such checkpoint, or it is damaged.
          StorageFailed: the folder cannot be read.
        """
        return stored_weights(self, parameters, checkpoint)[1]

    def model(self, parameters: Parameters = "ema", checkpoint: Which = "newest") -> Classifier:
        """The network in evaluation mode; arguments and errors as for `weights`."""
        info, arrays = stored_weights(self, parameters, checkpoint)
        return network_of(f"{info.source},", info, arrays)


def checked_which(value: object) -> Which:
    """A valid value of the argument `checkpoint`; raises `ConfigError` for any other value."""
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int(value)
    hint = f": give {int(value)}, not {value!r}" if isinstance(value, str) and value.isdecimal() else ""
    known = isinstance(value, str) and value in ("newest", "best")
    require(known, "checkpoint", value, f"give 'newest', 'best' or the step of one as an integer{hint}")
    return cast(Which, value)


def stored_weights(run: Run, parameters: Parameters, checkpoint: Which) -> tuple[WeightsInfo, HostArrays]:
    """The result of `Run.weights`, and its description for a weight file; errors as for `Run.weights`."""
    require_one_of("parameters", parameters, _FIELDS)
    checkpoint = checked_which(checkpoint)
    recipe = run.recipe
    warn(change_of_code(run.workdir, recipe))
    shapes = _shapes(recipe)
    step, found = _read(run.workdir, shapes, (parameters,), checkpoint)
    arrays = {name: value for part in found[parameters] for name, value in part.items()}
    info = WeightsInfo(
        model=recipe.model,
        num_classes=recipe.num_classes,
        source=f"run {recipe.name!r}, step {step}, seed {recipe.seed}",
        parameters=parameters,
        class_names=run.class_names,
        preprocessing=_preprocessing(recipe.data),
    )
    return info, arrays


def weights_of(
    reference: str | os.PathLike[str],
    *,
    field: str = "weights",
    parameters: Parameters = "ema",
    checkpoint: Which = "newest",
) -> tuple[WeightsInfo, HostArrays]:
    """Weights and their description.

    Args:
      reference: the folder of a run, or what `open_weights` takes: a weight file, a folder as model hubs hold them, or
        a name in a model hub.
      field: name of the value in messages.
      parameters: for a run, which parameters; see `Run.weights`.
      checkpoint: for a run, which checkpoint; see `Run.weights`.

    Raises:
      ConfigError: there are no such weights, or they are damaged.
      StorageFailed: the folder of the run cannot be read.
      HubUnreachable: the model hub cannot be reached.
    """
    if hub_name(reference) is None and (path := local_path(field, reference)).is_dir() and not is_folder(path):
        return stored_weights(Run(run_folder(field, reference)), parameters, checkpoint)
    return open_weights(reference, field=field)


def _preprocessing(data: DataConfig) -> Preprocessing:
    return Preprocessing(
        image_size=data.eval_image_size,
        crop_margin=data.eval_crop_margin,
        resampler=data.resampler,
        mean=data.mean,
        std=data.std,
        keeps_aspect=data.eval_keeps_aspect,
    )


Shapes = dict[str, jax.ShapeDtypeStruct]


def _shapes(recipe: Recipe) -> tuple[Shapes, Shapes]:
    """Shapes and types of the network's parameters and of its running statistics."""
    model = nnx.eval_shape(lambda: build_model(recipe.model, num_classes=recipe.num_classes, rngs=nnx.Rngs(0)))
    _, *parts = split(model)
    params, batch_stats = (
        {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in part.items()} for part in parts
    )
    return params, batch_stats


def _read(
    workdir: Path, shapes: tuple[Shapes, Shapes], wanted: Sequence[Parameters], which: Which
) -> tuple[int, dict[Parameters, tuple[HostArrays, HostArrays]]]:
    """Reads a checkpoint: its step, and its parameters and running statistics in the host's memory."""
    fields = {field: part for name in wanted for field, part in zip(_FIELDS[name], shapes, strict=True)}
    num_damaged = 0
    for path in _candidates(workdir, which):
        try:
            found = read_arrays(path, fields)
        except layout.Damaged as damage:
            if path.exists():  # otherwise the run, which is still training, has deleted it meanwhile
                num_damaged += 1
                warn(f"checkpoint {path} is damaged and skipped: {damage}")
            continue
        return int(path.name), {name: (found[_FIELDS[name][0]], found[_FIELDS[name][1]]) for name in wanted}
    there = f"checkpoints of steps {steps_in(workdir / CHECKPOINTS)}, best {steps_in(workdir / BEST)}"
    if num_damaged:
        raise ConfigError(f"workdir {str(workdir)!r}: no good checkpoint for checkpoint = {which!r}; there are {there}")
    if which == "newest":
        raise ConfigError(f"workdir {str(workdir)!r} holds no checkpoint yet: train first")
    raise ConfigError(f"workdir {str(workdir)!r} has nothing for checkpoint = {which!r}; there are {there}")


def _candidates(workdir: Path, which: Which) -> Iterator[Path]:
    """Paths of the checkpoints to try, one after the other."""
    if isinstance(which, int):
        yield from (path for kind in (CHECKPOINTS, BEST) if (path := workdir / kind / str(which)).exists())
        return
    folder = workdir / (CHECKPOINTS if which == "newest" else BEST)
    tried: set[int] = set()
    # The folder is listed each time, as a run that is training writes new checkpoints and deletes old ones.
    while (step := next((step for step in steps_in(folder) if step not in tried), None)) is not None:
        tried.add(step)
        yield folder / str(step)


def evaluate(
    workdir: str | os.PathLike[str], *, checkpoint: Which = "newest", data: DataConfig | None = None
) -> dict[str, float]:
    """Evaluates a checkpoint of a run on its held-out set, on the devices of this process; writes nothing.

    Warnings report files of the set that are not used, and images that are left out because they cannot be decoded.

    Args:
      workdir: folder of the run.
      checkpoint: which checkpoint; see `Run.weights`.
      data: settings that replace the recipe's `data`, such as
        `dataclasses.replace(Run(workdir).recipe.data, source=...)` if the images have moved, or for another set with
        the same classes. Labels are matched by class names: a class that the run does not know is an error, and so is a
        set that the run trained on (`data/held_out.py`). The training split is not opened, unless the held-out examples
        are a part of it.

    Returns:
      The metrics of `run_evaluation` for raw (`eval`) and EMA (`eval_ema`) parameters, and the checkpoint's `step`.

    Raises:
      ConfigError: an argument is of another type, the folder holds no run or no such checkpoint, the set does not fit
        it, or an image cannot be decoded.
      InputFailed: the input failed for another reason.
      StorageFailed: the run's folder cannot be read.
    """
    checkpoint = checked_which(checkpoint)
    remedy = "give a DataConfig, such as dataclasses.replace(Run(workdir).recipe.data, source=...)"
    require(data is None or isinstance(data, DataConfig), "data", data, remedy)
    run = Run(workdir)
    runtime.prepare(reproducible=run.recipe.execution.reproducible)
    recipe, data = run.recipe, data or run.recipe.data
    check_batches_fit(data, ("eval",), num_processes=1)
    mesh = _mesh(recipe.execution.num_microbatches, data.eval_batch_size)
    check_batch_size("data.eval_batch_size", data.eval_batch_size, mesh, recipe.execution.num_microbatches)
    record = stored_input(run.workdir)
    source = open_held_out(data, run.class_names, trained=recipe.data, record=record)
    say_unused(source)
    warn(change_of_code(run.workdir, recipe))
    warn(spare_outputs(recipe.num_classes, run.class_names))
    warn(_preprocessing(recipe.data).normalisation_change(f"run {recipe.name!r}", data.mean, data.std))
    step, found = _read(run.workdir, _shapes(recipe), ("raw", "ema"), checkpoint)
    weights = jax.device_put({"eval": found["raw"], "eval_ema": found["ema"]}, replicated(mesh))
    execution = dataclasses.replace(recipe.execution, fsdp=1, spatial=1)
    normalization = Normalization(mean=data.mean, std=data.std)
    structure = model_structure(recipe.model, recipe.num_classes, execution, normalization)
    eval_step = make_eval_step(structure, recipe.objective, mesh)
    with eval_batches(data, source, process_index=0, num_processes=1) as batches:
        counted_in = source if data.on_corrupt == "skip" else None
        metrics = run_evaluation(
            eval_step, weights, batches, mesh, counted_in=counted_in, summarize=recipe.objective.summarize
        )
    assert metrics is not None  # it cannot be stopped here
    return {"step": step, **metrics}


def _mesh(num_microbatches: int | None, batch_size: int) -> Mesh:
    """A mesh of as many devices of this process as the parts of a batch can be divided over."""
    devices = jax.local_devices()
    num_parts = num_microbatches or batch_size
    count = next(count for count in range(len(devices), 0, -1) if num_parts % count == 0)
    return make_mesh(devices[:count])


def export_weights(
    workdir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    parameters: Parameters,
    checkpoint: Which = "newest",
    overwrite: bool = False,
) -> Path:
    """Writes weights of a run as `out/weights.safetensors`, and returns that path; opens no images.

    Args:
      workdir: folder of the run.
      out: folder for the file.
      parameters: "ema" for the moving average, or "raw" for the parameters as trained.
      checkpoint: which checkpoint; see `Run.weights`.
      overwrite: whether to replace an existing file.

    Raises:
      ConfigError: the folder holds no run or no such checkpoint, or the file cannot be written or exists already.
      StorageFailed: the run's folder cannot be read.
    """
    run = Run(workdir)
    path = target_in(out, "weights", overwrite=overwrite)
    info, arrays = stored_weights(run, parameters, checkpoint)
    write_weights(path, info, arrays, overwrite=overwrite)
    return path
