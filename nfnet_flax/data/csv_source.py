"""Image files that a CSV file lists, with one or several classes for each image."""

import codecs
import dataclasses
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, ClassVar, Self

import numpy as np

from nfnet_flax.config import Column, ConfigError, File, Folder, Name, Shown, require
from nfnet_flax.data.buckets import refuse_images
from nfnet_flax.data.csv_table import Columns, Row, read_table
from nfnet_flax.data.random_access import Record, SourceConfig, Split, Unused, check_index, digest
from nfnet_flax.paths import check_path, local_path
from nfnet_flax.progress import tracking
from nfnet_flax.units import shown

# Asking for the size of a file means waiting for the disk or the network, so many are asked for at once.
_NUM_SCAN_THREADS = 16
_FILES_PER_TASK = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class CsvSource(SourceConfig):
    """Image files that a CSV file lists: a column has the file's name, another one its class.

    The held-out images are those of `eval_file`, or the rows of `file` that `split_column` marks, or training images
    that `data.num_held_out` leaves out.
    """

    place_fields: ClassVar[tuple[str, ...]] = ("file", "eval_file", "root")

    file: File
    """CSV file whose first line names the columns; `~` is the home folder."""
    eval_file: File | None = None
    """CSV file of the held-out images, with the same columns; None: `file` lists them, too, or there are none."""
    root: Folder | None = None
    """Folder from which the names of images start; None: the folder of the CSV file."""
    image: Column = "image"
    """Name of the column with the names of the image files."""
    suffix: str = ""
    """Text that is added to each name of an image, such as `.jpg` if the file lists names without it."""
    label: Column = "label"
    """Name of the column with the class, or with several classes and a separator between them."""
    separator: str | None = None
    """Text between the classes of one image, such as a space; labels are then rows of zeros and ones. None: each image
    has one class."""
    allow_none: bool = False
    """Whether an image may have none of the classes, which needs a separator; otherwise an empty label is an error."""
    split_column: Column | None = None
    """Name of the column that says to which split an image belongs; None: there is none."""
    train_split: str = "train"
    """What this column contains for training images."""
    eval_split: str = "val"
    """What this column contains for held-out images."""
    class_names: tuple[Name, ...] = ()
    """Names of the classes, in the order of the labels; empty: those of the training images, sorted."""
    delimiter: Annotated[str, Shown("CHARACTER")] = ","
    """Character between two cells of a line."""
    encoding: Name = "utf-8"
    """Encoding of the file; not used for a file that begins with a byte order mark."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.place_fields:
            if (value := getattr(self, name)) is not None:
                refuse_images(f"source.{name}", value)
                check_path(f"source.{name}", value)
        require(len(self.delimiter) == 1, "source.delimiter", self.delimiter, "must be one character")
        require(self.separator != "", "source.separator", self.separator, "must not be empty; None: one class")
        is_known = len(set(self.class_names)) == len(self.class_names) and "" not in self.class_names
        require(is_known, "source.class_names", self.class_names, "must all be different, and not empty")
        remedy = "needs source.separator, which says that an image may have several classes"
        require(not self.allow_none or self.is_multi_label, "source.allow_none", self.allow_none, remedy)
        remedy = "give source.split_column or this, not both"
        require(self.split_column is None or self.eval_file is None, "source.eval_file", self.eval_file, remedy)
        remedy = "must differ from source.train_split"
        is_other = self.split_column is None or self.eval_split != self.train_split
        require(is_other, "source.eval_split", self.eval_split, remedy)
        try:
            codecs.lookup(self.encoding)
        except LookupError as error:
            raise ConfigError(f"source.encoding = {self.encoding!r}: is not known: give utf-8 or latin-1") from error

    @property
    def is_multi_label(self) -> bool:
        return self.separator is not None

    def open(self, split: Split, image_size: int) -> "ListedImages":
        del image_size  # files of any size
        rows, unused = self._rows(split)
        kind = MultiLabelImages if self.is_multi_label else ListedImages
        return kind(self._table(split), self._root(split), self.suffix, rows, self._classes(split, rows), unused)

    def training_classes(self, image_size: int) -> tuple[str, ...]:
        del image_size
        return self._classes("train", self._rows("train")[0])

    def with_training_of(self, trained: SourceConfig) -> Self:
        if not isinstance(trained, CsvSource) or self.split_column is not None:
            return self
        # Without `root`, names start from the folder of the file, and so they do if only the file is replaced.
        return self if self.eval_file is None else dataclasses.replace(self, file=trained.file)

    def check_splits(self) -> None:
        if self.eval_file is None and self.split_column is None:
            return
        if self.eval_file is not None and self._table("train") == self._table("eval"):
            raise ConfigError(
                f"source.file = {self.file!r} and source.eval_file = {self.eval_file!r} are one file: an evaluation on "
                "training images means nothing; give another file, or hold images out by --data.num-held-out"
            )
        if not self._table("train").exists():
            return  # a run is evaluated where its training images are not
        trained = {self._path("train", row): row.line for row in self._rows("train")[0]}
        both = [(row.line, line) for row in self._rows("eval")[0] if (line := trained.get(self._path("eval", row)))]
        if both:
            raise ConfigError(
                f"{str(self._table('eval'))!r}, line {both[0][0]}: is a training image, too (line {both[0][1]} of "
                f"{str(self._table('train'))!r}), as are {len(both)} held-out images in all: remove them from one split"
            )

    def _table(self, split: Split) -> Path:
        if split == "eval" and self.eval_file is not None:
            return local_path("source.eval_file", self.eval_file)
        return local_path("source.file", self.file)

    def _root(self, split: Split) -> Path:
        return self._table(split).parent if self.root is None else local_path("source.root", self.root)

    def _path(self, split: Split, row: Row) -> str:
        return os.path.normpath(os.path.join(self._root(split), row.image + self.suffix))

    def _rows(self, split: Split) -> tuple[list[Row], tuple[Unused, ...]]:
        """The rows of a split, each image once, in a fixed order; and what is not used."""
        if split == "eval" and self.eval_file is None and self.split_column is None:
            raise ConfigError(
                f"{str(self._table('train'))!r} does not say which images are held out: give --data.source.eval-file "
                "FILE or --data.source.split-column NAME; a run that has not begun can hold out training images by "
                "--data.num-held-out 1000"
            )
        path = self._table(split)
        columns = Columns(
            self.image, self.label, self.split_column, self.separator, self.delimiter, self.encoding, self.allow_none
        )
        with tracking(f"reading {path}"):
            rows, unused = read_table(path, columns), []
            if self.split_column is not None:
                rows, other = self._of_split(path, rows, split)
                unused += other
            rows, repeated = _each_once(path, rows)
            # As in a folder: the first images, which may be held out, shall be of all classes (`fixed_order`).
            rows.sort(key=lambda row: (hashlib.blake2b(row.image.encode(), digest_size=8).digest(), row.image))
        return rows, (*unused, *repeated)

    def _of_split(self, path: Path, rows: list[Row], split: Split) -> tuple[list[Row], list[Unused]]:
        wanted, other = (self.train_split, self.eval_split)[:: 1 if split == "train" else -1]
        found = Counter(row.split for row in rows)
        if not found[wanted]:
            raise ConfigError(
                f"{str(path)!r}: column {self.split_column!r} never contains {wanted!r}, but {shown(list(found))}: "
                f"give --data.source.{split}-split"
            )
        rest = [row for row in rows if row.split not in (wanted, other)]
        unused = []
        if rest:
            names = ", ".join(sorted({repr(row.split) for row in rest})[:5])
            unused.append(Unused(len(rest), f"{path}: not used are {len(rest)} rows of other splits: {names}"))
        return [row for row in rows if row.split == wanted], unused

    def _classes(self, split: Split, rows: list[Row]) -> tuple[str, ...]:
        if not self.class_names:
            return tuple(sorted({label for row in rows for label in row.labels}))
        known = set(self.class_names)
        for row in rows:
            if unknown := [label for label in row.labels if label not in known]:
                raise ConfigError(
                    f"{str(self._table(split))!r}, line {row.line}: class {unknown[0]!r} is none of "
                    f"source.class_names: {shown(self.class_names)}: correct the cell, or add the class"
                )
        return self.class_names


def _each_once(path: Path, rows: list[Row]) -> tuple[list[Row], list[Unused]]:
    """The rows without those that repeat an earlier one."""
    first: dict[str, Row] = {}
    repeated = []
    for row in rows:
        known = first.setdefault(row.image, row)
        if known.labels != row.labels:
            remedy = "give each image one line; for several classes, give --data.source.separator"
            raise ConfigError(
                f"{str(path)!r}, line {row.line}: image {row.image!r} has other classes than in line {known.line} "
                f"({shown(row.labels)}; {shown(known.labels)}): {remedy}"
            )
        if known is not row:
            repeated.append(row)
    if not repeated:
        return rows, []
    text = f"{path}: not used are {len(repeated)} rows that repeat an earlier one, such as line {repeated[0].line}"
    return list(first.values()), [Unused(len(repeated), text)]


class ListedImages:
    """A split of the images of a CSV file; images stay encoded."""

    def __init__(
        self,
        table: Path,
        root: Path,
        suffix: str,
        rows: Sequence[Row],
        class_names: tuple[str, ...],
        unused: tuple[Unused, ...],
    ) -> None:
        """Looks for all files.

        Args:
          table: CSV file, for messages.
          root: folder from which the names of images start.
          suffix: text that is added to each name.
          rows: rows of the split, in the order of the examples.
          class_names: names of the classes, in the order of the labels.
          unused: what is not used.

        Raises:
          ConfigError: a file is missing, or no row has a class.
          OSError: the disk or the network failed.
        """
        self.class_names, self.unused = class_names, unused
        if not class_names:
            raise ConfigError(f"{str(table)!r}: no image has a class: give --data.source.label")
        self._root, self._suffix = str(root), suffix
        # As arrays, as lists of a million strings and tuples would take several times the memory in every worker.
        self._names = np.array([os.fsencode(row.image) for row in rows], dtype=bytes)
        label_of = {name: label for label, name in enumerate(class_names)}
        self._labels = np.array([label_of[name] for row in rows for name in row.labels], np.int32)
        self._starts = np.cumsum([0, *(len(row.labels) for row in rows)])
        self._contents = digest("sizes", _sizes(table, rows, [self.describe(i) for i in range(len(rows))]).tobytes())

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Record:
        with open(self.describe(index), "rb") as file:
            return {"image": file.read(), "label": self._label(index)}

    def _label(self, index: int) -> np.int32:
        label: np.int32 = self._labels[index]
        return label

    def fingerprint(self) -> str:
        """Digest of the classes, and of the names, labels and order of the images."""
        labels = (self._labels.tobytes(), self._starts.tobytes())
        return digest("csv", *self.class_names, self._suffix, str(self._names.dtype), self._names.tobytes(), *labels)

    def contents(self) -> str:
        """Digest of the files' sizes."""
        return self._contents

    def describe(self, index: int) -> str:
        index = check_index(index, len(self))
        return os.path.join(self._root, os.fsdecode(self._names[index]) + self._suffix)


class MultiLabelImages(ListedImages):
    """The same with labels that are rows of zeros and ones, one number for each class."""

    def __getitem__(self, index: int) -> Record:
        with open(self.describe(index), "rb") as file:
            label = np.zeros(len(self.class_names), np.uint8)
            label[self._labels[self._starts[index] : self._starts[index + 1]]] = 1
            return {"image": file.read(), "label": label}


def _sizes(table: Path, rows: Sequence[Row], paths: list[str]) -> np.ndarray:
    """(N,) int64: size of each image file, in bytes."""

    def sizes_of(start: int) -> list[int]:
        return [_size(path) for path in paths[start : start + _FILES_PER_TASK]]

    found: list[int] = []
    with (
        tracking(f"looking for the images of {table}", len(paths), "images") as task,
        ThreadPoolExecutor(_NUM_SCAN_THREADS) as threads,
    ):
        for part in threads.map(sizes_of, range(0, len(paths), _FILES_PER_TASK)):
            found += part
            task.advance(len(part))
    sizes = np.array(found, np.int64)
    if np.any(missing := sizes < 0):
        index = int(np.argmin(np.where(missing, [row.line for row in rows], np.iinfo(np.int64).max)))
        hint = "; the names have backslashes, write slashes" if "\\" in rows[index].image else ""
        raise ConfigError(
            f"{str(table)!r}, line {rows[index].line}: {paths[index]!r} is no file that can be found, as are "
            f"{np.sum(missing)} of the {len(rows)} images: give the folder of the images by --data.source.root (and "
            f"--data.source.suffix .jpg if the names lack it), or correct the names{hint}"
        )
    return sizes


def _size(path: str) -> int:
    """Size of a file; -1 if there is none."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return -1
    return found.st_size if stat.S_ISREG(found.st_mode) else -1
