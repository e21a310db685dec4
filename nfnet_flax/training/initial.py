"""The weights that a run starts from: out of a weight file or of another run, for the classes of its own images."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from flax import nnx

from nfnet_flax.config import ConfigError
from nfnet_flax.models import build_model
from nfnet_flax.parallel.processes import Processes, check_agreement
from nfnet_flax.paths import local_path, run_folder
from nfnet_flax.recipe import Recipe
from nfnet_flax.training.reading import Run, stored_weights
from nfnet_flax.weights.entries import HostArrays
from nfnet_flax.weights.heads import for_classes
from nfnet_flax.weights.portable import fitting_arrays, read_weights

_REMEDY = "let the head start at random (--init-from-skip 'head.*'), or give images of the same classes"


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """What a run starts from before its first update."""

    arrays: HostArrays
    """By the names of the network; those that it lacks are random."""
    record: dict[str, str] | None = None
    """What `init_from` gave, for the record in the run's folder: `source`, and `content`, a digest; None without it."""
    said: str | None = None
    """A line for the user."""


def initial_weights(recipe: Recipe, class_names: Sequence[str]) -> InitialWeights:
    """What `init_from` gives; no arrays without it.

    Args:
      recipe: `init_from` is a weight file, or the folder of a run, whose newest checkpoint's EMA is taken. Of another
        checkpoint, or raw, `nfnet convert run` makes a file.
      class_names: of the run, in the order of its labels. Where the stored head has the same ones in another order, its
        outputs are put into the run's order.

    Raises:
      ConfigError: the weights cannot be read, do not fit the network, or their head is of other classes.
      StorageFailed: the folder cannot be read.
    """
    if recipe.init_from is None:
        return InitialWeights(arrays={})
    path = local_path("init_from", recipe.init_from)
    if path.is_dir():
        info, stored = stored_weights(Run(run_folder("init_from", path)), "ema", "newest")
    else:
        info, stored = read_weights(path)
    model = nnx.eval_shape(lambda: build_model(recipe.model, num_classes=recipe.num_classes, rngs=nnx.Rngs(0)))
    source = f"init_from {str(path)!r}"
    arrays = fitting_arrays(source, info, stored, model, recipe.init_from_skip)
    arrays = for_classes(source, info, arrays, class_names, _REMEDY)
    known, data = info.preprocessing, recipe.data
    return InitialWeights(
        arrays=arrays,
        record={"source": info.source, "content": content_of(arrays)},
        said=None if known is None else known.normalisation_change(source, data.mean, data.std),
    )


def content_of(arrays: Mapping[str, np.ndarray]) -> str:
    """A digest of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:32]


def check_same_start(processes: Processes, recipe: Recipe, initial: InitialWeights | None, *, timeout_s: float) -> None:
    """Checks that all processes start from the same weights; each has read them by itself.

    Args:
      processes: of this run.
      recipe: names the weights in the message.
      initial: of `initial_weights`; None where this process finds a checkpoint, from which the run goes on.
      timeout_s: longest wait for the others.

    Raises:
      ConfigError: they differ, or a process did not say in time. All processes raise it.
    """
    if processes.count == 1:
        return
    if initial is None:
        start = "the newest checkpoint in the workdir"
    else:
        start = "random parameters" if initial.record is None else f"content {initial.record['content']}"
    try:
        check_agreement(processes, "start", {"start": start}, timeout_s)
    except ConfigError as error:
        raise ConfigError(f"init_from = {recipe.init_from!r}: {error}") from error
