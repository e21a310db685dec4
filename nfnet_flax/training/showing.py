"""Opens the metrics of a run, and gives TensorBoard what it shows of the run besides them."""

import functools
from pathlib import Path

import numpy as np

from nfnet_flax.config import ConfigError
from nfnet_flax.data.examples import eval_example
from nfnet_flax.data.prefetch import Rows
from nfnet_flax.data.random_access import read_ahead
from nfnet_flax.messages import warn
from nfnet_flax.optim import AGC, groups_table
from nfnet_flax.parallel.processes import current
from nfnet_flax.telemetry.about import About, hparams_of, parameters_text, recipe_text
from nfnet_flax.telemetry.board import HeldOut, write_first_batch, write_outcomes
from nfnet_flax.telemetry.overview import layout
from nfnet_flax.training.evaluation import Observe, evaluated_names
from nfnet_flax.training.metrics import MetricsLog, NoMetrics, OnMetrics
from nfnet_flax.training.setup import Setup


def open_log(
    workdir: Path, setup: Setup, step: int, *, evaluated: bool, on_metrics: OnMetrics | None
) -> MetricsLog | NoMetrics:
    """The metrics of a run that continues from a step; in processes other than the first, nothing is written."""
    if not current().is_first:
        return NoMetrics()
    is_shown = setup.recipe.tensorboard
    log = MetricsLog(
        workdir,
        resume_step=step,
        evaluated=evaluated,
        tensorboard=is_shown,
        on_metrics=on_metrics,
        about=_about(setup) if is_shown else None,
    )
    if step == 0:  # its first batch is shown before the step, which then compiles
        log.open_events()
    return log


def _about(setup: Setup) -> About:
    recipe, shapes = setup.recipe, setup.structure.shapes
    is_multi_label = recipe.data.source.is_multi_label
    names = evaluated_names(recipe.objective, recipe.num_classes, is_multi_label=is_multi_label)
    return About(
        texts={
            "run/recipe": recipe_text(recipe),
            "run/parameters": parameters_text(groups_table(recipe.optim, shapes), shapes),
        },
        hparams=hparams_of(recipe),
        charts=layout(names, clips_units=isinstance(recipe.optim.clipping, AGC)),
    )


def unshown(setup: Setup, log: MetricsLog | NoMetrics) -> str | None:
    """A message about what is not shown of this run; None if there is nothing to say."""
    if not setup.recipe.data.source.is_multi_label or not log.has_events:
        return None
    return (
        "TensorBoard shows no confusion matrix, accuracy of classes or wrong images: an image may have several classes"
    )


def show_first_batch(setup: Setup, log: MetricsLog | NoMetrics, rows: Rows) -> None:
    """Shows the images of a run's first batch, unless the recipe says that no images are shown."""
    if log.has_events and setup.recipe.telemetry.images:
        write_first_batch(log, rows, setup.train_source.class_names)


def observer(setup: Setup, log: MetricsLog | NoMetrics, step: int) -> Observe | None:
    """What shows the outcomes of the evaluation of a step; None if nothing is shown."""
    if not log.has_events:
        return None
    held_out = HeldOut(
        class_names=setup.train_source.class_names,
        read=functools.partial(_read_held_out, setup),
        prefix=setup.recipe.checkpoint.best_metric.partition("/")[0],
        has_images=setup.recipe.telemetry.images,
    )
    return functools.partial(write_outcomes, log, step, held_out=held_out)


def _read_held_out(setup: Setup, indexes: list[int]) -> np.ndarray | None:
    """A few held-out images as the network gets them, (N, H, W, 3) uint8; None, with a warning, if they cannot be read.

    They are read a second time: to keep all images until the worst mistakes are known takes too much memory, and with
    several processes the images were in the rows of others, too.
    """
    source = setup.eval_source
    try:
        read_ahead(source, indexes)
        examples = [eval_example(index, config=setup.recipe.data, source=source) for index in indexes]
    except (OSError, ConfigError) as error:
        warn(f"the held-out images that are predicted wrong cannot be shown: {error}")
        return None
    return np.stack([example["image"] for example in examples])
