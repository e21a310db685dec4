"""The weights that a run starts from: those of a weight file or of another run, for the classes of its own images."""

import dataclasses
import fnmatch
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from flax import nnx

from nfnet_flax.config import ConfigError
from nfnet_flax.models import Classifier, build_model
from nfnet_flax.parallel.processes import Processes, check_agreement
from nfnet_flax.recipe import Recipe
from nfnet_flax.training.reading import weights_of
from nfnet_flax.weights.entries import HostArrays, shapes_of
from nfnet_flax.weights.heads import for_classes
from nfnet_flax.weights.portable import fitting_arrays

_REMEDY = "let the head start at random (--init-from-skip 'head.*'), or give images of the same classes"


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """The weights of a run before its first update."""

    arrays: HostArrays
    """Name of a parameter or running statistic -> its value; those that are not named are random."""
    record: dict[str, str] | None = None
    """Record of `init_from` for the run's folder: `source`, and `content`, a digest of the weights; None without it."""
    said: str | None = None
    """A message for the user; None: there is none."""


def initial_weights(recipe: Recipe, class_names: Sequence[str]) -> InitialWeights:
    """Reads the weights that `init_from` names, and makes those that `init_to_zero` names.

    Args:
      recipe: the recipe. For another checkpoint of a run than its newest, or for raw parameters, make a file with
        `nfnet convert run`.
      class_names: class names of the run, in the order of its labels. If the stored head has the same classes in
        another order, its outputs are reordered.

    Raises:
      ConfigError: the weights cannot be read, do not fit the network, or their head has other classes; or a pattern
        matches no parameter.
      StorageFailed: the folder cannot be read.
      HubUnreachable: the model hub cannot be reached.
    """
    if recipe.init_from is None and not recipe.init_to_zero:
        return InitialWeights(arrays={})
    model = nnx.eval_shape(lambda: build_model(recipe.model, num_classes=recipe.num_classes, rngs=nnx.Rngs(0)))
    zeros = _zeros(recipe, model)
    if recipe.init_from is None:
        return InitialWeights(arrays=zeros)
    info, stored = weights_of(recipe.init_from, field="init_from")
    source = f"init_from {recipe.init_from!r}"
    arrays = fitting_arrays(source, info, stored, model, (*recipe.init_from_skip, *recipe.init_to_zero))
    arrays = for_classes(source, info, arrays, class_names, _REMEDY) | zeros
    known, data = info.preprocessing, recipe.data
    return InitialWeights(
        arrays=arrays,
        record={"source": info.source, "content": content_of(arrays)},
        said=None if known is None else known.normalisation_change(source, data.mean, data.std),
    )


def _zeros(recipe: Recipe, model: Classifier) -> HostArrays:
    """Zeros for the parameters of `init_to_zero`."""
    found: HostArrays = {}
    for pattern in recipe.init_to_zero:
        shapes = {name: shape for name, (shape, _) in shapes_of(model).items() if fnmatch.fnmatchcase(name, pattern)}
        if not shapes:
            raise ConfigError(f"init_to_zero: pattern {pattern!r} matches no parameter; names look like 'head.kernel'")
        found |= {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    return found


def content_of(arrays: Mapping[str, np.ndarray]) -> str:
    """A digest of the names, types, shapes and values of arrays."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:32]


def check_same_start(processes: Processes, recipe: Recipe, initial: InitialWeights | None, *, timeout_s: float) -> None:
    """Checks that all processes start from the same weights, which each process has read.

    Args:
      processes: the processes of this run.
      recipe: the recipe, which names the weights in the message.
      initial: result of `initial_weights`; None if this process finds a checkpoint, from which the run continues.
      timeout_s: longest wait for the others, in seconds.

    Raises:
      ConfigError: the weights differ, or a process did not report in time. All processes raise it.
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
