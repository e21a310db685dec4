"""Which output of a network is right for an image, where this is not simply the class of the image's folder.

The label sets of ImageNet that are evaluated besides its own are covered by small files that the user gives: ReaL
(several right labels for an image), ImageNet-A and ImageNet-R (a part of the classes) and ImageNet-V2 (folders that are
named by the number of the class).
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from nfnet_flax.config import ConfigError, FileIfAny, check_types, require
from nfnet_flax.data.random_access import Record, Source, Unused, check_index, digest
from nfnet_flax.messages import warn
from nfnet_flax.paths import check_path, local_path
from nfnet_flax.units import shown

_VALIDATION_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})")
"""Name of an image of ImageNet's validation set; images are numbered from 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelSet:
    """How labels are found; by default, the name of an image's class is the name of the right output."""

    labels: FileIfAny = None
    """File of ReaL (`real.json`): a JSON list with a list of right class numbers for each image of ImageNet's
    validation set. Images are found by the number in their names, ILSVRC2012_val_00000001.JPEG; those without a label
    are left out. The classes of the set itself are then not used."""
    classes: FileIfAny = None
    """File with one class name per line, as for ImageNet-A and ImageNet-R: the other outputs of the network are left
    out before the best ones are chosen, and before the softmax."""
    class_names: FileIfAny = None
    """File with one class name per line: the names of the network's outputs, in order. They replace those that the
    weights have."""
    class_numbers: bool = False
    """Whether the set's classes are named by the numbers of the outputs, 0 to N - 1, as in ImageNet-V2. Without this,
    numbers are names like all others."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("labels", "classes", "class_names"):
            value = vars(self)[name]
            if value is not None:
                check_path(name, value)
        for name, given in (("classes", self.classes is not None), ("class_numbers", self.class_numbers)):
            remedy = "is of no use with labels, which say what is right for each image: leave one of them out"
            require(self.labels is None or not given, name, vars(self)[name], remedy)


@dataclasses.dataclass(frozen=True)
class Labelled:
    """The images of an evaluation, and which outputs are right for them."""

    source: Source
    """The images; unless `right` is given, their labels are numbers of outputs."""
    names: tuple[str, ...]
    """Name of each output of the network."""
    right: tuple[tuple[int, ...], ...] | None = None
    """For each image, the numbers of the right outputs, at least one; None: the label of the image alone."""
    allowed: tuple[int, ...] | None = None
    """Numbers of the outputs that count, sorted; None: all."""
    num_unlabelled: int = 0
    """Number of images that were left out because no output is right for them."""


def open_labelled(
    label_set: LabelSet,
    *,
    names: Sequence[str] | None,
    num_outputs: int,
    own_names: Callable[[], Sequence[str]],
    open_named: Callable[[Sequence[str]], Source],
) -> Labelled:
    """The images of a set, with the right outputs of a network.

    If the names of the outputs are not known, the set must have as many classes as the network has outputs, and they
    are taken in the order of their names, which a warning says.

    Args:
      label_set: how labels are found.
      names: names of the outputs, in order; there may be fewer than outputs; None: not known.
      num_outputs: number of outputs of the network.
      own_names: gives the names of the set's classes.
      open_named: opens the set with labels that follow the given names.

    Raises:
      ConfigError: a file cannot be read or does not fit, or the set has a class that is not known.
      InputFailed: the disk or the network failed.
    """
    if label_set.class_names is not None:
        given = _names_in("class_names", label_set.class_names)
        remedy = (
            f"has {len(given)} names, but the network has {num_outputs} outputs: give one name for each output, in "
            "order; to leave outputs out, give --classes"
        )
        require(len(given) == num_outputs, "class_names", label_set.class_names, remedy)
        if names is not None and given[: len(names)] != tuple(names):
            warn(f"class_names: {label_set.class_names} replaces the names that the weights have: {shown(names)}")
        names = given
    if label_set.labels is not None:
        opened = open_named(own_names())
        chosen, right = _right_of(label_set.labels, opened, num_outputs)
        return Labelled(Chosen(opened, chosen), _completed(names, num_outputs), right, None, len(opened) - len(chosen))
    numbers = tuple(map(str, range(num_outputs)))
    if names is None and not label_set.class_numbers:
        names = _in_order(own_names(), num_outputs)
    wanted = numbers if label_set.class_numbers or names is None else names
    try:
        source = open_named(wanted)
    except ConfigError as error:
        if wanted is not numbers and (own := _numbers(own_names)) and all(name in numbers for name in own):
            raise ConfigError(
                f"{error}; if its classes are named by the numbers of outputs, give --class-numbers"
            ) from (error)
        raise
    named = _completed(names, num_outputs)
    if label_set.classes is None:
        return Labelled(source, named)
    allowed = _allowed(label_set.classes, named)
    label_of = {name: label for label, name in enumerate(wanted)}
    for name in own_names():
        remedy = f"does not name class {name!r}, which the set has: add it, or leave it out of the set"
        require(label_of[name] in allowed, "classes", label_set.classes, remedy)
    return Labelled(source, named, None, allowed)


def _numbers(own_names: Callable[[], Sequence[str]]) -> Sequence[str]:
    """The names of the set's classes if all of them are numbers."""
    try:
        own = own_names()
    except ConfigError:  # the set itself cannot be opened: that is the error to report
        return ()
    return own if all(name.isdecimal() for name in own) else ()


def _in_order(own: Sequence[str], num_outputs: int) -> tuple[str, ...]:
    """Class names of a set as the names of a network's outputs, which are not known."""
    remedy = "give them by --class-names FILE, one name per line in the order of the outputs"
    if all(name.isdecimal() for name in own):  # sorted as text: 0, 1, 10, 100, 2
        raise ConfigError(
            f"the weights have no class names, and the set's classes are numbers ({shown(own)}): if they are the "
            f"numbers of the outputs, give --class-numbers; otherwise {remedy}"
        )
    if len(own) != num_outputs:
        raise ConfigError(
            f"the weights have {num_outputs} outputs and no class names, and the set has {len(own)} classes: {remedy}"
        )
    warn(
        f"the weights have no class names: the {num_outputs} classes of the set, in the order of their names "
        f"({shown(own)}), are taken for the outputs in order; if they are not, {remedy}"
    )
    return tuple(own)


def _completed(names: Sequence[str] | None, num_outputs: int) -> tuple[str, ...]:
    """A name for each output; outputs without a name get their number."""
    known = tuple(names or ())
    rest = range(len(known), num_outputs)
    return known + tuple(f"output {number}" if known else str(number) for number in rest)


def _text_of(field: str, file: str) -> str:
    try:
        return local_path(field, file).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{field} = {file!r} cannot be read: {error}") from error


def _names_in(field: str, file: str) -> tuple[str, ...]:
    """The lines of a file, without blanks around them and without empty lines."""
    names = tuple(line.strip() for line in _text_of(field, file).splitlines() if line.strip())
    require(len(names) > 0, field, file, "holds no class name: give one per line")
    name, count = Counter(names).most_common(1)[0]
    require(count == 1, field, file, f"names {name!r} {count} times: each name must stand for one output")
    return names


def _allowed(file: str, names: Sequence[str]) -> tuple[int, ...]:
    """Numbers of the outputs whose names a file lists."""
    label_of = {name: label for label, name in enumerate(names)}
    listed = _names_in("classes", file)
    unknown = [name for name in listed if name not in label_of]
    remedy = f"names {shown(unknown)}, which is the name of no output; known are {shown(names)}"
    require(not unknown, "classes", file, remedy)
    return tuple(sorted(label_of[name] for name in listed))


def _right_of(file: str, source: Source, num_outputs: int) -> tuple[np.ndarray, tuple[tuple[int, ...], ...]]:
    """Indexes of the images that have labels in ReaL's file, and these labels."""
    labels = _labels_in(file, num_outputs)
    chosen, right = [], []
    for index in range(len(source)):
        found = _VALIDATION_IMAGE.findall(source.describe(index))
        if not found:
            raise ConfigError(
                f"labels = {file!r}: {source.describe(index)!r} is not named like an image of ImageNet's validation "
                "set, ILSVRC2012_val_00000001.JPEG, by whose number its labels are found"
            )
        number = int(found[-1])
        remedy = f"has labels for {len(labels)} images, but the set has {source.describe(index)!r}"
        require(1 <= number <= len(labels), "labels", file, remedy)
        if labels[number - 1]:
            chosen.append(index)
            right.append(labels[number - 1])
    require(len(chosen) > 0, "labels", file, f"has no label for any of the {len(source)} images of the set")
    return np.asarray(chosen, np.int64), tuple(right)


def _labels_in(file: str, num_outputs: int) -> list[tuple[int, ...]]:
    try:
        found = json.loads(_text_of("labels", file))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"labels = {file!r}: is no JSON: {error}") from error
    remedy = "must be a JSON list with a list of class numbers for each image, like ReaL's real.json"
    require(isinstance(found, list) and len(found) > 0, "labels", file, remedy)
    for number, entry in enumerate(found, 1):
        is_list = isinstance(entry, list) and all(type(label) is int for label in entry)
        require(is_list, "labels", file, f"{remedy}; entry {number} is {entry!r}")
        wrong = [label for label in entry if not 0 <= label < num_outputs]
        require(
            not wrong, "labels", file, f"entry {number} has label {wrong[:1]}; the network has {num_outputs} outputs"
        )
    return [tuple(dict.fromkeys(entry)) for entry in found]


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Some examples of another source."""

    source: Source
    """The other source, with all examples."""
    indexes: np.ndarray
    """(N,) int64: indexes of the examples, each of them once."""

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    @property
    def unused(self) -> tuple[Unused, ...]:
        return self.source.unused

    def __len__(self) -> int:
        return len(self.indexes)

    def __getitem__(self, index: int) -> Record:
        return self.source[int(self.indexes[check_index(index, len(self))])]

    def fingerprint(self) -> str:
        return digest(self.source.fingerprint(), self.indexes.tobytes())

    def contents(self) -> str:
        return self.source.contents()

    def describe(self, index: int) -> str:
        return self.source.describe(int(self.indexes[check_index(index, len(self))]))
