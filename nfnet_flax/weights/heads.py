"""Reorders the outputs of a head by the names of their classes."""

from collections.abc import Sequence

import numpy as np

from nfnet_flax.config import ConfigError
from nfnet_flax.units import shown
from nfnet_flax.weights.entries import HostArrays
from nfnet_flax.weights.portable import WeightsInfo


def for_classes(
    source: str, info: WeightsInfo, arrays: HostArrays, class_names: Sequence[str], remedy: str
) -> HostArrays:
    """The arrays, with the outputs of the head in the order of `class_names`.

    Args:
      source: description of where the weights come from, for the message of an error.
      info: description of the weights; if its class names are not known, they are assumed to be `class_names`.
      arrays: our name -> array; the head may be missing.
      class_names: the wanted class names. If the stored head has the same classes in another order, its outputs are
        reordered.
      remedy: end of the message of an error.

    Raises:
      ConfigError: the head has other classes.
    """
    head = [name for name in arrays if name.startswith("head.")]
    known = info.class_names
    if not head or known is None or known[: len(class_names)] == tuple(class_names):
        return arrays
    if set(known) != set(class_names):
        new, gone = ([name for name in a if name not in b] for a, b in ((class_names, known), (known, class_names)))
        lines = [f"  {text}: {shown(names)}" for text, names in (("new", new), ("gone", gone)) if names]
        raise ConfigError(
            f"{source} is of other classes than the training images:\n"
            + "".join(f"{line}\n" for line in lines)
            + remedy
        )
    order = [known.index(name) for name in class_names] + list(range(len(known), info.num_classes))
    return arrays | {name: np.take(arrays[name], order, axis=-1) for name in head}
