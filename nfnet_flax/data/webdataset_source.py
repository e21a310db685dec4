"""Tar files of images and labels in the form of WebDataset, as a source of examples with random access."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from nfnet_flax.config import ConfigError, require
from nfnet_flax.data.packed_images import Kind, PlainBytes, Reader
from nfnet_flax.data.packed_source import PackedSource
from nfnet_flax.data.shard_files import TAR, ShardKind
from nfnet_flax.data.shard_index import ShardIndex


@dataclasses.dataclass(frozen=True, kw_only=True)
class WebDatasetSource(PackedSource):
    """Tar files in the form of WebDataset: `KEY.jpg` (or `.png`, `.webp`, ...), and its class in `KEY.cls`, `KEY.txt`
    or `KEY.json`, as a number or a name. They must not be compressed."""

    kind: ClassVar[Kind] = Kind("webdataset", "member")
    shard_kind: ClassVar[ShardKind] = TAR

    label: Literal["cls", "txt", "json"] | None = None
    """Ending of the members with the classes; None: the first one of `cls`, `txt` and `json` that images have."""
    json_key: str = "label"
    """Name of the entry of a JSON object that is the class."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.json_key), "source.json_key", self.json_key, "must be the name of an entry")

    def maker(self) -> "TarMaker":
        return TarMaker(self.label, self.json_key)

    def reader(self, shard: str, index: ShardIndex) -> Reader:
        del index
        return PlainBytes(shard)

    def own_names(self, shards: Sequence[str], indexes: Sequence[ShardIndex]) -> None:
        first: dict[str, str] = {}
        for shard, index in zip(shards, indexes, strict=True):
            if (ending := index.facts["ending"]) is not None:
                first.setdefault(ending, shard)
        if len(first) > 1:
            found = ", ".join(f".{ending} in {shard!r}" for ending, shard in first.items())
            raise ConfigError(f"source.label = None: labels are {found}: choose one ending by --data.source.label")


@dataclasses.dataclass(frozen=True)
class TarMaker:
    """Makes the index of a tar file."""

    label: str | None
    """Ending of the members with the labels; None: the first one that occurs."""
    json_key: str
    """Name of the entry of a JSON object that is the class."""

    @property
    def key(self) -> str:
        return f"webdataset {self.label!r} {self.json_key!r}"

    def make(self, shard: str, copy: Path | None) -> ShardIndex:
        from nfnet_flax.data.tar_index import tar_index  # imports libraries that a recipe does not need

        del copy  # images lie in the file as they are
        return tar_index(shard, self.label, self.json_key)

    def copied_bytes(self, shard: str) -> int:
        del shard
        return 0
