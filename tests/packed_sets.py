"""Parquet files and tar files of the images of a folder, as the Hugging Face hub and WebDataset have them."""

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SPLITS = {"train": "train", "val": "validation"}
"""Folder of a split -> its name in the files."""
NUM_SHARDS = 3
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def hub_metadata(class_names: Sequence[str], label: str = "label") -> dict[bytes, bytes]:
    """Metadata of a schema as the hub's library writes them."""
    features = {"image": {"_type": "Image"}, label: {"names": list(class_names), "_type": "ClassLabel"}}
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


def table_of(paths: Sequence[Path], class_names: Sequence[str] | None) -> Any:
    """Rows of image files in folders of classes; labels are numbers, or without class names texts."""
    images = pa.array([{"bytes": path.read_bytes(), "path": path.name} for path in paths], IMAGE)
    if class_names is None:
        return pa.table({"image": images, "label": pa.array([path.parent.name for path in paths], pa.string())})
    labels = pa.array([class_names.index(path.parent.name) for path in paths], pa.int64())
    return pa.table({"image": images, "label": labels}).replace_schema_metadata(hub_metadata(class_names))


def plain(table: Any, path: Path, **options: Any) -> Path:
    """Writes a file as the hub's library does: images are neither compressed nor encoded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **{"compression": "NONE", "use_dictionary": False, "row_group_size": 5, **options})
    return path


def compressed(table: Any, path: Path, **options: Any) -> Path:
    """Writes a file as pyarrow does by default."""
    return plain(table, path, compression="SNAPPY", use_dictionary=True, **options)


def make_parquet(folder: Path, root: Path, *, write: Any = plain) -> Path:
    """The images of a folder in `root/data/train-00000-of-00003.parquet` and so on, in the order of their names."""
    class_names = sorted(path.name for path in (folder / "train").iterdir())
    for inside, split in SPLITS.items():
        paths = sorted((folder / inside).glob("*/*"), key=lambda path: path.name)
        for number in range(NUM_SHARDS):
            name = f"{split}-{number:05d}-of-{NUM_SHARDS:05d}.parquet"
            write(table_of(paths[number::NUM_SHARDS], class_names), root / "data" / name)
    return root


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """Writes a tar file of names and contents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def make_webdataset(folder: Path, root: Path) -> Path:
    """The images of a folder in `root/tiny-train-0000.tar` and so on; the classes are names in `KEY.cls`."""
    for inside, split in SPLITS.items():
        paths = sorted((folder / inside).glob("*/*"), key=lambda path: path.name)
        for number in range(NUM_SHARDS):
            members = [
                member
                for path in paths[number::NUM_SHARDS]
                for member in ((path.name, path.read_bytes()), (f"{path.stem}.cls", path.parent.name.encode()))
            ]
            write_tar(root / f"tiny-{split}-{number:04d}.tar", members)
    return root
