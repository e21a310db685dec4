"""A set of images in a bucket, and the same files on a disk."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nfnet_flax.data import pipeline
from nfnet_flax.data.array_record_source import ArrayRecords, ArrayRecordSource
from nfnet_flax.data.bucket_records import BucketRecords
from nfnet_flax.data.bucket_shards import BucketShards
from nfnet_flax.data.config import DataConfig
from nfnet_flax.storage import BucketFolder, BucketUrl
from nfnet_flax.storage.objects import ObjectFolder
from tests import stores

NAME = "train-00001-of-00003.array_record"


class Bucket(NamedTuple):
    """A set in a bucket, and the same files on a disk."""

    kind: str
    url: str
    """URL of the set."""
    proxy: str
    local: Path
    set_rules: Callable[[list[dict[str, object]]], None]

    @property
    def folder(self) -> BucketFolder:
        return BucketFolder(BucketUrl(self.kind, stores.BUCKET, self.url.split("/", 3)[3]))

    def fill(self) -> None:
        """Writes the set, which a test has changed, again."""
        for path in self.local.glob("[a-z]*"):
            self.folder.upload(path, path.name)

    def source(self, cache: Path, cache_gib: float | None = None) -> ArrayRecordSource:
        place = f"{self.url}/"
        return ArrayRecordSource(
            train=(f"{place}train-*",), eval=(f"{place}eval-*",), cache_dir=str(cache), cache_gib=cache_gib
        )

    def local_source(self) -> ArrayRecordSource:
        return ArrayRecordSource(train=(f"{self.local}/train-*",), eval=(f"{self.local}/eval-*",))

    def requests(self, name: str) -> list[list[object]]:
        """The requests for the content of an object."""
        log = stores.requests_seen(self.proxy)
        return [entry for entry in log if entry[1] == "GET" and name in str(entry[2]) and entry[3]]


def contents(served: Bucket) -> dict[str, str]:
    return {name: about.checksum for name, about in ObjectFolder(served.folder.url).listing()[0].items()}


def records(source: object) -> list[tuple[bytes, int]]:
    assert isinstance(source, ArrayRecords)
    return [(record["image"], int(record["label"])) for record in map(source.__getitem__, range(len(source)))]


def shards_of(source: object) -> BucketShards:
    assert isinstance(source, ArrayRecords)
    assert isinstance(source._records, BucketRecords)
    return source._records.shards


def copied(shards: BucketShards, shard: str) -> Path:
    """The copy of a shard, made if necessary."""
    with shards.held(shard) as path:
        return path


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def batches(config: DataConfig, start: int, count: int, index: int, num_processes: int) -> list[dict[str, np.ndarray]]:
    """Batches of a training as one of its processes gets them."""
    source = pipeline.open_split(config, "train")
    share = {"process_index": index, "num_processes": num_processes}
    with pipeline.train_batches(config, source, seed=3, start_step=start, num_steps=start + count, **share) as found:
        return list(found)


def identity_of(config: DataConfig) -> dict[str, Any]:
    """What a run records of its input."""
    train, held_out = (pipeline.open_split(config, split) for split in ("train", "eval"))
    return pipeline.input_identity(config, seed=0, train_source=train, eval_source=held_out)
