"""A teacher for distillation: the network of a weight file in evaluation mode, as a function of its arrays."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import nfnet_flax.weights
from nfnet_flax.models.folding import fold
from nfnet_flax.models.params import BatchStats, GraphDef, Params, merge, split
from nfnet_flax.paths import hub_name, local_path
from nfnet_flax.storage import bucket_url
from nfnet_flax.weights.heads import for_classes
from nfnet_flax.weights.portable import WeightsInfo
from nfnet_flax.weights.reference import open_weights

_REMEDY = "give a teacher that was trained on the same classes"

_SCALE, _OFFSET = "teacher image scale", "teacher image offset"
"""Names of arrays in addition to the network's parameters: they convert the run's normalization of images to the
teacher's."""


class _Teacher(NamedTuple):
    info: WeightsInfo
    graphdef: GraphDef
    params: Params
    batch_stats: BatchStats


def teacher_arrays(
    path: str, class_names: Sequence[str], mean: tuple[float, ...], std: tuple[float, ...]
) -> dict[str, jax.Array]:
    """The arrays that `teacher_logits` needs, for the normalization and the order of the classes of a run.

    Args:
      path: path of a weight file, or other weights that `open_weights` takes.
      class_names: class names of the run, in the order of its labels.
      mean: mean of each channel, in grey levels, that is subtracted from the run's images.
      std: standard deviation of each channel, in grey levels, by which they are then divided.

    Raises:
      ConfigError: the file cannot be read or is damaged, or its network has other classes.
    """
    teacher = _read(path)
    stored = jax.device_get(teacher.params | teacher.batch_stats)
    arrays = for_classes(f"teacher {path!r}", teacher.info, stored, class_names, _REMEDY)
    known = teacher.info.preprocessing
    own_mean, own_std = (mean, std) if known is None else (known.mean, known.std)
    scale = np.asarray(std, np.float32) / np.asarray(own_std, np.float32)
    offset = (np.asarray(mean, np.float32) - np.asarray(own_mean, np.float32)) / np.asarray(own_std, np.float32)
    return {name: jnp.asarray(value) for name, value in arrays.items()} | {
        _SCALE: jnp.asarray(scale),
        _OFFSET: jnp.asarray(offset),
    }


def teacher_logits(path: str, images: jax.Array, arrays: dict[str, jax.Array]) -> jax.Array:
    """(N, num_classes) float32 logits of the teacher, without a gradient.

    Args:
      path: path of the weight file, for the structure of the network.
      images: (N, H, W, 3), as the student gets them.
      arrays: result of `teacher_arrays`.
    """
    teacher = _read(path)
    params, batch_stats = ({name: arrays[name] for name in part} for part in (teacher.params, teacher.batch_stats))
    model = merge(teacher.graphdef, params, batch_stats)
    logits = model(images.astype(jnp.float32) * arrays[_SCALE] + arrays[_OFFSET])
    return jax.lax.stop_gradient(logits).astype(jnp.float32)


def _read(path: str) -> _Teacher:
    is_here = hub_name(path) is None and bucket_url("objective.teacher", path) is None
    file = local_path("objective.teacher", path) if is_here else None
    stat = file.stat() if file is not None and file.is_file() else None  # `open_weights` reports a missing file
    return _read_once(path, None if stat is None else (stat.st_mtime_ns, stat.st_size))


@functools.lru_cache(maxsize=1)
def _read_once(path: str, version: tuple[int, int] | None) -> _Teacher:
    del version  # part of the cache's key, so that another file with the same name is read
    info, arrays = open_weights(path, field="objective.teacher")
    with jax.ensure_compile_time_eval():  # the first call may be within the tracing of a step
        model = nfnet_flax.weights.network_of(f"teacher {path!r}", info, arrays)
        if model.is_foldable:
            model = fold(model)  # standardized once instead of in every step
        return _Teacher(info, *split(model))
