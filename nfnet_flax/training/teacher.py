"""A teacher for distillation: the network of a weight file, in evaluation mode, as a function of arrays."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import nfnet_flax.weights
from nfnet_flax.models.folding import fold
from nfnet_flax.models.nf_block import NFBlock
from nfnet_flax.models.params import GraphDef, merge, split
from nfnet_flax.objectives import Arrays, RunFacts
from nfnet_flax.training.initial import for_classes
from nfnet_flax.weights.portable import WeightsInfo, read_weights

_SCALE, _OFFSET = "teacher image scale", "teacher image offset"
"""Names beside those of the network's parameters: what makes the run's images those that the teacher knows."""


class _Teacher(NamedTuple):
    info: WeightsInfo
    graphdef: GraphDef
    params: dict[str, Any]
    batch_stats: dict[str, Any]


def teacher_arrays(path: str, facts: RunFacts) -> Arrays:
    """Everything that `teacher_logits` needs, for the images and in the order of the classes of a run.

    Args:
      path: of a weight file.
      facts: of the run.

    Raises:
      ConfigError: the file cannot be read or is damaged, or its network knows other classes.
    """
    teacher = _read(path)
    arrays = for_classes(f"teacher {path!r}", teacher.info, teacher.params | teacher.batch_stats, facts.class_names)
    own = facts if teacher.info.preprocessing is None else teacher.info.preprocessing
    mean, std, own_mean, own_std = (np.asarray(v, np.float32) for v in (facts.mean, facts.std, own.mean, own.std))
    return {name: jnp.asarray(value) for name, value in arrays.items()} | {
        _SCALE: jnp.asarray(std / own_std),
        _OFFSET: jnp.asarray((mean - own_mean) / own_std),
    }


def teacher_logits(path: str, images: jax.Array, arrays: Arrays) -> jax.Array:
    """(N, num_classes) float32 logits of the teacher; no gradient passes it.

    Args:
      path: of the weight file, for the structure of the network.
      images: (N, H, W, 3), as the student sees them.
      arrays: of `teacher_arrays`.
    """
    teacher = _read(path)
    params, batch_stats = ({name: arrays[name] for name in part} for part in (teacher.params, teacher.batch_stats))
    model = merge(teacher.graphdef, params, batch_stats)
    logits = model(images.astype(jnp.float32) * arrays[_SCALE] + arrays[_OFFSET])
    return jax.lax.stop_gradient(logits).astype(jnp.float32)


@functools.cache
def _read(path: str) -> _Teacher:
    info, arrays = read_weights(path)
    model = nfnet_flax.weights.network_of(f"teacher {path!r}", info, arrays)
    if all(isinstance(block, NFBlock) for stage in model.stages for block in stage):
        model = fold(model)  # standardized once instead of in every step
    return _Teacher(info, *split(model))
