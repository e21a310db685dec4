"""The rule for labels: a label stands for the name of a class, and the labels of every split follow the class names.

The list of a run's class names is fixed when the run begins. The numbers of a split cannot be used as they are: a split
in which a class was renamed, added or left out numbers its classes differently.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from nfnet_flax.config import ConfigError, require
from nfnet_flax.data.random_access import (
    Copies,
    Record,
    Source,
    Split,
    Unused,
    begin_copying,
    copies_of,
    digest,
    read_ahead,
)
from nfnet_flax.units import shown


def label_table(own: Sequence[str], wanted: Sequence[str], split: Split) -> np.ndarray:
    """The label in the wanted list for each of a split's own classes.

    Args:
      own: class names of the split, in the order of its own labels. Some of `wanted` may be missing.
      wanted: class names of the run, in the order of its labels.
      split: name of the split, for the message.

    Returns:
      (len(own),) int32.

    Raises:
      ConfigError: a name of `own` is not in `wanted`.
    """
    label_of = {name: label for label, name in enumerate(wanted)}
    if unknown := [name for name in own if name not in label_of]:
        raise ConfigError(
            f"{split} split: class {unknown[0]!r} is unknown ({len(unknown)} of the {len(own)} classes of this split "
            f"are); known are {shown(wanted)}: rename or remove it, or begin a new run with a training set that has it"
        )
    return np.array([label_of[name] for name in own], np.int32)


def spare_outputs(num_classes: int, class_names: Sequence[str]) -> str | None:
    """A message about a network with more outputs than classes; None if each output has a class."""
    spare = num_classes - len(class_names)
    if spare <= 0:
        return None
    return (
        f"{len(class_names)} classes, {num_classes} outputs: no image has the label of the last {spare}; without them, "
        f"num_classes would be {len(class_names)}"
    )


def with_classes(source: Source, class_names: Sequence[str], split: Split, *, is_checked: bool = True) -> Source:
    """A source whose labels are those of `class_names`.

    Args:
      source: a source with its own list of classes.
      class_names: the wanted class names, in the order of the labels.
      split: name of the split, for messages.
      is_checked: whether the source is known to return only labels of its classes. If so, and if it has exactly the
        wanted classes, it is returned unchanged; otherwise each label is checked when its example is read.

    Raises:
      ConfigError: as for `label_table`.
    """
    names = tuple(class_names)
    table = label_table(source.class_names, names, split)
    if is_checked and source.class_names == names:
        return source
    return _Relabelled(source, names, tuple(map(int, table)))


@dataclasses.dataclass(frozen=True)
class _Relabelled:
    """Another source with the labels of another list of classes."""

    source: Source
    class_names: tuple[str, ...]
    table: tuple[int, ...]
    """New label of each old one."""

    @property
    def unused(self) -> tuple[Unused, ...]:
        return self.source.unused

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        record = self.source[index]
        if np.ndim(record["label"]) == 1:  # zeros and ones, one number for each class
            row = np.zeros(len(self.class_names), np.uint8)
            row[list(self.table)] = record["label"]
            return {**record, "label": row}
        label = int(record["label"])
        remedy = f"of {self.source.describe(index)}: must be the number of a class, from 0 to {len(self.table) - 1}"
        require(0 <= label < len(self.table), "label", label, remedy)
        return {**record, "label": np.int32(self.table[label])}

    def fingerprint(self) -> str:
        return digest("classes", self.source.fingerprint(), *self.class_names)

    def contents(self) -> str:
        return self.source.contents()

    def describe(self, index: int) -> str:
        return self.source.describe(index)

    def read_ahead(self, indexes: Iterable[int]) -> None:
        """See `Prepares`."""
        read_ahead(self.source, indexes)

    def begin_copying(self, order: Iterable[int]) -> Callable[[], None]:
        """See `Prepares`."""
        return begin_copying(self.source, order)

    def copies(self) -> Copies | None:
        """See `Prepares`."""
        return copies_of(self.source)
