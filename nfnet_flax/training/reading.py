"""Reading a run: recipe, class names, metrics and weights, on any machine. Only its folder is needed; it is not
changed."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, cast

import jax
import numpy as np
from flax import nnx

from nfnet_flax.config import ConfigError, require, require_one_of
from nfnet_flax.config_json import CodeNotLoaded
from nfnet_flax.data.config import DataConfig
from nfnet_flax.messages import warn
from nfnet_flax.models import Classifier, build_model
from nfnet_flax.models.params import split
from nfnet_flax.paths import hub_name, is_missing
from nfnet_flax.recipe import Recipe, read_recipe
from nfnet_flax.storage import BucketFolder, BucketUrl
from nfnet_flax.training import layout
from nfnet_flax.training.kept_code import change_of_code
from nfnet_flax.training.layout import BEST, CHECKPOINTS, steps_in
from nfnet_flax.training.metrics import Row, read_rows
from nfnet_flax.training.record import stored_class_names
from nfnet_flax.training.restoring import read_arrays
from nfnet_flax.training.run_folder import place_of, reading
from nfnet_flax.weights import network_of, open_weights
from nfnet_flax.weights.convert import target_in
from nfnet_flax.weights.entries import HostArrays
from nfnet_flax.weights.portable import Preprocessing, WeightsInfo, write_weights
from nfnet_flax.weights.timm_folder import is_folder

Which = Literal["newest", "best"] | int
"""Which checkpoint of a run: the newest one, the best one, each with undamaged parameters, or the number of a step."""
Parameters = Literal["ema", "raw"]
_FIELDS: dict[Parameters, tuple[str, str]] = {
    "raw": ("params", "batch_stats"),
    "ema": ("ema_params", "ema_batch_stats"),
}
"""Kind of parameters -> fields of `TrainState` with the parameters and with the running statistics."""


_WEIGHTS_REMEDY = (
    "give a weight file, the folder of a run, a folder with timm's config.json and model.safetensors, or a name in a "
    "model hub, such as timm/eca_nfnet_l0.ra2_in1k"
)


class NoCheckpoint(ConfigError):  # noqa: N818 - it names what happened, as KeyboardInterrupt does
    """A run has no such checkpoint, or it is damaged."""


class Run:
    """The results of a run so far. Only its folder is needed: neither images nor particular devices."""

    def __init__(self, workdir: str | os.PathLike[str], *, field: str = "workdir") -> None:
        """Reads the recipe.

        Args:
          workdir: folder of the run, which may still be training: a path, or a URL such as `gs://BUCKET/FOLDER`, of
            which a copy is made on this machine. `workdir` of the result is the path of the files.
          field: name of the folder in messages.

        Raises:
          CodeNotLoaded: the recipe names classes of a user's own code that is not loaded: import the code first, or
            pass its file to `nfnet_flax.load_code`.
          ConfigError: it is not the folder of a run.
        """
        self._folder = reading(field, workdir)
        self.workdir = self._folder.path
        layout.check_run(field, workdir, self.workdir)
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

    def refresh(self) -> None:
        """Looks again which records and checkpoints there are; only needed for a run in a bucket."""
        self._folder.pull()

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, newest first. Only names are read, so damaged checkpoints are included."""
        return steps_in(self.workdir / CHECKPOINTS)

    def all_steps(self) -> list[int]:
        """Like `steps`, with the step of the best checkpoint, which is kept longer."""
        return sorted({*self.steps(), *steps_in(self.workdir / BEST)}, reverse=True)

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
    return weights_at(run, parameters, checkpoint)[1:]


def weights_at(run: Run, parameters: Parameters, checkpoint: Which) -> tuple[int, WeightsInfo, HostArrays]:
    """The result of `stored_weights`, and the step of the checkpoint; errors as for `Run.weights`."""
    require_one_of("parameters", parameters, _FIELDS)
    checkpoint = checked_which(checkpoint)
    run.refresh()
    recipe = run.recipe
    warn(change_of_code(run.workdir, recipe))
    shapes = shapes_of_run(recipe)
    step, found = read_checkpoint(run.workdir, shapes, (parameters,), checkpoint)
    arrays = {name: value for part in found[parameters] for name, value in part.items()}
    info = WeightsInfo(
        model=recipe.model,
        num_classes=recipe.num_classes,
        source=f"run {recipe.name!r}, step {step}, seed {recipe.seed}",
        parameters=parameters,
        class_names=run.class_names,
        preprocessing=preprocessing_of(recipe.data),
        activation=recipe.objective.activation,
    )
    return step, info, arrays


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
    if hub_name(reference) is None and is_run(field, reference):
        return stored_weights(Run(reference, field=field), parameters, checkpoint)
    return open_weights(reference, field=field)


def is_run(field: str, reference: str | os.PathLike[str]) -> bool:
    """Whether a path or URL is the folder of a run, and not of weights.

    Raises:
      ConfigError: it is neither.
    """
    place, named = place_of(field, reference), f"{field} = {os.fspath(reference)!r}"
    if isinstance(place, BucketUrl):
        return layout.RECIPE in BucketFolder(place).files()
    if is_missing(place):
        raise ConfigError(f"{named}: there is no such file or folder: {_WEIGHTS_REMEDY}")
    if not place.is_dir() or is_folder(place):
        return False
    if all(is_missing(place / name) for name in (layout.RECIPE, *layout.CHECKPOINT_KINDS)):
        raise ConfigError(f"{named}: the folder holds neither a run nor weights: {_WEIGHTS_REMEDY}")
    return True


def preprocessing_of(data: DataConfig) -> Preprocessing:
    """How images are prepared for an evaluation."""
    return Preprocessing(
        image_size=data.eval_image_size,
        crop_margin=data.eval_crop_margin,
        resampler=data.resampler,
        mean=data.mean,
        std=data.std,
        keeps_aspect=data.eval_keeps_aspect,
    )


Shapes = dict[str, jax.ShapeDtypeStruct]


def shapes_of_run(recipe: Recipe) -> tuple[Shapes, Shapes]:
    """Shapes and types of the network's parameters and of its running statistics."""
    model = nnx.eval_shape(lambda: build_model(recipe.model, num_classes=recipe.num_classes, rngs=nnx.Rngs(0)))
    _, *parts = split(model)
    params, batch_stats = (
        {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in part.items()} for part in parts
    )
    return params, batch_stats


def read_checkpoint(
    workdir: Path, shapes: tuple[Shapes, Shapes], wanted: Sequence[Parameters], which: Which
) -> tuple[int, dict[Parameters, tuple[HostArrays, HostArrays]]]:
    """Reads a checkpoint: its step, and its parameters and running statistics in the host's memory.

    Args:
      workdir: folder of the run.
      shapes: result of `shapes_of_run`.
      wanted: which parameters to read.
      which: which checkpoint.

    Raises:
      NoCheckpoint: there is no such checkpoint, or it is damaged.
      StorageFailed: the folder cannot be read.
    """
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
        raise NoCheckpoint(
            f"workdir {str(workdir)!r}: no good checkpoint for checkpoint = {which!r}; there are {there}"
        )
    if which == "newest":
        raise NoCheckpoint(f"workdir {str(workdir)!r} holds no checkpoint yet: train first")
    raise NoCheckpoint(f"workdir {str(workdir)!r} has nothing for checkpoint = {which!r}; there are {there}")


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
