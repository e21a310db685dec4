"""Parquet files of images, as the Hugging Face hub has them, as a source of examples."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from nfnet_flax.config import ConfigError, require
from nfnet_flax.data.packed_images import Kind, PlainBytes, Reader
from nfnet_flax.data.packed_source import PackedSource
from nfnet_flax.data.parquet_file import columns_of, footer_digest, opened, read_labels
from nfnet_flax.data.parquet_images import RowGroups, check_no_nulls, copied_bytes, copy_images, plain_places
from nfnet_flax.data.random_access import digest
from nfnet_flax.data.shard_files import PARQUET, ShardKind
from nfnet_flax.data.shard_index import ShardIndex, as_numbers, labels_of, short_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParquetSource(PackedSource):
    """Parquet files with a column of images and one of classes, as the Hugging Face hub has them.

    Names of classes are taken from the metadata that its library writes, or are the texts of the column. The extra
    `parquet` is needed.
    """

    kind: ClassVar[Kind] = Kind("parquet", "row")
    shard_kind: ClassVar[ShardKind] = PARQUET

    image: str = "image"
    """Name of the column with the images: bytes of image files, or structures of `bytes` and `path`."""
    label: str = "label"
    """Name of the column with the class of each image, as a number or a text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("image", "label"):
            require(bool(getattr(self, name)), f"source.{name}", getattr(self, name), "must be the name of a column")

    def maker(self) -> "ParquetMaker":
        return ParquetMaker(self.image, self.label)

    def reader(self, shard: str, index: ShardIndex) -> Reader:
        if (copy := index.facts.get("copy")) is not None:
            return PlainBytes(copy)
        return RowGroups(shard, index.facts["column"]) if index.facts["has_rows"] else PlainBytes(shard)

    def own_names(self, shards: Sequence[str], indexes: Sequence[ShardIndex]) -> tuple[str, ...] | None:
        first = indexes[0].facts["kinds"]
        for shard, index in zip(shards, indexes, strict=True):
            if index.facts["kinds"] != first:
                raise ConfigError(
                    f"{shard!r} and {shards[0]!r} have columns of other kinds or other class names "
                    f"({_shown(index.facts['kinds'])}; {_shown(first)}): use the files of one set"
                )
        names = first["class_names"]
        return None if names is None else tuple(names)

    def known_contents(self, indexes: Sequence[ShardIndex]) -> str:
        return digest("parquet", *(index.facts["footer"] for index in indexes))


def _shown(kinds: dict[str, object]) -> str:
    return ", ".join(f"{name} {value!r}" for name, value in kinds.items())[:200]


@dataclasses.dataclass(frozen=True)
class ParquetMaker:
    """Makes the index of a Parquet file."""

    image: str
    """Name of the column with the images."""
    label: str
    """Name of the column with the labels."""

    @property
    def key(self) -> str:
        return f"parquet {self.image!r} {self.label!r}"

    def make(self, shard: str, copy: Path | None) -> ShardIndex:
        with opened(shard) as file:
            columns = columns_of(shard, file.schema_arrow, self.image, self.label)
            found, names = read_labels(shard, file, columns)
            places, has_rows = plain_places(file, shard, columns.image), False
            if places is None and copy is not None:
                places, has_rows = copy_images(file, shard, columns.image, copy), True
            elif places is None:
                check_no_nulls(file, shard, columns.image)
                places, has_rows = (np.arange(len(found)), np.zeros(len(found), np.int64)), True
        if len(places[0]) != len(found):
            raise ConfigError(f"{shard!r} has {len(places[0])} images and {len(found)} labels: download it again")
        labels, label_names = (as_numbers(shard, found), None) if columns.has_numbers else labels_of(found)
        kinds = {
            "image": "structure" if columns.image != self.image else "bytes",
            "label": "number" if columns.has_numbers else "text",
            "class_names": None if columns.class_names is None else list(columns.class_names),
        }
        return ShardIndex(
            names=np.array([short_name(name) for name in names], dtype=bytes),
            offsets=places[0],
            sizes=places[1],
            labels=labels,
            label_names=label_names,
            facts={"kinds": kinds, "column": columns.image, "footer": footer_digest(shard), "has_rows": has_rows},
        )

    def copied_bytes(self, shard: str) -> int:
        with opened(shard) as file:
            return copied_bytes(file, columns_of(shard, file.schema_arrow, self.image, self.label).image)
