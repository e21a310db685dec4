"""A recipe: all settings of a run, in one frozen value. Its JSON form is stored in the run's folder."""

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Literal

from nfnet_flax.config import MAX_COUNT, ConfigError, Name, Pattern, Shown, check_types, require, require_count
from nfnet_flax.config_json import ADDED_LATER, CodeNotLoaded, differences, from_json, to_json
from nfnet_flax.data.config import DataConfig
from nfnet_flax.json_files import read_json, write_json
from nfnet_flax.models import ExecutionConfig, ModelConfig
from nfnet_flax.models.keys import check_seed
from nfnet_flax.objectives import Objective, SoftmaxCrossEntropy
from nfnet_flax.open_config import with_absolute_places, with_places_of
from nfnet_flax.optim import OptimConfig
from nfnet_flax.parallel.processes import Platform
from nfnet_flax.parallel.reduce import Reduction
from nfnet_flax.paths import hub_name, local_path
from nfnet_flax.storage import bucket_url
from nfnet_flax.telemetry.config import TelemetryConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, and which are kept."""

    every_steps: int = 100
    """A checkpoint is written each time the step is a multiple of this."""
    every_minutes: float | None = None
    """A checkpoint is also written at the first log step after this many minutes without one; None: only by steps."""
    keep_last: int = 3
    """Number of newest checkpoints that are kept."""
    best_metric: Annotated[str, Shown("METRIC")] = "eval_ema/top1"
    """Metric by which the best checkpoint is chosen, which is kept in addition to the newest ones: `eval/NAME` for the
    parameters as trained, or `eval_ema/NAME` for their moving average, where the objective's `evaluate` returns
    NAME."""
    best_is: Literal["highest", "lowest"] = dataclasses.field(default="highest", metadata=ADDED_LATER)
    """Which value of the metric is the best: the highest, as for an accuracy, or the lowest, as for a loss."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("every_steps", "keep_last"):
            require(getattr(self, name) >= 1, f"checkpoint.{name}", getattr(self, name), "must be at least 1")
        require(
            self.every_minutes is None or self.every_minutes > 0,
            "checkpoint.every_minutes",
            self.every_minutes,
            "must be positive or None",
        )
        remedy = "give eval/NAME or eval_ema/NAME, such as eval_ema/top1 or eval/loss"
        is_named = re.fullmatch(r"eval(_ema)?/\S+", self.best_metric) is not None
        require(is_named, "checkpoint.best_metric", self.best_metric, remedy)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run. The update at step N depends on the recipe, which contains the seed, and on N."""

    name: Name
    """Name of the run, for logs and weight files."""
    model: ModelConfig
    """The network."""
    num_classes: int
    """Number of outputs of the network; at least the number of classes of the images."""
    data: DataConfig
    """Training and held-out images, and how they are read and augmented."""
    optim: OptimConfig
    """Optimizer, gradient clipping, learning rate, weight decay and moving average of the parameters (EMA)."""
    execution: ExecutionConfig = dataclasses.field(default_factory=ExecutionConfig)
    """How the training step is computed on the devices: memory, speed, reproducibility."""
    reduction: Reduction | None = dataclasses.field(default=None, metadata=ADDED_LATER)
    """How the gradients of the devices are added; None: in a fixed order if `execution.reproducible` is on, otherwise
    in the fastest order."""
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    """When checkpoints are written, and which are kept."""
    init_from: Annotated[str, Shown("FILE|FOLDER|NAME")] | None = None
    """Weights with which parameters and EMA start: a file (made by `nfnet convert`), the folder of a run, whose newest
    EMA is used, a folder with timm's `config.json`, or a name in a model hub, such as `timm/eca_nfnet_l0.ra2_in1k`;
    None: random parameters. If the weights include a head, its classes must have the same names as those
    of the images. The file may be moved, but its content must not change until the run has a checkpoint."""
    init_from_skip: tuple[Pattern, ...] = ()
    """Shell-style patterns of parameters that start at random although `init_from` has them, such as `head.*`."""
    init_to_zero: tuple[Pattern, ...] = dataclasses.field(default=(), metadata=ADDED_LATER)
    """Shell-style patterns of parameters that start at zero, also if `init_from` has them, such as `head.*` for
    fine-tuning: the first outputs are then the same for all classes."""
    seed: int = 0
    """Random seed of initialization, data order, augmentation and dropout; below 2**32."""
    platform: Platform = "any"
    """Kind of device that the run needs; on any other kind it does not start."""
    num_epochs: float = 1.0
    """Length of the run in passes over the training set; ignored if `num_steps` is given."""
    num_steps: int | None = None
    """Length of the run in updates; None: it follows from `num_epochs`."""
    objective: Objective = dataclasses.field(default_factory=SoftmaxCrossEntropy)
    """Loss that training minimizes, and metrics that an evaluation measures."""
    log_every_steps: int = 10
    """Metrics of a step are written each time the step is a multiple of this."""
    tensorboard: bool = True
    """Whether metrics are written for TensorBoard in addition to `metrics.jsonl`; this imports TensorFlow, which takes
    seconds at each start."""
    eval_every_steps: int = 100
    """The held-out set is evaluated each time the step is a multiple of this, and at the end."""
    telemetry: TelemetryConfig = dataclasses.field(default_factory=TelemetryConfig, metadata=ADDED_LATER)
    """What is recorded about the run besides its metrics."""

    def __post_init__(self) -> None:
        check_types(self)
        channels = self.model.in_channels
        require(channels == 3, "model.in_channels", channels, "must be 3 in a run: its input are images in colour")
        require(2 <= self.num_classes <= MAX_COUNT, "num_classes", self.num_classes, f"must be 2 to {MAX_COUNT:,}")
        require(
            self.init_from is not None or not self.init_from_skip,
            "init_from_skip",
            self.init_from_skip,
            "give init_from, or leave this empty",
        )
        check_seed("seed", self.seed)
        remedy = "takes one class per image, and data.source gives several: give SigmoidCrossEntropy or Focal"
        takes_labels = self.objective.takes_several_classes or not self.data.source.is_multi_label
        require(takes_labels, "objective", type(self.objective).__name__, remedy)
        for field, part in (("reduction", self.reduction), ("optim.method", self.optim.method)):
            keeps_promise = part is None or part.is_reproducible or not self.execution.reproducible
            remedy = "gives other bits on another number of devices: set execution.reproducible = False"
            require(keeps_promise, field, part, remedy)
        require(self.num_epochs > 0, "num_epochs", self.num_epochs, "must be positive")
        if self.num_steps is not None:
            require_count("num_steps", self.num_steps)
        for name in ("log_every_steps", "eval_every_steps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")

    def total_steps(self, num_examples: int) -> int:
        """Number of updates of the whole run for a training set of `num_examples`.

        Raises:
          ConfigError: `num_epochs` amounts to more updates than can be counted.
        """
        if self.num_steps is not None:
            return self.num_steps
        num_steps = max(1, round(self.num_epochs * num_examples / self.data.batch_size))
        remedy = f"these are {num_steps:.3g} steps of {num_examples:,} examples: give at most {MAX_COUNT:,} steps"
        require(num_steps <= MAX_COUNT, "num_epochs", self.num_epochs, remedy)
        return num_steps


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Writes a recipe as JSON, as a whole or not at all.

    Raises:
      OSError: the file cannot be written.
    """
    write_json(path, to_json(recipe))


def read_recipe(path: Path) -> Recipe:
    """Reads what `save_recipe` wrote.

    Raises:
      CodeNotLoaded: it names a class of a user's own code that is not loaded; reading does not load it.
      ConfigError: the file is missing, damaged, or of another version of the package; the message names it.
      StorageFailed: it cannot be opened or read.
    """
    remedy = (
        "give the folder of a run; if the file is damaged, move it away and start nfnet train again, which writes it"
    )
    data = read_json(path, remedy)
    try:
        recipe: Recipe = from_json(Recipe, data)
    except CodeNotLoaded as error:
        raise CodeNotLoaded(f"{path}: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return recipe


def recipe_differences(old: Recipe, new: Recipe) -> list[str]:
    """One line for each differing field that affects the updates, or which examples are evaluated and how.

    The length of a run is not among them, although the learning rate depends on it: see `length_change`.
    """
    same = dataclasses.replace(_with_free_fields_of(old, new), num_epochs=new.num_epochs, num_steps=new.num_steps)
    return differences(to_json(same), to_json(new))


def free_differences(old: Recipe, new: Recipe) -> list[str]:
    """One line for each differing field that does not affect the updates and so may change when a run continues."""
    return differences(to_json(old), to_json(_with_free_fields_of(old, new)))


def length_change(old: Recipe, new: Recipe, *, num_examples: int, step: int) -> str | None:
    """A message about a run that continues with another length; None if there is nothing to report.

    Args:
      old: recipe of the run until now.
      new: recipe from now on.
      num_examples: number of examples in the training set.
      step: number of updates done.

    Raises:
      ConfigError: more updates are done than the run shall have.
    """
    before, after = old.total_steps(num_examples), new.total_steps(num_examples)
    if step > after:
        name, value = ("num_epochs", new.num_epochs) if new.num_steps is None else ("num_steps", new.num_steps)
        raise ConfigError(
            f"{name} = {value}: the run would end at step {after}, and is at step {step} already: "
            "give at least as many, or another workdir"
        )
    if step == 0 or before == after:
        return None
    return (
        f"the run now has {after} steps instead of {before}: from step {step} on the learning rate follows the "
        "schedule of the new length, so the result differs from that of a run that had this length from its start"
    )


def _with_free_fields_of(recipe: Recipe, other: Recipe) -> Recipe:
    """A recipe with those fields of `other` that do not affect the updates.

    These are: when and what is saved, logged and evaluated, the run's name, the paths of images, initial weights, a
    teacher and the like (`OpenConfig.place_fields`), what happens with a corrupt image, how many threads prepare the
    input, over how many devices parameters and images are divided, and the required platform.
    """
    recipe = with_places_of(recipe, other)
    return dataclasses.replace(
        recipe,
        name=other.name,
        data=recipe.data.with_resumable_of(other.data),
        execution=dataclasses.replace(recipe.execution, fsdp=other.execution.fsdp, spatial=other.execution.spatial),
        checkpoint=other.checkpoint,
        init_from=other.init_from if recipe.init_from is not None and other.init_from is not None else recipe.init_from,
        platform=other.platform,
        log_every_steps=other.log_every_steps,
        eval_every_steps=other.eval_every_steps,
        tensorboard=other.tensorboard,
        telemetry=other.telemetry,
    )


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """A recipe whose paths are absolute, as it is stored in the folder of a run.

    Raises:
      ConfigError: a path is not one of this machine's file systems.
    """
    init_from = recipe.init_from
    if init_from is not None and hub_name(init_from) is None:
        init_from = str(bucket_url("init_from", init_from) or local_path("init_from", init_from))
    return dataclasses.replace(with_absolute_places(recipe), init_from=init_from)
