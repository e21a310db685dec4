"""The images from which a set is prepared: place, name and label of every example, before any image is read."""

import dataclasses
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import numpy as np

from nfnet_flax.config import ConfigError, require
from nfnet_flax.data import imagenet_tars
from nfnet_flax.data.array_records import Example
from nfnet_flax.data.classes import label_table
from nfnet_flax.data.image_folder import class_folders, scan
from nfnet_flax.data.imagenet_tars import Member
from nfnet_flax.data.packed_images import PackedImages, PlainBytes
from nfnet_flax.data.packed_source import PackedSource
from nfnet_flax.data.random_access import Split, Unused, digest, fixed_order
from nfnet_flax.data.shard_files import read_bytes
from nfnet_flax.paths import local_path
from nfnet_flax.progress import track, tracking

# Finding the members of a tar means waiting for the disk or the network, so many tars are read at once.
_NUM_SCAN_THREADS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listing:
    """The examples of a split, in `fixed_order`."""

    class_names: tuple[str, ...]
    """Names of the classes, in the order of the labels."""
    container: Path
    """A tar file, a folder with one folder per class, or a folder of Parquet files or tar files."""
    file_names: np.ndarray
    """(N,) bytes: names without folder."""
    labels: np.ndarray
    """(N,) int32."""
    offsets: np.ndarray | None
    """(N,) int64: position of the first byte within its file; None for a folder."""
    sizes: np.ndarray
    """(N,) int64: size of each file, in bytes."""
    unused: tuple[Unused, ...] = ()
    """Files in the container that are not used, one entry for each reason."""
    shards: tuple[str, ...] = ()
    """Files in which the images lie if the container is a folder of such files."""
    shard_of: np.ndarray | None = None
    """(N,) int32: which of these files contains the example; None: the container itself does."""

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """`class_name/file_name` of an example."""
        return f"{self.class_names[self.labels[index]]}/{os.fsdecode(self.file_names[index])}"

    def read(self, index: int) -> Example:
        """One example, with the unchanged bytes of the image's file.

        Raises:
          ConfigError: the image does not have the listed size: the tar is incomplete, or the file is being changed.
          OSError: it cannot be read.
        """
        name = self.name(index)
        if self.offsets is None:
            path = str(self.container / name)
            with open(path, "rb") as file:
                image = file.read()
        else:
            path = str(self.container) if self.shard_of is None else self.shards[self.shard_of[index]]
            image = read_bytes(path, int(self.offsets[index]), int(self.sizes[index]))
        if len(image) != self.sizes[index]:
            remedy = "it was changed meanwhile" if self.offsets is None else "the file is incomplete: download it again"
            raise ConfigError(f"{name} in {path!r} has {len(image)} bytes, not {self.sizes[index]}: {remedy}")
        return Example(int(self.labels[index]), name, image)

    def part(self, start: int, stop: int) -> Self:
        """The examples `start` to `stop - 1`."""
        kept = slice(start, stop)
        return dataclasses.replace(
            self,
            file_names=self.file_names[kept],
            labels=self.labels[kept],
            offsets=None if self.offsets is None else self.offsets[kept],
            sizes=self.sizes[kept],
            shard_of=None if self.shard_of is None else self.shard_of[kept],
        )

    def digest(self) -> str:
        """Digest of names, labels, order and sizes."""
        names = self.file_names
        arrays = (names.tobytes(), self.labels.tobytes(), self.sizes.tobytes())
        return digest(*self.class_names, str(names.dtype), *arrays)


def list_folder(root: Path) -> dict[str, Listing]:
    """The listings `train` and `eval` of an image folder, from `root/train` and `root/val`.

    Raises:
      ConfigError, OSError: as for `image_folder.scan`; or `val` has a class that `train` does not have.
    """
    class_names = class_folders(root / "train")
    folders: dict[Split, Path] = {"train": root / "train", "eval": root / "val"}
    listings: dict[str, Listing] = {}
    for split, folder in folders.items():
        found = scan(folder)
        listings[split] = Listing(
            class_names=class_names,
            container=folder,
            file_names=found.file_names,
            labels=label_table(found.class_names, class_names, split)[found.labels],
            offsets=None,
            sizes=found.sizes,
            unused=found.unused,
        )
    return listings


def list_packed(source: PackedSource) -> dict[str, Listing]:
    """The listings `train` and `eval` of a set of Parquet files or tar files.

    Raises:
      ConfigError, OSError: as for `open_source`; or nothing may be written though images must be copied.
    """
    source.check_splits()
    opened: dict[Split, PackedImages] = {"train": source.open("train", 0), "eval": source.open("eval", 0)}
    class_names = opened["train"].class_names
    listings: dict[str, Listing] = {}
    for split, found in opened.items():
        readers, shard_of, offsets, sizes = found.places()
        files = [reader.file for reader in readers if isinstance(reader, PlainBytes)]
        require(len(files) == len(readers), "source.keep_index", source.keep_index, "must be True: images are copied")
        file_names, labels = found.named_labels()
        listings[split] = Listing(
            class_names=class_names,
            container=local_path("source.root", source.root),
            file_names=file_names,
            labels=label_table(found.class_names, class_names, split)[labels],
            offsets=offsets,
            sizes=sizes,
            unused=found.unused,
            shards=tuple(files),
            shard_of=shard_of,
        )
    return listings


def _of_tar(path: Path, class_names: tuple[str, ...], examples: Iterable[tuple[int, Member]]) -> Listing:
    """The listing of a tar file from pairs of label and member."""
    numbers, members = zip(*examples, strict=True)
    labels = np.array(numbers, np.int32)
    file_names = np.array([os.fsencode(member.name) for member in members], dtype=bytes)
    offsets = np.array([member.offset for member in members], np.int64)
    sizes = np.array([member.size for member in members], np.int64)
    order = fixed_order(class_names, file_names, labels)
    return Listing(
        class_names=class_names,
        container=path,
        file_names=file_names[order],
        labels=labels[order],
        offsets=offsets[order],
        sizes=sizes[order],
    )


def list_tars(train: Path, val: Path, *, devkit: Path | None, val_synsets: Path | None) -> dict[str, Listing]:
    """The listings `train` and `eval` of ILSVRC2012's tars.

    Args:
      train: ILSVRC2012_img_train.tar.
      val: ILSVRC2012_img_val.tar.
      devkit: ILSVRC2012_devkit_t12.tar.gz, which lists the classes of the validation images; None: `val_synsets` is
        used.
      val_synsets: a text file that lists the classes of the validation images; ignored if `devkit` is given.

    Raises:
      ConfigError: a file is missing, incomplete, or of another kind; or the classes of the two sets differ.
    """
    with tracking(f"reading the classes of {train}"):
        tars = imagenet_tars.class_tars(train)
    class_names = tuple(tars)

    def members(tar: Member) -> list[Member]:
        return imagenet_tars.tar_members(train, tar.offset, tar.offset + tar.size)

    with ThreadPoolExecutor(_NUM_SCAN_THREADS) as threads:
        found = threads.map(members, tars.values())
        per_class = list(track(found, f"reading the contents of {train}", "classes", len(tars)))
    train_examples = [(label, member) for label, found in enumerate(per_class) for member in found]

    with tracking(f"reading the contents of {val}"):
        val_members = sorted(imagenet_tars.tar_members(val, 0, None))
    names = [member.name for member in val_members]
    if devkit is not None:
        classes = imagenet_tars.devkit_classes(devkit)
    elif val_synsets is not None:
        classes = imagenet_tars.listed_classes(val_synsets, names)
    else:
        raise ConfigError("the classes of the validation images are missing: give --devkit or --val-synsets")
    if len(classes) != len(names):
        raise ConfigError(
            f"{str(devkit or val_synsets)!r} lists {len(classes):,} classes for the {len(names):,} images of "
            f"{str(val)!r}: both must be of one release"
        )
    label_of = {name: label for label, name in enumerate(class_names)}
    if unknown := sorted(set(classes) - label_of.keys()):
        raise ConfigError(
            f"{len(unknown)} classes of the validation images, such as {unknown[0]!r}, are not in {str(train)!r}: "
            "all files must be of one release"
        )
    val_examples = [(label_of[name], member) for name, member in zip(classes, val_members, strict=True)]
    return {"train": _of_tar(train, class_names, train_examples), "eval": _of_tar(val, class_names, val_examples)}
