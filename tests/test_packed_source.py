"""Parquet files and tar files: the same batches as from a folder, an index that is kept and checked, and splits."""

import dataclasses
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nfnet_flax import cli, exit_codes
from nfnet_flax.config import ConfigError
from nfnet_flax.data import index_store
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.decode import CorruptImageError
from nfnet_flax.data.packed_source import PackedSource
from nfnet_flax.data.pipeline import open_split
from nfnet_flax.data.random_access import Source, Split
from nfnet_flax.data.source_config import FolderSource, ParquetSource, WebDatasetSource
from nfnet_flax.data.sources import open_source
from tests import packed_sets, runs
from tests.image_sets import CLASSES, make_folder
from tests.packed_sets import compressed, make_parquet, make_webdataset, plain, write_tar
from tests.test_data import as_bytes, batches, everything_on, of_all_processes

FORMS = ("parquet", "compressed", "webdataset")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty images to train on, in a folder `folder` and in each form."""
    root = tmp_path_factory.mktemp("packed")
    folder = make_folder(root / "folder", num_train=20, num_val=3)
    make_parquet(folder, root / "parquet")
    make_parquet(folder, root / "compressed", write=compressed)
    make_webdataset(folder, root / "webdataset")
    return root


def source_of(form: str, root: Path, **fields: Any) -> PackedSource:
    kind = WebDatasetSource if form == "webdataset" else ParquetSource
    return kind(root=str(root / form), **fields)


def copied(form: str, images: Path, to: Path) -> Path:
    """A copy of a set without its index."""
    shutil.copytree(images / form, to / form, ignore=shutil.ignore_patterns(index_store.FOLDER))
    return to / form


def contents(source: Source) -> list[tuple[bytes, int]]:
    return [(source[index]["image"], int(source[index]["label"])) for index in range(len(source))]


def error_of(call: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("form", FORMS)
def test_batches_are_those_of_a_folder(images: Path, form: str) -> None:
    of_folder = everything_on(images / "folder")
    config = dataclasses.replace(of_folder, source=source_of(form, images))
    for start, count in ((0, 6), (1_000_000, 2)):
        wanted = as_bytes(batches(of_folder, start, count))
        for num_processes, num_workers in ((1, 0), (2, 0), (4, 0), *([(1, 1)] if start else [])):
            found = of_all_processes(config, start, count, num_processes, num_workers)
            assert as_bytes(found) == wanted, (start, num_processes, num_workers)


@pytest.mark.parametrize("form", FORMS)
def test_the_first_images_are_held_out_as_of_a_folder(images: Path, form: str) -> None:
    of_folder = DataConfig(source=FolderSource(root=str(images / "folder")), num_held_out=7)
    config = dataclasses.replace(of_folder, source=source_of(form, images))
    splits: tuple[Split, ...] = ("train", "eval")
    for split in splits:
        assert contents(open_split(config, split)) == contents(open_split(of_folder, split))


@pytest.mark.parametrize("form", FORMS)
def test_an_index_is_made_once(images: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = copied(form, images, tmp_path)
    source, wanted = source_of(form, tmp_path), contents(open_source(source_of(form, images), "train", 0))
    capsys.readouterr()

    def opened() -> str:
        assert contents(open_source(source, "train", 0)) == wanted
        return capsys.readouterr().err

    def files() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in sorted(root.rglob(f"{index_store.FOLDER}/*"))}

    said = opened()
    assert "3 files in" in said
    assert ("have compressed images: they are copied to" in said) == (form == "compressed")
    kept = files()
    assert len(kept) == 4 + 3 * (form == "compressed")  # one for each file, and the lock
    assert opened() == ""
    assert files() == kept
    index = next(Path(path) for path in kept if re.search(r"0001.*\.[0-9a-f]{8}$", path))
    for content in (index.read_bytes()[:-1], b"", index.read_bytes()[:100] + b"x" + index.read_bytes()[101:]):
        index.write_bytes(content)  # damaged
        assert re.search(r"is damaged \(.*\): it is made again\n.*1 files in", opened())
        assert opened() == ""
    if form == "compressed":
        copy = next(Path(path) for path in kept if path.endswith(".images"))
        os.truncate(copy, 10)
        assert "1 files in" in opened()
        assert copy.stat().st_size > 10
    shard = next(path for path in root.rglob("*.*") if path.is_file() and "train" in path.name)
    os.utime(shard, ns=(0, 0))  # another file of the same size
    assert "1 files in" in opened()
    assert len(files()) == len(kept)


@pytest.mark.parametrize("form", FORMS)
def test_a_set_that_cannot_be_written_is_indexed_elsewhere(
    images: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = copied(form, images, tmp_path)
    wanted = contents(open_source(source_of(form, images), "train", 0))
    (root if form == "webdataset" else root / "data").joinpath(index_store.FOLDER).write_text("in the way of a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert contents(open_source(source_of(form, tmp_path), "train", 0)) == wanted
    assert len(list((tmp_path / "cache" / "nfnet_flax" / "index").glob("*/*train*"))) >= 3
    chosen = source_of(form, tmp_path, cache=str(tmp_path / "chosen"))
    assert contents(open_source(chosen, "train", 0)) == wanted
    assert len(list((tmp_path / "chosen").glob("*/*train*"))) >= 3
    (tmp_path / "file").write_text("no folder")
    chosen = dataclasses.replace(chosen, cache=str(tmp_path / "file"))
    assert "source.cache = " in error_of(lambda: open_source(chosen, "train", 0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    capsys.readouterr()
    found = open_source(source_of(form, tmp_path), "train", 0)
    assert contents(found) == wanted
    assert "cannot be kept, and is made at each start" in capsys.readouterr().err
    assert [unused.num_files for unused in found.unused] == ([0] if form == "compressed" else [])


@pytest.mark.parametrize("form", FORMS)
def test_without_writing_nothing_is_written(images: Path, tmp_path: Path, form: str) -> None:
    root = copied(form, images, tmp_path)
    before = sorted(root.rglob("*"))
    source = open_source(source_of(form, tmp_path).without_writing(), "train", 0)
    kept = open_source(source_of(form, images), "train", 0)
    assert contents(source) == contents(kept)
    assert sorted(root.rglob("*")) == before
    assert (source.fingerprint(), source.contents()) == (kept.fingerprint(), kept.contents())
    again = pickle.loads(pickle.dumps(source))
    assert contents(again) == contents(kept)


OPEN = """
import sys
from nfnet_flax.data.source_config import ParquetSource
source = ParquetSource(root=sys.argv[1]).open("train", 0)
print(source.fingerprint(), len(source[0]["image"]))
"""


def test_processes_that_start_together_make_one_index(images: Path, tmp_path: Path) -> None:
    root = copied("compressed", images, tmp_path)
    command = [sys.executable, "-c", OPEN, str(root)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ended = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended
    assert len({out for out, _ in ended}) == 1
    assert sum("were indexed, once" in err for _, err in ended) == 1
    assert len(list((root / "data" / index_store.FOLDER).glob("*"))) == 7


def test_no_room_for_copies_is_an_error(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied("compressed", images, tmp_path)
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    message = error_of(lambda: open_source(source_of("compressed", tmp_path), "train", 0))
    assert re.search(r"needs as a copy of .* has 1\.0 KiB free: make room, give another folder by", message)


@pytest.mark.parametrize("form", FORMS)
def test_a_changed_set_is_noticed(images: Path, tmp_path: Path, form: str) -> None:
    before = open_source(source_of(form, images), "train", 0)
    moved = copied(form, images, tmp_path / "moved")
    same = open_source(source_of(form, tmp_path / "moved"), "train", 0)
    assert (same.fingerprint(), same.contents()) == (before.fingerprint(), before.contents())
    assert moved != images / form

    folder = Path(shutil.copytree(images / "folder", tmp_path / "folder"))
    image = folder / "train" / CLASSES[0] / f"{CLASSES[0]}_1.JPEG"
    make: Any = make_webdataset if form == "webdataset" else make_parquet
    options = {"write": compressed} if form == "compressed" else {}
    image.write_bytes(image.read_bytes() + b"\0")  # other contents under the same name
    kind = type(source_of(form, tmp_path))
    other = open_source(kind(root=str(make(folder, tmp_path / "a", **options))), "train", 0)
    assert other.fingerprint() == before.fingerprint()
    assert other.contents() != before.contents()
    image.rename(image.with_name("other.JPEG"))
    renamed = open_source(kind(root=str(make(folder, tmp_path / "b", **options))), "train", 0)
    assert renamed.fingerprint() != before.fingerprint()


@pytest.mark.parametrize("form", FORMS)
def test_a_file_that_is_cut_off_while_it_is_read_is_no_corrupt_image(images: Path, tmp_path: Path, form: str) -> None:
    root = copied(form, images, tmp_path)
    source = open_source(source_of(form, tmp_path), "train", 0)
    inside = root / "data" / index_store.FOLDER
    paths = list(inside.glob("*.images")) if form == "compressed" else [*root.glob("*.tar"), *root.glob("*/*.parquet")]
    for path in paths:
        os.truncate(path, 20)
    config = DataConfig(source=source_of(form, tmp_path), image_size=8, batch_size=4, on_corrupt="skip")
    assert "was cut off or replaced since this start" in error_of(lambda: batches(config, 0, 1, source=source))
    for path in paths:
        path.unlink()
    with pytest.raises(OSError, match="No such file"):
        source[0]


@pytest.mark.parametrize("form", FORMS)
def test_an_image_that_does_not_decode_is_named_or_passed_over(tmp_path: Path, form: str) -> None:
    folder = make_folder(tmp_path / "folder", num_train=8)
    broken = folder / "train" / CLASSES[1] / f"{CLASSES[1]}_3.JPEG"
    broken.write_bytes(broken.read_bytes()[:200])
    if form == "webdataset":
        make_webdataset(folder, tmp_path / form)
    else:
        make_parquet(folder, tmp_path / form, write=plain if form == "parquet" else compressed)
    of_folder = dataclasses.replace(everything_on(folder), randaugment=None, mixing=None)
    config = dataclasses.replace(of_folder, source=source_of(form, tmp_path))
    with pytest.raises(CorruptImageError, match=f"{broken.name}.*on-corrupt skip"):
        batches(config, 0, 1, on_corrupt="raise")
    found = batches(config, 0, 2)
    assert as_bytes(found) == as_bytes(batches(of_folder, 0, 2))
    assert sum(rows["is_corrupt"].sum() for rows in found) > 0


def test_splits_are_found_by_name_folder_and_pattern(images: Path, tmp_path: Path) -> None:
    table = packed_sets.table_of(sorted((images / "folder" / "val").glob("*/*")), CLASSES)

    def names(*entries: str) -> list[str]:
        shards = ParquetSource(root=str(tmp_path), train=entries).shards("train")
        return [os.path.relpath(path, tmp_path) for path in shards]

    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        plain(table, tmp_path / "data" / f"{name}.parquet")
    train = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
    for entry in ("train", "Train", "data/train", "data/train-*", "data/tr*.parquet", "data/train-0000{0..1}-of*"):
        assert names(entry) == train, entry
    assert names("data/train-0000{0,1}-of-00002.parquet") == train
    assert names(str(tmp_path / "data" / "train-*.parquet")) == train
    assert names(train[1]) == train[1:]
    assert names("test") == ["data/test-00000-of-00001.parquet"]
    message = error_of(lambda: open_source(ParquetSource(root=str(tmp_path)), "eval", 0))
    assert re.search(
        r"source\.eval = 'validation': .* there is test-.*hold out training images by --data\.num-h", message
    )
    plain(table, tmp_path / "converted" / "validation" / "0000.parquet")
    assert names("converted/validation") == ["converted/validation/0000.parquet"]
    assert names("converted/validation/") == ["converted/validation/0000.parquet"]
    plain(table, tmp_path / "one" / "my.parquet")
    assert names("one/") == ["one/my.parquet"]
    unused = open_source(ParquetSource(root=str(tmp_path), eval=("one/",)), "train", 0).unused
    assert [found.num_files for found in unused] == [1]
    assert re.search(r"data: not used are 1 files of no split that is read, such as '.*test-00000", unused[0].text)

    odd = plain(table, tmp_path / "odd [v2] {a}" / "train-0.parquet").parent
    elsewhere = ParquetSource(root=str(tmp_path)).with_training_of(ParquetSource(root=str(odd)))
    assert elsewhere.shards("train") == ParquetSource(root=str(odd), train=("*",)).shards("train")

    plain(table, tmp_path / "train" / "0.parquet")
    assert re.search(r"source\.train = 'train': is found in .*/train'.*/data'", error_of(lambda: names("train")))


@pytest.mark.parametrize(
    ("files", "entry", "message"),
    [
        (["test-00000-of-00001"], "train", r"has no Parquet file of that split.*there is test-00000-of-00001\.parquet"),
        (["train-00000-of-00001"], "trian-*", r"no file in .* matches; there is train-00000-of-00001\.parquet"),
        (
            ["train-0", "train-2"],
            "train",
            r"1 of the 3 files of the series of 'train-0\.parquet' are missing.*number 1",
        ),
        (["train-00000-of-00003", "train-00002-of-00003"], "train-*", r"1 of the 3 files .* missing, such as number 1"),
        (["train-00001-of-00002"], "train", r"1 of the 2 files .* missing, such as number 0"),
        (["train-00002", "train-00003"], "train", r"1 of the 3 files .* missing, such as number 1"),
        (["train-00000-of-00001", "train-00000-of-00002"], "train", r"several versions of a set"),
        (["train-00000-of-00001-ab", "train-00000-of-00001-cd"], "train", r"have the same number"),
        (["train-0", "validation-0"], "*", r"files of several splits, such as 'train-0\.parquet', 'validation-0"),
        (["train-0", "test-0"], ".", r"files of several splits"),
        (["train-0"], "train-{0..2}.parquet", r"2 of 3 files are missing in .*, such as 'train-1\.parquet'"),
        (["train-0"], "train-{2..0}.parquet", r"\{2\.\.0\} must count upwards"),
        (["train-0"], "train-{0}.parquet", r"must be numbers such as \{0000\.\.1023\}"),
        (["train-0"], "gone.parquet", r"gone\.parquet' is no file that can be found; there is train-0\.parquet"),
        (["train-0"], "gone/", r"gone' has no Parquet file: check the path"),
    ],
)
def test_shards_that_are_missing_or_ambiguous(tmp_path: Path, files: list[str], entry: str, message: str) -> None:
    for name in files:
        (tmp_path / f"{name}.parquet").write_bytes(b"PAR1")
    said = error_of(lambda: ParquetSource(root=str(tmp_path), train=(entry,)).shards("train"))
    assert said.startswith(f"source.train = {entry!r}: ")
    assert re.search(message, said), said


def test_parts_and_numbers_that_are_no_series(tmp_path: Path) -> None:
    for name in ("cifar10", "cifar100", "photos2024", "train-00003-of-00009", "train-00004-of-00009"):
        (tmp_path / f"{name}.parquet").write_bytes(b"PAR1")

    def found(*entries: str) -> int:
        return len(ParquetSource(root=str(tmp_path), train=entries).shards("train"))

    assert found("cifar*") == 2
    assert found("photos*") == 1
    assert found("train-0000{3..4}-of-00009.parquet") == 2
    assert found("train-00003-of-00009.parquet", "train-00004-of-00009.parquet") == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": ()}, r"source\.train = \(\): give at least the name of a split"),
        ({"root": "az://bucket/set"}, r"source\.root = .az://bucket/set.: is a URL"),
        ({"eval": ("s3:/bucket/val",)}, r"source\.eval = 's3:/bucket/val': has one slash"),
        ({"class_names": ("a", "a")}, r"source\.class_names .*must all be different"),
        (
            {"class_names": ("a",), "class_names_file": "b"},
            r"source\.class_names_file = 'b': give source\.class_names or",
        ),
    ],
)
def test_fields_are_checked(fields: dict[str, Any], message: str) -> None:
    for kind in (ParquetSource, WebDatasetSource):
        with pytest.raises(ConfigError, match=message):
            kind(**{"root": "x", **fields})
    with pytest.raises(ConfigError, match=r"source\.label = '': must be the name of a column"):
        ParquetSource(root="x", label="")
    with pytest.raises(ConfigError, match=r"source\.json_key = '': must be the name of an entry"):
        WebDatasetSource(root="x", json_key="")


@pytest.mark.parametrize("form", FORMS)
def test_both_splits_share_no_files(images: Path, tmp_path: Path, form: str) -> None:
    source_of(form, images).check_splits()
    same = source_of(form, images, eval=("train",))
    assert "share 3 files, such as" in error_of(same.check_splits)
    root = copied(form, images, tmp_path)
    folder = root if form == "webdataset" else root / "data"
    shard = min(path for path in folder.iterdir() if "train" in path.name)
    shutil.copy(shard, folder / f"held{shard.suffix}")
    hidden = source_of(form, tmp_path, eval=(str(folder / f"held{shard.suffix}"),))
    assert "share 1 files, such as" in error_of(lambda: open_split(DataConfig(source=hidden), "train"))
    gone = source_of(form, tmp_path / "gone")
    gone.check_splits()  # a run is evaluated where its training images are not
    moved = source_of(form, tmp_path).with_training_of(source_of(form, images))
    assert moved.shards("train") == same.shards("train")
    source_of(form, images).check_outside("workdir", images / "runs")
    assert "is the folder of the" in error_of(lambda: source_of(form, tmp_path).check_outside("workdir", folder))
    placed = source_of(form, Path("x")).with_absolute_places()
    assert (placed.root, placed.train) == (os.path.abspath(Path("x", form)), ("train",))


@pytest.mark.parametrize("form", FORMS)
def test_names_of_classes_may_be_given(images: Path, tmp_path: Path, form: str) -> None:
    given = ("one", "two", "three") if form != "webdataset" else tuple(reversed(CLASSES))
    (tmp_path / "names.txt").write_text("\n".join(given) + "\n\n")
    by_file = source_of(form, images, class_names_file=str(tmp_path / "names.txt"))
    for source in (by_file, source_of(form, images, class_names=given)):
        found = open_source(source, "train", 0)
        assert found.class_names == source.training_classes(0) == given
        for image, label in contents(open_source(source_of(form, images), "train", 0)):
            assert (image, label if form != "webdataset" else 2 - label) in contents(found)
    two = source_of(form, images, class_names=("one", "two") if form != "webdataset" else CLASSES[:2])
    message = "2 names are given, and the files list 3" if form != "webdataset" else "class 'n01484850' is none of"
    assert message in error_of(lambda: open_source(two, "train", 0))
    for text, message in (("", "must have a class name on each line"), ("a\na\n", "each of them once")):
        (tmp_path / "names.txt").write_text(text)
        assert message in error_of(lambda: open_source(by_file, "train", 0))
    (tmp_path / "names.txt").unlink()
    assert "cannot be read" in error_of(lambda: open_source(by_file, "train", 0))


@pytest.mark.parametrize("suffix", [".parquet", ".tar"])
def test_a_file_that_was_not_fetched(tmp_path: Path, suffix: str) -> None:
    form = WebDatasetSource if suffix == ".tar" else ParquetSource
    path = tmp_path / f"train-0{suffix}"
    source = form(root=str(tmp_path))
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    assert "is a pointer of Git LFS, not the file itself: run `git lfs pull`" in error_of(
        lambda: open_source(source, "train", 0)
    )
    path.write_bytes(b"")
    assert "is empty (0 bytes)" in error_of(lambda: open_source(source, "train", 0))
    path.unlink()
    assert "check the path" in error_of(lambda: open_source(source, "train", 0))
    root = dataclasses.replace(source, root=str(tmp_path / "gone"))
    assert re.search(r"source\.root = '.*gone' is no folder", error_of(lambda: open_source(root, "train", 0)))


@pytest.mark.parametrize("form", ["compressed", "webdataset"])
def test_the_commands_train_evaluate_and_examine(
    images: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = copied(form, images, tmp_path)
    words = [word for option in [*runs.OPTIONS, *runs.SMALL] for word in option.replace("=", " ").split(" ")]
    kind = type(source_of(form, tmp_path)).__name__
    options = ["--num-steps", "2", "--data.batch-size", "8", "--data.image-size", "16", "--data.eval-image-size", "16"]
    start = ["train", str(runs.DIGITS), "--workdir", str(tmp_path / "run"), *words, *options, "--data.source", kind]
    assert cli.main([*start, "--data.source.root", str(root)]) == exit_codes.EXIT_DONE
    capsys.readouterr()
    shutil.rmtree(next(root.rglob(index_store.FOLDER)))
    before = sorted(root.rglob("*"))
    assert cli.main(["doctor", "--workdir", str(tmp_path / "run")]) == exit_codes.EXIT_DONE
    assert "train: 60 examples of 3 classes" in capsys.readouterr().out
    assert sorted(root.rglob("*")) == before  # it changes nothing
    assert cli.main(["eval", "--workdir", str(tmp_path / "run")]) == exit_codes.EXIT_DONE
    weights = ["convert", "run", str(tmp_path / "run"), "--out", str(tmp_path / "weights")]
    assert cli.main(weights) == exit_codes.EXIT_DONE
    evaluate = ["eval", "--weights", str(next((tmp_path / "weights").rglob("*.safetensors"))), "--data.source.root"]
    capsys.readouterr()
    for more in ([], ["--data.source", kind]):
        assert cli.main([*evaluate, str(root), *more]) == exit_codes.EXIT_DONE
    found = capsys.readouterr().out.splitlines()
    assert found[: len(found) // 2] == found[len(found) // 2 :]
    shards = sorted(path for path in root.rglob("*train*") if path.suffix in (".tar", ".parquet"))
    shards[-1].unlink()
    for path in shards[:-1]:  # a set of two files
        path.rename(path.with_name(path.name.replace("of-00003", "of-00002")))
    assert cli.main([*start, "--data.source.root", str(root), "--num-steps", "4"]) == exit_codes.EXIT_BAD_INPUT
    assert re.search(r"num_examples: 60 -> 40", capsys.readouterr().err)


def test_an_empty_split_is_an_error(tmp_path: Path) -> None:
    plain(packed_sets.table_of([], CLASSES), tmp_path / "train.parquet")
    write_tar(tmp_path / "train-0.tar", [("README.md", b"nothing")])
    assert "train.parquet: has no image in it" in error_of(
        lambda: open_source(ParquetSource(root=str(tmp_path)), "train", 0)
    )
    message = error_of(lambda: open_source(WebDatasetSource(root=str(tmp_path)), "train", 0))
    assert re.search(r"has no image in it: .*; not used are 1 members .*'README\.md'", message)
