"""Image files in one folder per class."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from nfnet_flax.config import ConfigError
from nfnet_flax.data.random_access import Record, check_index, digest, fixed_order

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".ppm", ".tif", ".tiff")
_LAYOUT = "expected are image files in one folder per class, such as train/n01440764/n01440764_18.JPEG"
# Listing a folder is waiting for the disk or the network.
_NUM_SCAN_THREADS = 16


def class_folders(split_folder: Path) -> tuple[str, ...]:
    """Sorted names of the class folders of a split; hidden ones are skipped.

    Raises:
      ConfigError: there is no such folder, or fewer than two classes in it.
    """
    try:
        with os.scandir(split_folder) as entries:
            names = sorted(entry.name for entry in entries if entry.name[0] != "." and entry.is_dir())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"image folder {str(split_folder)!r} does not exist: {_LAYOUT}") from error
    if len(names) < 2:
        found = f"only one class folder, {names[0]!r}" if names else "no class folder"
        raise ConfigError(f"image folder {str(split_folder)!r} has {found}: {_LAYOUT}")
    return tuple(names)


def scan(split_folder: Path, class_names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Finds the images of a split without opening them; hidden files and those with other suffixes are skipped.

    Args:
      split_folder: has one folder per class. Not every class needs one.
      class_names: of the training split, in the order of the labels.

    Returns:
      File names, (N,) bytes without folder, and labels, (N,) int32, in the order of `fixed_order`.

    Raises:
      ConfigError: a folder is missing, belongs to no class, or has no images in it.
    """
    present = class_folders(split_folder)
    label_of = {name: label for label, name in enumerate(class_names)}
    if unknown := [name for name in present if name not in label_of]:
        raise ConfigError(
            f"image folder {str(split_folder)!r}: {unknown[0]!r} is no class of the training split "
            f"({len(unknown)} such folders): rename or remove them"
        )

    def images_of(name: str) -> list[bytes]:
        with os.scandir(split_folder / name) as entries:
            found = [
                os.fsencode(entry.name)
                for entry in entries
                if entry.name[0] != "." and entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file()
            ]
        if not found:
            raise ConfigError(
                f"class folder {str(split_folder / name)!r} has no image in it ({', '.join(IMAGE_SUFFIXES)}): "
                "add some, or remove the folder"
            )
        return found

    with ThreadPoolExecutor(_NUM_SCAN_THREADS) as threads:
        files = list(threads.map(images_of, present))
    file_names = np.array([name for names in files for name in names], dtype=bytes)
    labels = np.repeat([label_of[name] for name in present], [len(names) for names in files]).astype(np.int32)
    order = fixed_order(class_names, file_names, labels)
    return file_names[order], labels[order]


class ImageFolder:
    """A split of an image folder; images stay encoded."""

    def __init__(self, split_folder: Path, class_names: tuple[str, ...]) -> None:
        """Scans the folder.

        Args:
          split_folder: has one folder per class.
          class_names: of the training split, in the order of the labels.

        Raises:
          ConfigError: as `scan`.
        """
        self.class_names = class_names
        self._split_folder = str(split_folder)
        # One fixed-width array: a list of 1.28 million strings would take three times the memory in every worker.
        self._file_names, self._labels = scan(split_folder, class_names)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Record:
        with open(self.describe(index), "rb") as file:
            return {"image": file.read(), "label": self._labels[index]}

    def fingerprint(self) -> str:
        """Of the classes, the file names and their order; sizes would need a look at every file."""
        names = self._file_names
        return digest("folder", *self.class_names, str(names.dtype), names.tobytes(), self._labels.tobytes())

    def describe(self, index: int) -> str:
        index = check_index(index, len(self))
        folder = self.class_names[self._labels[index]]
        return os.path.join(self._split_folder, folder, os.fsdecode(self._file_names[index]))
