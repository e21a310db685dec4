"""A short form of any recipe for a laptop: a small network of the same family, images of noise, and four steps."""

import dataclasses

from nfnet_flax.data.source_config import SyntheticSource
from nfnet_flax.recipe import Recipe

_TRAIN_PX, _EVAL_PX = 32, 48
_BATCH_SIZE = 16
_NUM_MICROBATCHES = 8
_NUM_EVAL_EXAMPLES = 20
"""Number of held-out examples; no multiple of the batch size, so that the last batch is filled up with padding."""


def debug_recipe(recipe: Recipe) -> Recipe:
    """Derives a run of four steps that executes the same code: augmentation, optimizer, evaluation, checkpoints.

    Its accuracy means nothing. It can use at most 8 devices, as its batch has 8 parts.
    """
    data = recipe.data
    mixing = None if data.mixing is None else dataclasses.replace(data.mixing, group_size=4)
    return dataclasses.replace(
        recipe,
        name=f"{recipe.name}_debug",
        model=recipe.model.small(),
        data=dataclasses.replace(
            data,
            source=SyntheticSource(
                num_train_examples=4 * _BATCH_SIZE,
                num_eval_examples=_NUM_EVAL_EXAMPLES,
                num_classes=recipe.num_classes,
                several_classes=data.source.is_multi_label,
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
        objective=recipe.objective.small(),
        init_from=None,  # those weights belong to the large network
        init_from_skip=(),
        telemetry=dataclasses.replace(recipe.telemetry, trackers=()),  # nobody wants to see it there
        platform="any",
        checkpoint=dataclasses.replace(recipe.checkpoint, every_steps=2),
        num_steps=4,
        log_every_steps=1,
        eval_every_steps=2,
    )
