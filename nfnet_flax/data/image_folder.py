"""Image files in one folder per class."""

import dataclasses
import errno
import os
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar, NamedTuple, Self

import numpy as np

from nfnet_flax.config import ConfigError, Folder
from nfnet_flax.data.buckets import refuse_images
from nfnet_flax.data.random_access import (
    Record,
    SourceConfig,
    Split,
    Unused,
    check_index,
    digest,
    fixed_order,
)
from nfnet_flax.paths import check_path, local_path
from nfnet_flax.progress import track, tracking

_LAYOUT = "expected are image files in one folder per class, such as train/n01440764/n01440764_18.JPEG"
# Listing a folder means waiting for the disk or the network, so many are listed at once.
_NUM_SCAN_THREADS = 16

# Why something that lies in a split is not used.
_HIDDEN = "hidden files or folders"
_BESIDE = "files beside the class folders"
_OTHER_NAME = "files whose names end in none of {}"
_NESTED = "files in sub-folders of a class folder (only what lies directly in it is read)"
_DANGLING = "links to files that are not there"
_SPECIAL = "things that are neither files nor folders"

_Counts = dict[str, tuple[int, str]]
"""Reason why files are not used -> their number, and the path of one of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderSource(SourceConfig):
    """Image files `root/train/class_name/*` and `root/val/class_name/*`; the classes are sorted by name."""

    place_fields: ClassVar[tuple[str, ...]] = ("root", "train", "eval")

    root: Folder
    """Folder that contains the folders of both splits; `~` is the home folder."""
    train: Folder = "train"
    """Folder of the training split within `root`. Its class folders, sorted by name, determine the labels of both
    splits."""
    eval: Folder = "val"
    """Folder of the held-out split within `root`; `.` is `root` itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("root", "train", "eval"):
            refuse_images(f"source.{name}", getattr(self, name))
            check_path(f"source.{name}", getattr(self, name))

    def open(self, split: Split, image_size: int) -> "ImageFolder":
        del image_size  # files of any size
        folder = self.folder(split)
        if split == "eval" and not folder.exists():
            raise ConfigError(
                f"image folder {str(folder)!r} does not exist: give that of the held-out images by "
                "--data.source.eval (a single dot if the folders of the classes lie in source.root itself); a run that "
                "has not begun can hold out training images by --data.num-held-out 1000"
            )
        return ImageFolder(folder)

    def folder(self, split: Split) -> Path:
        """The folder with the images of a split."""
        name = self.train if split == "train" else self.eval
        return local_path(f"source.{split}", local_path("source.root", self.root) / name)

    def training_classes(self, image_size: int) -> tuple[str, ...]:
        del image_size
        return class_folders(self.folder("train"))

    def with_absolute_places(self) -> Self:
        return dataclasses.replace(self, root=os.path.abspath(os.path.expanduser(self.root)))

    def with_training_of(self, trained: SourceConfig) -> Self:
        if not isinstance(trained, FolderSource):
            return self
        return dataclasses.replace(self, train=os.path.join(trained.root, trained.train))

    def check_splits(self) -> None:
        if self.folder("train") == self.folder("eval"):
            raise ConfigError(
                f"source.train = {self.train!r} and source.eval = {self.eval!r} are one folder: an evaluation "
                "on training images means nothing; give another folder of images, or hold images out from the "
                "beginning of a run by --data.num-held-out"
            )

    def check_outside(self, field: str, place: Path) -> None:
        for folder in (self.folder("train"), self.folder("eval")):
            if place.is_relative_to(folder):
                raise ConfigError(
                    f"{field} = {str(place)!r}: lies in the image folder {str(folder)!r}, in which every folder is a "
                    "class: give one outside"
                )


class Scan(NamedTuple):
    """The files in the folder of a split."""

    class_names: tuple[str, ...]
    """Names of the classes, sorted."""
    file_names: np.ndarray
    """(N,) bytes, without folder, in `fixed_order`."""
    labels: np.ndarray
    """(N,) int32."""
    sizes: np.ndarray
    """(N,) int64: size of each file, in bytes."""
    unused: tuple[Unused, ...]
    """Files that are not used, one entry for each reason."""


def class_folders(split_folder: Path) -> tuple[str, ...]:
    """Sorted names of the class folders of a split; hidden ones are skipped.

    Raises:
      ConfigError: there is no such folder, no class in it, or a class folder that cannot be entered.
    """
    return _list_split(split_folder)[0]


def _list_split(split_folder: Path) -> tuple[tuple[str, ...], _Counts]:
    names, unused = [], []
    try:
        with tracking(f"listing {split_folder}"), os.scandir(split_folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    unused.append((_HIDDEN, entry.path))
                elif _is_folder(entry):
                    names.append(entry.name)
                else:
                    unused.append((_BESIDE, entry.path))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"image folder {str(split_folder)!r} does not exist: {_LAYOUT}") from error
    except PermissionError as error:
        raise _not_allowed(error, split_folder) from error
    if not names:
        raise ConfigError(f"image folder {str(split_folder)!r} has no class folder: {_LAYOUT}")
    return tuple(sorted(names)), _counted(unused)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry of a split is a class folder; a broken link is an error, as it might be meant as one."""
    info = _follow(entry)
    if info is None:
        raise ConfigError(
            f"{entry.path!r} is a link to {os.readlink(entry.path)!r}, which is not there (is the disk mounted?): "
            "repair or remove the link; without it, the class would be missing"
        )
    return stat.S_ISDIR(info.st_mode)


def _follow(entry: os.DirEntry[str]) -> os.stat_result | None:
    """The file or folder that an entry leads to, through all links; None for a broken link."""
    try:
        return entry.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            return None
        raise


def _not_allowed(error: PermissionError, folder: Path) -> ConfigError:
    return ConfigError(
        f"{str(error.filename or folder)!r} cannot be read ({error.strerror}): get the permission to read it and to "
        "enter its folder"
    )


def _counted(unused: Iterable[tuple[str, str]]) -> _Counts:
    """Counts pairs of reason and path by reason."""
    counts: _Counts = {}
    for reason, path in unused:
        count, example = counts.get(reason, (0, path))
        counts[reason] = (count + 1, example)
    return counts


def _list_class(folder: Path) -> tuple[list[tuple[bytes, int]], _Counts]:
    """Name and size of each image of a class folder, and the other files in it.

    Raises:
      ConfigError: the folder may not be read, or has no image in it.
    """
    from nfnet_flax.data.decode import IMAGE_SUFFIXES, is_image_name  # imports libraries that a recipe does not need

    images, unused = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                info = None if entry.name.startswith(".") else _follow(entry)
                if entry.name.startswith("."):
                    unused.append((_HIDDEN, entry.path))
                elif info is None:
                    unused.append((_DANGLING, entry.path))
                elif stat.S_ISDIR(info.st_mode):
                    inside = [os.path.join(root, name) for root, _, names in os.walk(entry.path) for name in names]
                    unused += [(_NESTED, path) for path in inside]
                elif not stat.S_ISREG(info.st_mode):
                    unused.append((_SPECIAL, entry.path))
                elif not is_image_name(entry.name):
                    unused.append((_OTHER_NAME.format(" ".join(IMAGE_SUFFIXES)), entry.path))
                else:
                    images.append((os.fsencode(entry.name), info.st_size))
    except PermissionError as error:
        raise _not_allowed(error, folder) from error
    counts = _counted(unused)
    if not images:
        found = "".join(f"; it has {_sentence(*item)}" for item in counts.items())
        raise ConfigError(
            f"class folder {str(folder)!r} has no image in it{found}: add some ({' '.join(IMAGE_SUFFIXES)}), or remove "
            "the folder"
        )
    return images, counts


def _sentence(reason: str, found: tuple[int, str]) -> str:
    count, example = found
    return f"{count} {reason}, such as {example!r}"


def scan(split_folder: Path) -> Scan:
    """Finds the images of a split without opening them: files directly in a class folder that are named like images.

    Args:
      split_folder: folder of the split, with one folder per class.

    Raises:
      ConfigError: the folder is missing, or a class folder cannot be entered or has no images in it.
      OSError: the disk or the network failed.
    """
    class_names, unused = _list_split(split_folder)
    with ThreadPoolExecutor(_NUM_SCAN_THREADS) as threads:
        scanned = threads.map(lambda name: _list_class(split_folder / name), class_names)
        listed = list(track(scanned, f"scanning {split_folder}", "class folders", len(class_names)))
    for _, more in listed:
        for reason, (count, example) in more.items():
            known, first = unused.get(reason, (0, example))
            unused[reason] = (known + count, first)
    file_names = np.array([name for images, _ in listed for name, _ in images], dtype=bytes)
    sizes = np.array([size for images, _ in listed for _, size in images], np.int64)
    labels = np.repeat(np.arange(len(listed), dtype=np.int32), [len(images) for images, _ in listed])
    order = fixed_order(class_names, file_names, labels)
    by_reason = tuple(
        Unused(count, f"{split_folder}: not used are {_sentence(reason, (count, example))}")
        for reason, (count, example) in sorted(unused.items())
    )
    return Scan(class_names, file_names[order], labels[order], sizes[order], by_reason)


class ImageFolder:
    """A split of an image folder; images stay encoded."""

    def __init__(self, split_folder: Path) -> None:
        """Scans the folder.

        Args:
          split_folder: folder of the split, with one folder per class.

        Raises:
          ConfigError, OSError: as for `scan`.
        """
        self._split_folder = str(split_folder)
        found = scan(split_folder)
        # A fixed-width array, as a list of 1.28 million strings would take three times the memory in every worker.
        self.class_names, self._file_names, self._labels = found.class_names, found.file_names, found.labels
        self.unused = found.unused
        names = found.file_names
        self._fingerprint = digest(
            "folder", *found.class_names, str(names.dtype), names.tobytes(), found.labels.tobytes()
        )
        self._contents = digest("sizes", found.sizes.tobytes())

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Record:
        with open(self.describe(index), "rb") as file:
            return {"image": file.read(), "label": self._labels[index]}

    def fingerprint(self) -> str:
        """Digest of the classes, and of the files' names and order."""
        return self._fingerprint

    def contents(self) -> str:
        """Digest of the files' sizes."""
        return self._contents

    def describe(self, index: int) -> str:
        index = check_index(index, len(self))
        folder = self.class_names[self._labels[index]]
        return os.path.join(self._split_folder, folder, os.fsdecode(self._file_names[index]))
