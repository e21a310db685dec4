"""ArrayRecord files that fail: a disk that does not answer is never taken for a damaged image, nor the reverse."""

import dataclasses
import functools
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
from array_record.python.array_record_module import ArrayRecordWriter  # type: ignore[import-untyped]

from nfnet_flax.config import ConfigError
from nfnet_flax.data.array_records import WRITER_OPTIONS
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.decode import CorruptImageError
from nfnet_flax.data.pipeline import open_split, train_batches
from nfnet_flax.data.prefetch import InputFailed
from nfnet_flax.data.random_access import CorruptRecordError, Source
from nfnet_flax.data.record_files import open_records, read_record
from nfnet_flax.data.record_index import read_index, record_of
from nfnet_flax.data.source_config import ArrayRecordSource
from tests.image_sets import CLASSES, config_of, copied, make_folder, prepare

KINDS = ("folder", "array_record", "tfds")


def data(kind: str, sets: Path, on_corrupt: str) -> DataConfig:
    return DataConfig(
        source=config_of(kind, sets),
        batch_size=12,
        image_size=8,
        on_corrupt=on_corrupt,  # type: ignore[arg-type]
        num_threads=1,
    )


def num_replaced(config: DataConfig, source: Source) -> list[int]:
    """Rows of each of two batches that are of other images, as their own cannot be decoded."""
    with train_batches(config, source, seed=0, start_step=0, num_steps=2, process_index=0, num_processes=1) as iterator:
        return [int(rows["is_corrupt"].sum()) for rows in iterator]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("on_corrupt", ["raise", "skip"])
def test_a_file_that_vanishes_is_a_failed_input(sets: Path, tmp_path: Path, kind: str, on_corrupt: str) -> None:
    root = copied(kind, sets, tmp_path)
    config = data(kind, tmp_path, on_corrupt)
    source = open_split(config, "train")
    victims = [root / "train" / CLASSES[1]] if kind == "folder" else sorted(root.rglob("*train*array_record*"))[-1:]
    for path in victims:
        path.rename(tmp_path / "gone")
    with pytest.raises(InputFailed, match=r"No such file or directory(.|\n)*example \d+"):
        num_replaced(config, source)
    if kind != "folder":  # files that were not there to begin with
        with pytest.raises(ConfigError, match="missing"):
            open_split(config, "train")


def test_a_disk_that_fails_is_no_damage(sets: Path, tmp_path: Path) -> None:
    shard = sets / "array_record" / "train-00000-of-00003.array_record"

    def outcome(path: Path) -> type[Exception]:
        with pytest.raises((OSError, CorruptRecordError)) as caught:
            read_record(open_records({str(path): 4}), 1, str(path))
        return OSError if isinstance(caught.value, OSError) else caught.type

    whole = shard.read_bytes()
    for name, content in {
        "empty": b"",
        "short": whole[:1000],
        "half": whole[: len(whole) // 2],
        "no end": whole[:-1],
        "zeros": bytes(len(whole)),
        "text": b"404 not found\n" * 9999,
    }.items():
        (tmp_path / name).write_bytes(content)
        assert outcome(tmp_path / name) is CorruptRecordError, name
    (tmp_path / "folder").mkdir()
    (tmp_path / "memory").symlink_to("/proc/self/mem")  # opens; to read its beginning is an input/output error
    for name in ("missing", "folder", "memory"):
        assert outcome(tmp_path / name) is OSError, name


@pytest.mark.parametrize("kind", ["array_record", "tfds"])
def test_a_file_cut_while_it_is_read_has_damaged_records(sets: Path, tmp_path: Path, kind: str) -> None:
    copied(kind, sets, tmp_path)
    config = data(kind, tmp_path, "raise")
    source = open_split(config, "train")
    path = Path(source.describe(0).split(" record ")[0])
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CorruptRecordError, match=f"{path} record 0 is damaged"):
        source[0]
    with pytest.raises(CorruptImageError, match=r"is damaged.*--data\.on-corrupt skip"):
        num_replaced(config, source)
    if kind == "tfds":  # the whole set is in one file
        with pytest.raises(CorruptImageError, match="none of the 12 training images can be decoded"):
            num_replaced(data(kind, tmp_path, "skip"), source)
    else:
        with pytest.raises(ConfigError, match=r"has \d+ bytes, not the \d+ that were written"):
            open_split(config, "train")
        assert num_replaced(data(kind, tmp_path, "skip"), source) == [4, 4]


def test_a_shard_of_another_set_is_refused_at_the_start(sets: Path, tmp_path: Path) -> None:
    root = copied("array_record", sets, tmp_path)
    name = "train-00001-of-00003.array_record"
    folder = make_folder(tmp_path / "images")  # the same images
    for split in ("train", "val"):
        (folder / split / CLASSES[0]).rename(folder / split / "z_last")
    prepare(tmp_path / "other", f"--folder={folder}", "--num-processes=1")
    assert (tmp_path / "other" / name).stat().st_size == (root / name).stat().st_size
    shutil.copy(tmp_path / "other" / name, root / name)
    config = ArrayRecordSource(train=(f"{root}/train-*",), eval=(f"{root}/eval-*",))
    with pytest.raises(ConfigError, match=f"{name}' is not the file that the manifest beside it describes"):
        open_split(DataConfig(source=config), "train")
    # A manifest copied along with the wrong shards of its name: each record says what it is.
    shutil.copy(root / "eval.json", tmp_path / "kept")
    manifest = (tmp_path / "other" / "train.json").read_text().replace('"z_last"', f'"{CLASSES[0]}_x"')
    (tmp_path / "other" / "train.json").write_text(manifest)
    foreign = DataConfig(
        source=dataclasses.replace(config, train=(f"{tmp_path}/other/train-*",)), batch_size=12, on_corrupt="skip"
    )
    source = open_split(foreign, "train", (*CLASSES, f"{CLASSES[0]}_x"))
    with pytest.raises(ConfigError, match=r"it is 'z_last/.*', but its label 2 is .*the file belongs to another set"):
        num_replaced(foreign, source)


def test_a_set_prepared_before_ends_were_recorded_is_still_read(sets: Path, tmp_path: Path) -> None:
    root = copied("array_record", sets, tmp_path)
    for path in root.glob("*.json"):
        manifest = json.loads(path.read_text())
        manifest["format_version"] = 1
        for shard in manifest["shards"]:
            del shard["ends_blake2b"]
        path.write_text(json.dumps(manifest))
    old, new = (open_split(data("array_record", place, "raise"), "train") for place in (tmp_path, sets))
    assert old.fingerprint() == new.fingerprint()
    assert old[3] == new[3]


def test_a_folder_name_like_a_pattern_is_meant_by_its_name(sets: Path, tmp_path: Path) -> None:
    place = tmp_path / "data [v2] *"
    shutil.copytree(sets / "array_record", place)
    (tmp_path / "data 2 x").mkdir()  # which it would match as a pattern
    config = DataConfig(source=ArrayRecordSource(train=(f"{place}/train-*",), eval=(f"{place}/eval-*",)))
    assert len(open_split(config, "train")) == 12
    assert open_split(config, "eval").describe(0).startswith(f"{place}/eval-00000-of-00002")


def part(content: bytes, start: int, end: int) -> bytes:
    return content[start:end]


def test_records_are_found_without_the_library(tmp_path: Path) -> None:
    for name, sizes in (("small", [5]), ("borders", [65536, 65512, 65472, 131072, 1, 65440]), ("many", [3] * 9000)):
        path = str(tmp_path / name)
        writer = ArrayRecordWriter(path, WRITER_OPTIONS)
        records = [os.urandom(size) for size in sizes]
        for record in records:
            writer.write(record)
        writer.close()
        content = Path(path).read_bytes()
        positions = read_index(functools.partial(part, content), len(content), len(records)).tolist()
        assert [record_of(content[a:b], a) for a, b in itertools.pairwise(positions)] == records
        for wrong in (content[:-1], content[65536:], content[:-65536] + bytes(65536), os.urandom(len(content))):
            with pytest.raises(CorruptRecordError):
                read_index(functools.partial(part, wrong), len(wrong), len(records))
        with pytest.raises(CorruptRecordError, match=rf"has {len(records)} records, not {len(records) + 1}"):
            read_index(functools.partial(part, content), len(content), len(records) + 1)
        with pytest.raises(CorruptRecordError):
            record_of(content[positions[0] + 1 : positions[1]], positions[0] + 1)
