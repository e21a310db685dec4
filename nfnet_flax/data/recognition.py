"""Which source reads a file or a folder that a user names."""

from collections.abc import Sequence
from pathlib import Path

from nfnet_flax.data.image_folder import FolderSource
from nfnet_flax.data.packed_source import PackedSource
from nfnet_flax.data.parquet_source import ParquetSource
from nfnet_flax.data.random_access import SourceConfig
from nfnet_flax.data.shard_files import PARQUET, TAR, ShardKind, shards_in, splits_in
from nfnet_flax.data.webdataset_source import WebDatasetSource
from nfnet_flax.paths import local_path

_TRAIN = ("train", "training")
_HELD_OUT = ("validation", "valid", "val", "dev", "eval", "test", "testing")
"""Words for a held-out split; of several that are there, the first one here is used."""


def evaluation_source(field: str, root: str) -> SourceConfig:
    """The source of a folder of labelled images that are evaluated: Parquet or tar files, or `val/` with a folder for
    each class. It is not opened.

    Args:
      field: name of the value in messages, such as `images`.
      root: the folder as the user gave it.

    Raises:
      ConfigError: it cannot be the path of a folder.
    """
    packed = packed_source(root, local_path(field, root), image="image", label="label")
    return FolderSource(root=root) if packed is None else packed[0]


def packed_source(data: str, path: Path, *, image: str, label: str) -> tuple[PackedSource, bool] | None:
    """The source of a Parquet file, a tar file, or a folder of them, and whether it has a held-out split; None for
    anything else. In a folder, files whose names say no split are all training files, if the folder has no others
    within it.

    Args:
      data: the file or folder as the user gave it.
      path: the same, as `local_path` gives it.
      image: column with the images, for Parquet files.
      label: column with the classes, or the entry of a JSON object in a tar file.
    """
    for kind in (PARQUET, TAR):
        if path.name.endswith(kind.suffix) and not path.is_dir():
            root, train, held_out = str(Path(data).parent), path.name, None
        else:
            words = splits_in(path, kind)
            root, train = data, next((word for word in _TRAIN if word in words), "")
            train = train or _undivided(path, words, kind)
            held_out = next((word for word in _HELD_OUT if word in words), None) if train else None
        if not train:
            continue
        splits = ((train,), (held_out or _HELD_OUT[0],))
        if kind is PARQUET:
            found: PackedSource = ParquetSource(root=root, train=splits[0], eval=splits[1], image=image, label=label)
        else:
            found = WebDatasetSource(root=root, train=splits[0], eval=splits[1], json_key=label)
        return found, held_out is not None
    return None


def _undivided(path: Path, words: Sequence[str], kind: ShardKind) -> str:
    """The entry for the training files of a folder in which none is named so; empty if it is no such folder."""
    if not path.is_dir():
        return ""
    if any(entry.is_dir() and entry.name != "data" and not entry.name.startswith(".") for entry in path.iterdir()):
        return ""  # of which each may be a class
    if words:
        return _TRAIN[0]  # the error says which splits there are instead
    return "." if shards_in(path, kind) else "data/" if shards_in(path / "data", kind) else ""
