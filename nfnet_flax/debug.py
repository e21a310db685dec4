"""Any recipe on a laptop: a small network of the same family, noise for images, four steps; all else as it is."""

import dataclasses

from nfnet_flax.data.source_config import SyntheticSource
from nfnet_flax.models import (
    EfficientNetConfig,
    ModelConfig,
    NFNetConfig,
    NFRegNetConfig,
    NFResNetConfig,
    ResNetConfig,
)
from nfnet_flax.objectives import Distillation, ObjectiveConfig, SoftmaxCrossEntropy
from nfnet_flax.recipe import Recipe

_TRAIN_PX, _EVAL_PX = 32, 48
_DEPTHS = (1, 2, 1, 1)
_BATCH_SIZE = 16
_NUM_MICROBATCHES = 8
_NUM_EVAL_EXAMPLES = 20
"""Not a multiple of the batch size: the last batch is filled up."""


def debug_recipe(recipe: Recipe) -> Recipe:
    """Derives a run of four steps that goes through the same code: augmentation, optimizer, evaluation, checkpoints.

    Its numbers mean nothing. It takes at most 8 devices: as many as its batch has parts.
    """
    data = recipe.data
    mixing = None if data.mixing is None else dataclasses.replace(data.mixing, group_size=4)
    return dataclasses.replace(
        recipe,
        name=f"{recipe.name}_debug",
        model=_small(recipe.model),
        data=dataclasses.replace(
            data,
            source=SyntheticSource(
                num_train_examples=4 * _BATCH_SIZE,
                num_eval_examples=_NUM_EVAL_EXAMPLES,
                num_classes=recipe.num_classes,
            ),
            num_held_out=None,
            image_size=_TRAIN_PX,
            eval_image_size=_EVAL_PX,
            batch_size=_BATCH_SIZE,
            eval_batch_size=_BATCH_SIZE,
            mixing=mixing,
            num_threads=2,
            num_workers=0,
            prefetch_batches=2,
        ),
        execution=dataclasses.replace(recipe.execution, num_microbatches=_NUM_MICROBATCHES),
        objective=_without_teacher(recipe.objective),
        init_from=None,  # its weights are of the large network
        init_from_skip=(),
        platform="any",
        checkpoint=dataclasses.replace(recipe.checkpoint, every_steps=2),
        num_steps=4,
        log_every_steps=1,
        eval_every_steps=2,
    )


def _without_teacher(objective: ObjectiveConfig) -> ObjectiveConfig:
    """A teacher knows the classes of the recipe's images, not those of noise."""
    if isinstance(objective, Distillation):
        return SoftmaxCrossEntropy(label_smoothing=objective.label_smoothing)
    return objective


def _small(model: ModelConfig) -> ModelConfig:
    model = dataclasses.replace(model, train_image_size=_TRAIN_PX, test_image_size=_EVAL_PX)
    match model:
        case NFNetConfig():
            return dataclasses.replace(model, widths=(16, 16, 32, 32), depths=_DEPTHS, group_width=8)
        case NFResNetConfig():
            return dataclasses.replace(model, widths=(32, 32, 64, 64), depths=_DEPTHS, stem_width=16)
        case NFRegNetConfig():
            return dataclasses.replace(model, widths=(16, 16, 24, 24), depths=_DEPTHS)
        case ResNetConfig():
            num_groups = min(model.num_groups, 4)
            return dataclasses.replace(
                model, widths=(32, 32, 64, 64), depths=_DEPTHS, stem_width=16, num_groups=num_groups
            )
        case EfficientNetConfig():
            return dataclasses.replace(model, width_multiplier=0.25, depth_multiplier=0.3)
