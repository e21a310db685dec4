"""Image files in one folder per class."""

import os
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
      ConfigError: there is no such folder, or no class in it.
    """
    try:
        with os.scandir(split_folder) as entries:
            names = sorted(entry.name for entry in entries if entry.name[0] != "." and entry.is_dir())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"image folder {str(split_folder)!r} does not exist: {_LAYOUT}") from error
    if not names:
        raise ConfigError(f"image folder {str(split_folder)!r} has no class folder: {_LAYOUT}")
    return tuple(names)


def scan(split_folder: Path) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Finds the images of a split without opening them; hidden files and those with other suffixes are skipped.

    Args:
      split_folder: has one folder per class.

    Returns:
      Class names; file names, (N,) bytes without folder, and labels, (N,) int32, in the order of `fixed_order`.

    Raises:
      ConfigError: the folder is missing, or a class folder has no images in it.
    """
    class_names = class_folders(split_folder)

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
        files = list(threads.map(images_of, class_names))
    file_names = np.array([name for names in files for name in names], dtype=bytes)
    labels = np.repeat(np.arange(len(files), dtype=np.int32), [len(names) for names in files])
    order = fixed_order(class_names, file_names, labels)
    return class_names, file_names[order], labels[order]


class ImageFolder:
    """A split of an image folder; images stay encoded."""

    def __init__(self, split_folder: Path) -> None:
        """Scans the folder.

        Args:
          split_folder: has one folder per class.

        Raises:
          ConfigError: as `scan`.
        """
        self._split_folder = str(split_folder)
        # One fixed-width array: a list of 1.28 million strings would take three times the memory in every worker.
        self.class_names, self._file_names, self._labels = scan(split_folder)

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
