"""Tar files of images and labels in the form of WebDataset, as a source of examples with random access."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from nfnet_flax.config import ConfigError, require
from nfnet_flax.data.packed_images import Kind, PlainBytes, Reader
from nfnet_flax.data.packed_source import PackedSource
from nfnet_flax.data.random_access import Unused, digest
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

    def remarks(self, shards: Sequence[str], indexes: Sequence[ShardIndex]) -> list[Unused]:
        first: dict[str, str] = {}
        for shard, index in zip(shards, indexes, strict=True):
            if (ending := index.facts["ending"]) is not None:
                first.setdefault(ending, shard)
        if len(first) > 1:
            found = ", ".join(f".{ending} in {shard!r}" for ending, shard in first.items())
            raise ConfigError(f"source.label = None: labels are {found}: choose one ending by --data.source.label")
        seen: dict[str, str] = {}
        for shard, index in zip(shards, indexes, strict=True):
            same = seen.setdefault(_digest(index), shard)
            if len(index) and same != shard:
                raise ConfigError(
                    f"{shard!r} has the keys, labels and sizes of {same!r}: remove one of them, if it is a copy, or "
                    "give the images other keys"
                )
        return _repeated(indexes)


def _digest(index: ShardIndex) -> str:
    texts = (str(index.label_names), str(index.names.dtype))
    return digest(*texts, *(part.tobytes() for part in (index.names, index.labels, index.sizes)))


def _repeated(indexes: Sequence[ShardIndex]) -> list[Unused]:
    """A remark if images in several files have the same name; within a file that is an error."""
    names = [name for index in indexes for name in index.names.tolist()]
    if len(set(names)) == len(names):
        return []
    repeated = [name for name, count in Counter(names).items() if count > 1]
    example = repeated[0].decode(errors="surrogateescape")
    text = f"{len(repeated)} images are in several tar files, such as {example!r}: all of them are used"
    return [Unused(0, text)]


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
