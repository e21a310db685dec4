"""Parquet files and tar files in buckets give the batches of the same files on a disk."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from nfnet_flax.config import ConfigError
from nfnet_flax.data import index_store, pipeline
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.index_store import NoIndexYet
from nfnet_flax.data.packed_source import PackedSource
from nfnet_flax.data.random_access import Source, begin_copying, copies_of
from nfnet_flax.data.source_config import ParquetSource, WebDatasetSource
from nfnet_flax.doctor.data import check_data
from nfnet_flax.open_config import with_absolute_places
from nfnet_flax.recipe_file import load_recipe
from nfnet_flax.storage import BucketFolder, BucketUrl
from tests import image_sets, packed_sets, runs, stores
from tests.bucket_sets import batches, identity_of, wait_until


class Packed(NamedTuple):
    """A set in a bucket, and the same files on a disk."""

    form: str
    url: str
    local: Path
    folder: BucketFolder
    set_rules: Callable[[list[dict[str, object]]], None]

    def source(self, place: str | Path, cache: Path, **fields: Any) -> PackedSource:
        kind: Any = WebDatasetSource if self.form == "webdataset" else ParquetSource
        given = {"root": str(place), "cache": str(cache), "cache_dir": str(cache / "copies"), **fields}
        source: PackedSource = kind(**given)
        return source

    def upload(self, *paths: Path) -> None:
        for path in paths:
            self.folder.upload(path, path.relative_to(self.local).as_posix())


@pytest.fixture(scope="module", params=[("gs", "parquet"), ("s3", "compressed"), ("s3", "webdataset")], ids=str)
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Packed]:
    store, form = request.param
    root = tmp_path_factory.mktemp("packed")
    folder = image_sets.make_folder(root / "folder", num_train=8)
    if form == "webdataset":
        local = packed_sets.make_webdataset(folder, root / "set")
    else:
        write = packed_sets.compressed if form == "compressed" else packed_sets.plain
        local = packed_sets.make_parquet(folder, root / "set", write=write)
    with stores.proxied(store, []) as (proxy, set_rules), pytest.MonkeyPatch.context() as patch:
        stores.use(patch, store, proxy)
        place = BucketUrl(store, stores.BUCKET, "a b/set")
        found = Packed(form, str(place), local, BucketFolder(place), set_rules)
        found.upload(*(path for path in local.rglob("*.*") if ".nfnet_index" not in path.parts))
        yield found


@pytest.fixture(autouse=True)
def without_faults(packed: Packed) -> Iterator[None]:
    yield
    packed.set_rules([])


def records(source: Source) -> list[tuple[bytes, int]]:
    return [(record["image"], int(record["label"])) for record in map(source.__getitem__, range(len(source)))]


def test_batches_and_identity_are_those_of_local_files(packed: Packed, tmp_path: Path) -> None:
    on_disk = DataConfig(source=packed.source(packed.local, tmp_path / "of files"), batch_size=8, image_size=16)
    wanted = [batches(on_disk, start, count, 0, 1) for start, count in ((0, 5), (1_000_000, 1))]
    remote = dataclasses.replace(on_disk, source=packed.source(packed.url, tmp_path))
    pipeline.open_split(remote, "train")  # makes the index
    for num_processes, room in ((1, 0.0), (2, 0.0), (4, 0.0), (2, None)):
        copies = str(tmp_path / f"{num_processes} {room}")
        config = dataclasses.replace(
            remote,
            source=dataclasses.replace(remote.source, cache_dir=copies, cache_gib=room),  # type: ignore[call-arg]
        )
        for (start, count), steps in zip(((0, 5), (1_000_000, 1)), wanted, strict=True):
            parts = [batches(config, start, count, index, num_processes) for index in range(num_processes)]
            for step, found in zip(steps, zip(*parts, strict=True), strict=True):
                for name, value in step.items():
                    assert np.array_equal(value, np.concatenate([rows[name] for rows in found])), num_processes
    in_worker = batches(dataclasses.replace(remote, num_workers=1), 1, 1, 0, 1)[0]
    assert np.array_equal(in_worker["image"], wanted[0][1]["image"])
    assert identity_of(on_disk) == identity_of(remote)


def test_an_index_is_made_with_room_for_one_file(
    packed: Packed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = records(packed.source(packed.local, tmp_path / "of files").open("train", 0))
    files = [path for path in packed.local.rglob("*train*") if path.is_file() and ".nfnet_index" not in path.parts]
    gib = 1.01 * max(path.stat().st_size for path in files) / 2**30
    with pytest.raises(NoIndexYet, match=rf"3 files in {re.escape(packed.url)}.* have no index yet: the first start"):
        packed.source(packed.url, tmp_path, keep_index=False).open("train", 0)
    with pytest.raises(ConfigError, match=r"there is no room for it in .*/copies .*cache-gib"):
        packed.source(packed.url, tmp_path, cache_gib=0.5 * gib).open("train", 0)
    source = packed.source(packed.url, tmp_path, cache_gib=gib).open("train", 0)
    assert "3 files in" in capsys.readouterr().err
    assert records(source) == whole
    if packed.form == "compressed":  # its images were copied
        assert copies_of(source) is None
        return
    found = copies_of(source)
    assert found is not None
    assert (found.num_files, found.num_missing) == (3, 2)
    again = packed.source(packed.url, tmp_path, keep_index=False).open("train", 0)
    stop = begin_copying(again, range(len(again)))
    wait_until(lambda: (now := copies_of(again)) is not None and now.num_missing == 0)
    stop()
    packed.set_rules([{"do": "status", "status": 500}])
    assert records(again) == whole


def test_a_file_that_is_replaced_is_refused_by_name(packed: Packed, tmp_path: Path) -> None:
    config = packed.source(packed.url, tmp_path)
    whole = records(config.open("train", 0))
    source = dataclasses.replace(config, cache_dir=str(tmp_path / "none"), cache_gib=0.0).open("train", 0)
    victim = min(path for path in packed.local.rglob("*train-0*") if ".nfnet_index" not in path.parts)
    name, before = victim.relative_to(packed.local).as_posix(), victim.read_bytes()
    packed.folder.put(name, bytes(reversed(before)))
    try:
        if packed.form == "compressed":  # its images were copied
            assert records(source) == whole
            return
        with pytest.raises(ConfigError, match=f"{name} has been replaced since it was opened"):
            records(source)
    finally:
        packed.folder.put(name, before)


def test_splits_patterns_and_mistakes(packed: Packed, tmp_path: Path) -> None:
    def message(**fields: Any) -> str:
        with pytest.raises(ConfigError) as error:
            packed.source(packed.url, tmp_path, **fields).open("train", 0)
        return str(error.value)

    suffix = "tar" if packed.form == "webdataset" else "parquet"
    pattern = "tiny-train-{0000..0002}.tar" if suffix == "tar" else "data/train-*.parquet"
    inside = packed.url if suffix == "tar" else f"{packed.url}/data"
    named = packed.source(packed.url, tmp_path)
    same = packed.source(packed.url, tmp_path, train=(pattern,))
    absolute = packed.source(packed.local, tmp_path).with_training_of(named)
    assert named.shards("train") == same.shards("train") == absolute.shards("train")
    assert all(shard.startswith(f"{inside}/") for shard in named.shards("train"))
    assert with_absolute_places(named) == named
    assert "is no folder: give the folder of the" in message(root=f"{packed.url}/nowhere")
    assert "of that split" in message(train=("other",))
    assert "matches; there is " in message(train=("none-*." + suffix,)) or suffix == "parquet"
    with pytest.raises(ConfigError, match="share 3 files"):
        packed.source(packed.url, tmp_path, eval=("train",)).check_splits()
    named.check_splits()


def test_the_doctor_makes_no_index(packed: Packed, tmp_path: Path) -> None:
    source = packed.source(packed.url, tmp_path / "cache")
    recipe = dataclasses.replace(load_recipe(runs.DIGITS), data=DataConfig(source=source))
    found = check_data(recipe, None)
    assert [finding.is_wrong for finding in found] == [False]
    assert f"3 files in {packed.url}" in found[0].text
    assert not (tmp_path / "cache").exists()
    pipeline.open_split(recipe.data, "train")
    pipeline.open_split(recipe.data, "eval")
    texts = [finding.text for finding in check_data(recipe, None) if not finding.is_wrong]
    assert texts[0].startswith("train: 24 examples of 3 classes; the first is ")
    assert index_store.FOLDER not in str(packed.folder.files())
