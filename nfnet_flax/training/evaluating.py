"""Evaluating a run's checkpoints, or any weights, on a set of images. Nothing is written, and no folder is changed."""

import dataclasses
import functools
import math
import os
from collections.abc import Iterator, Sequence
from typing import cast

import jax
from jax.sharding import Mesh

from nfnet_flax import runtime
from nfnet_flax.config import ConfigError, require
from nfnet_flax.data.augment_config import Resampler
from nfnet_flax.data.classes import spare_outputs
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.held_out import open_held_out
from nfnet_flax.data.label_sets import LabelSet, open_labelled
from nfnet_flax.data.pipeline import check_batches_fit, eval_batches, open_split, reading, say_unused
from nfnet_flax.data.prefetch import Batches, Rows
from nfnet_flax.data.random_access import Source, SourceConfig, Split
from nfnet_flax.data.sources import own_class_names
from nfnet_flax.messages import warn
from nfnet_flax.models import ExecutionConfig
from nfnet_flax.models.params import split
from nfnet_flax.objectives import SoftmaxCrossEntropy
from nfnet_flax.parallel.mesh import check_batch_size, make_mesh, replicated
from nfnet_flax.paths import hub_name
from nfnet_flax.progress import COMPUTING_LINE_S, track
from nfnet_flax.training.evaluation import Weights, make_eval_step, make_row_step, run_evaluation
from nfnet_flax.training.kept_code import change_of_code
from nfnet_flax.training.measuring import Measurement, measure, row_values
from nfnet_flax.training.reading import (
    Run,
    Which,
    checked_which,
    is_run,
    preprocessing_of,
    read_checkpoint,
    shapes_of_run,
)
from nfnet_flax.training.record import stored_input
from nfnet_flax.training.state import Normalization, model_structure
from nfnet_flax.weights import network_of, open_weights
from nfnet_flax.weights.entries import HostArrays
from nfnet_flax.weights.portable import WeightsInfo

_NUM_PARTS = 8
"""Largest number of parts into which a batch is cut where no recipe says it, and so of devices that are used."""
_DATA_REMEDY = "give a DataConfig, such as dataclasses.replace(Run(workdir).recipe.data, source=...)"


class RunEvaluation:
    """Evaluates checkpoints of a run on one set of images, which is opened once."""

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        data: DataConfig | None = None,
        *,
        label_set: LabelSet | None = None,
        flip: bool = False,
    ) -> None:
        """Opens the run and the images; prints warnings as `evaluate` does.

        Args:
          workdir: folder of the run.
          data: settings that replace the recipe's `data`; see `evaluate`.
          label_set: how labels are found; None: by the names of the classes.
          flip: whether predictions are the mean over an image and its mirror image.

        Raises:
          ConfigError, InputFailed, StorageFailed: as for `evaluate`; or a file of `label_set` does not fit.
        """
        require(data is None or isinstance(data, DataConfig), "data", data, _DATA_REMEDY)
        self.run = Run(workdir)
        recipe = self.run.recipe
        runtime.prepare(reproducible=recipe.execution.reproducible)
        self.data = data = data or recipe.data
        check_batches_fit(data, ("eval",), num_processes=1)
        self._mesh = _mesh(recipe.execution.num_microbatches, data.eval_batch_size)
        check_batch_size("data.eval_batch_size", data.eval_batch_size, self._mesh, recipe.execution.num_microbatches)
        record = stored_input(self.run.workdir)

        def open_named(names: Sequence[str]) -> Source:
            return open_held_out(data, names, trained=recipe.data, record=record)

        label_set = label_set or LabelSet()
        self.labelled = open_labelled(
            label_set,
            names=self.run.class_names,
            num_outputs=recipe.num_classes,
            own_names=lambda: own_names(data),
            open_named=open_named,
        )
        say_unused(self.labelled.source)
        warn(change_of_code(self.run.workdir, recipe))
        warn(spare_outputs(recipe.num_classes, self.run.class_names))
        warn(preprocessing_of(recipe.data).normalisation_change(f"run {recipe.name!r}", data.mean, data.std))
        execution = dataclasses.replace(recipe.execution, fsdp=1, spatial=1)
        normalization = Normalization(mean=data.mean, std=data.std)
        self._structure = model_structure(recipe.model, recipe.num_classes, execution, normalization)
        # The objective knows one label of each image, and nothing of mirror images or of outputs that are left out.
        is_plain = not flip and label_set.labels is None and label_set.classes is None
        self._objective = recipe.objective if is_plain else None
        if not is_plain and not isinstance(recipe.objective, SoftmaxCrossEntropy):
            warn(f"with flip, labels or classes, the loss is a cross-entropy, not that of {recipe.objective}")
        self._flip = flip

    def metrics(self, checkpoint: Which) -> dict[str, float]:
        """The result of `evaluate`."""
        step, weights = self._weights(checkpoint)
        eval_step = make_eval_step(self._structure, self.run.recipe.objective, self._mesh)
        by_prefix = {"eval": weights["raw"], "eval_ema": weights["ema"]}
        source = self.labelled.source
        with eval_batches(self.data, source, process_index=0, num_processes=1) as batches:
            counted_in = source if self.data.on_corrupt == "skip" else None
            metrics = run_evaluation(
                eval_step,
                by_prefix,
                _shown(batches, self.data, source),
                self._mesh,
                counted_in=counted_in,
                summarize=self.run.recipe.objective.summarize,
            )
        assert metrics is not None  # it cannot be stopped here
        return {"step": step, **metrics}

    @functools.cached_property
    def _step(self) -> jax.stages.Wrapped:
        return make_row_step(self._structure, row_values(self._objective, flip=self._flip), self._mesh)

    def measure(self, checkpoint: Which) -> tuple[int, dict[str, Measurement]]:
        """The step of a checkpoint, and the measurements of its `raw` and `ema` parameters.

        Their metrics include the values of the recipe's objective, unless mirror images are used, outputs are left out,
        or images have several right labels: then they are those of `Predictions.metrics` alone.

        Raises:
          NoCheckpoint: there is no such checkpoint, or it is damaged.
          ConfigError, InputFailed, StorageFailed: as for `evaluate`; or images have several classes.
        """
        _require_one_class(self.data)
        step, weights = self._weights(checkpoint)
        recipe, skips = self.run.recipe, self.data.on_corrupt == "skip"
        text = f"run {recipe.name!r}, step {step}, seed {recipe.seed}"
        described = {name: f"{text}, {name} parameters" for name in weights}
        with eval_batches(self.data, self.labelled.source, process_index=0, num_processes=1) as batches:
            shown = _shown(batches, self.data, self.labelled.source)
            found = measure(
                self._step, weights, shown, self._mesh, self.labelled, described=described, counts_corrupt=skips
            )
        return step, found

    def _weights(self, checkpoint: Which) -> tuple[int, dict[str, Weights]]:
        shapes = shapes_of_run(self.run.recipe)
        step, found = read_checkpoint(self.run.workdir, shapes, ("raw", "ema"), checked_which(checkpoint))
        placed = jax.device_put(found, replicated(self._mesh))
        return step, {"raw": placed["raw"], "ema": placed["ema"]}  # JAX sorts the names


def _shown(batches: Batches, data: DataConfig, source: Source) -> Iterator[Rows]:
    """The batches of an evaluation, whose progress is shown."""
    num_batches = -(-len(source) // data.eval_batch_size)
    return track(batches, "evaluating", "batches", num_batches, first_line_s=COMPUTING_LINE_S)


def _require_one_class(data: DataConfig) -> None:
    remedy = (
        "has images with several classes, of which only the metrics of a run are computed: nfnet eval --workdir DIR"
    )
    require(not data.source.is_multi_label, "data.source", type(data.source).__name__, remedy)


def own_names(data: DataConfig) -> tuple[str, ...]:
    """Names of the classes that the images of an evaluation have themselves.

    Raises:
      ConfigError, InputFailed: as for `open_split`.
    """
    of_split: Split = "eval" if data.num_held_out is None else "train"
    with reading(of_split):
        return own_class_names(data.source, of_split, data.eval_image_size)


def _mesh(num_parts: int | None, batch_size: int) -> Mesh:
    """A mesh of as many devices of this process as the parts of a batch can be divided over."""
    devices = jax.local_devices()
    num_parts = num_parts or batch_size
    count = next(count for count in range(len(devices), 0, -1) if num_parts % count == 0)
    return make_mesh(devices[:count])


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
    return RunEvaluation(workdir, data).metrics(checkpoint)


def data_for(info: WeightsInfo, source: SourceConfig) -> DataConfig | None:
    """Settings with which images are prepared as weights expect them; None if the weights do not say how."""
    given = info.preprocessing
    if given is None:
        return None
    return DataConfig(
        source=source,
        eval_image_size=given.image_size,
        eval_crop_margin=given.crop_margin,
        eval_keeps_aspect=given.keeps_aspect,
        resampler=cast(Resampler, given.resampler),  # `DataConfig` checks it
        mean=given.mean,
        std=given.std,
    )


def evaluate_weights(
    weights: str | os.PathLike[str],
    images: SourceConfig | DataConfig,
    *,
    label_set: LabelSet | None = None,
    flip: bool = False,
    keeps_logits: bool = False,
) -> Measurement:
    """Evaluates a weight file, or other weights that `open_weights` takes, on the held-out split of a set of images.

    Only that split is opened. The classes of the set are matched by name with those of the weights. Warnings report
    what is not used, and settings that differ from those that the weights were evaluated with.

    Args:
      weights: a weight file, a folder as model hubs hold them, or a name in a model hub; not the folder of a run.
      images: the set, whose images are prepared as the weights record it; or settings with the set, used as they are.
      label_set: how labels are found, if not by the names of the set's classes.
      flip: whether probabilities are the mean over an image and its mirror image.
      keeps_logits: whether the result has the logits of all images, 4 bytes for each image and output.

    Raises:
      ConfigError: there are no such weights, they do not say how images are prepared, the set or a file of `label_set`
        does not fit them, or an image cannot be decoded.
      HubUnreachable: the model hub cannot be reached.
      InputFailed: the input failed for another reason.
    """
    known = isinstance(images, SourceConfig | DataConfig)
    require(known, "images", images, "give a source, such as FolderSource(root=...), or a DataConfig")
    info, arrays = opened_weights(weights)
    data = images if isinstance(images, DataConfig) else data_for(info, images)
    if data is None:
        raise ConfigError(
            f"weights {str(weights)!r}: do not say how images are prepared: give a DataConfig with eval_image_size, "
            "eval_crop_margin, eval_keeps_aspect, resampler, mean and std"
        )
    return measure_weights(info, arrays, data, label_set=label_set, flip=flip, keeps_logits=keeps_logits)


def opened_weights(weights: str | os.PathLike[str]) -> tuple[WeightsInfo, HostArrays]:
    """The result of `open_weights`; raises `ConfigError` also for the folder of a run, which knows its own images."""
    if hub_name(weights) is None and is_run("weights", weights):
        raise ConfigError(
            f"weights = {os.fspath(weights)!r}: is the folder of a run: give --workdir (in Python, evaluate), or make "
            "a weight file of it by `nfnet convert run`"
        )
    return open_weights(weights)


def measure_weights(
    info: WeightsInfo,
    arrays: HostArrays,
    data: DataConfig,
    *,
    label_set: LabelSet | None = None,
    flip: bool = False,
    keeps_logits: bool = False,
) -> Measurement:
    """The result of `evaluate_weights`, for weights that are read already; arguments and errors as there."""
    _require_one_class(data)
    require(info.num_classes > 0, "weights", info.source, "have no head, and so no classes: give weights with one")
    remedy = "take images of so many channels, and the images of a set have 3"
    require(info.model.in_channels == 3, "weights", f"{info.source}: {info.model.in_channels}", remedy)
    runtime.prepare(reproducible=True)
    check_batches_fit(data, ("eval",), num_processes=1)
    num_parts = math.gcd(_NUM_PARTS, data.eval_batch_size)
    mesh = _mesh(num_parts, data.eval_batch_size)
    labelled = open_labelled(
        label_set or LabelSet(),
        names=info.class_names,
        num_outputs=info.num_classes,
        own_names=lambda: own_names(data),
        open_named=lambda names: open_split(data, "eval", names),
    )
    say_unused(labelled.source)
    if info.preprocessing is not None:
        warn(info.preprocessing.normalisation_change(info.source, data.mean, data.std))
    execution = ExecutionConfig(num_microbatches=num_parts)
    normalization = Normalization(mean=data.mean, std=data.std)
    structure = model_structure(info.model, info.num_classes, execution, normalization)
    _, *parts = split(network_of(f"weights {info.source},", info, arrays))
    params, batch_stats = jax.device_put(parts, replicated(mesh))
    step = make_row_step(structure, row_values(None, flip=flip), mesh)
    with eval_batches(data, labelled.source, process_index=0, num_processes=1) as batches:
        found = measure(
            step,
            {"weights": (params, batch_stats)},
            _shown(batches, data, labelled.source),
            mesh,
            labelled,
            described={"weights": info.source},
            counts_corrupt=data.on_corrupt == "skip",
            keeps_logits=keeps_logits,
        )
    return found["weights"]
