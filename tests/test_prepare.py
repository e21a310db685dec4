"""tools/prepare_imagenet.py as a real process on small files of the real layout."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from array_record.python.array_record_module import ArrayRecordReader  # type: ignore[import-untyped]

from nfnet_flax.config import ConfigError
from nfnet_flax.data.listing import list_tars
from tests.image_sets import CLASSES, image_file, make_folder, make_tars, prepare, prepare_command
from tests.packed_sets import compressed, make_parquet, make_webdataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def tars(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return make_tars(folder, tmp_path_factory.mktemp("tars") / "tars")


@pytest.fixture(scope="module")
def prepared(tars: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "deep" / "set"
    printed = prepare(out, *tars, "--verify")
    assert "train: 12 images of 3 classes are sound" in printed
    assert "eval: 6 images of 3 classes are sound" in printed
    return out


def records(path: Path) -> Iterator[tuple[int, str, bytes]]:
    """Label, name and image of each record of a shard, by the description of the format alone."""
    reader = ArrayRecordReader(str(path))
    assert "group_size:1," in reader.writer_options_string()
    for record in reader.read_all():
        assert int.from_bytes(record[:4], "little") == zlib.crc32(record[4:])
        end = 10 + int.from_bytes(record[8:10], "little")
        yield int.from_bytes(record[4:8], "little", signed=True), record[10:end].decode(), record[end:]
    reader.close()


def state(out: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of every file."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.iterdir() if path.name != ".lock"}


def failing(command: list[str], code: int = 2) -> str:
    """Runs a command that must fail as bad input does, or with another code; returns its message."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr
    return done.stderr


def test_shards_hold_every_image_once_in_the_order_of_a_hash(prepared: Path, folder: Path) -> None:
    for split, source, num_shards in (("train", "train", 3), ("eval", "val", 2)):
        shards = sorted(prepared.glob(f"{split}-*"))
        assert [shard.name for shard in shards] == [
            f"{split}-{i:05d}-of-{num_shards:05d}.array_record" for i in range(num_shards)
        ]
        found = [record for shard in shards for record in records(shard)]
        files = [f"{path.parent.name}/{path.name}" for path in (folder / source).glob("*/*")]
        files.sort(key=lambda name: hashlib.blake2b(name.encode(), digest_size=8).digest())
        assert found == [
            (CLASSES.index(name.split("/")[0]), name, (folder / source / name).read_bytes()) for name in files
        ]


def test_the_manifest_describes_the_files(prepared: Path) -> None:
    manifest = json.loads((prepared / "train.json").read_text())
    assert manifest["class_names"] == list(CLASSES)
    for shard in manifest["shards"]:
        data = (prepared / shard["file"]).read_bytes()
        assert (shard["num_bytes"], shard["blake2b"]) == (len(data), hashlib.blake2b(data).hexdigest())
        assert shard["num_records"] == 4
    assert {path.suffix for path in prepared.iterdir()} == {".json", ".array_record", ""}  # and the hidden lock


def test_again_does_nothing(prepared: Path, tars: list[str]) -> None:
    before = state(prepared)
    printed = prepare(prepared, *tars)
    assert printed.count("nothing to do (their contents were not compared)") == 2
    assert state(prepared) == before


def test_a_set_is_not_written_into_the_images_that_it_is_made_from(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    before = sorted(folder.rglob("*"))
    for out in (tmp_path / "link" / "train", folder / "val" / CLASSES[0] / "set"):
        message = failing(prepare_command(out, f"--folder={folder}"))
        assert f"lies in the image folder '{folder}/" in message
    assert sorted(folder.rglob("*")) == before


def test_a_folder_and_a_list_of_classes_give_the_same_files(
    prepared: Path, folder: Path, tars: list[str], tmp_path: Path
) -> None:
    prepare(tmp_path / "folder", f"--folder={folder}", "--num-processes=1")
    synsets = Path(tars[2].split("=")[1]).parent / "synsets.txt"
    prepare(tmp_path / "listed", *tars[:2], f"--val-synsets={synsets}")
    alone = tmp_path / "alone.txt"
    alone.write_text("".join(f"{line.split()[1]}\n" for line in synsets.read_text().splitlines()))
    prepare(tmp_path / "alone", *tars[:2], f"--val-synsets={alone}")
    for shard in prepared.glob("*.array_record"):
        for other in ("folder", "listed", "alone"):
            assert (tmp_path / other / shard.name).read_bytes() == shard.read_bytes()


def test_parquet_and_tar_files_give_the_same_files(prepared: Path, folder: Path, tmp_path: Path) -> None:
    make_parquet(folder, tmp_path / "parquet")
    make_parquet(folder, tmp_path / "compressed", write=compressed)
    make_webdataset(folder, tmp_path / "tars")
    for form, option in (("parquet", "parquet"), ("compressed", "parquet"), ("tars", "webdataset")):
        out, before = tmp_path / "out" / form, sorted((tmp_path / form).rglob("*"))
        prepare(out, f"--{option}={tmp_path / form}", "--num-processes=1")
        for shard in prepared.glob("*.array_record"):
            assert (out / shard.name).read_bytes() == shard.read_bytes()
        assert not (out / ".nfnet_index").exists()  # nor is anything written where the images come from
        assert sorted((tmp_path / form).rglob("*")) == before
    wrong = f"--parquet={tmp_path / 'parquet'}"
    assert "'tset'" in failing(prepare_command(tmp_path / "set", wrong, "--split", "train", "tset"))
    assert "--folder" in failing(prepare_command(tmp_path / "set", wrong, f"--folder={folder}"))
    assert "is the folder of the Parquet files" in failing(prepare_command(tmp_path / "parquet" / "data", wrong))


def test_killed_and_started_again_it_keeps_finished_shards(folder: Path, tmp_path: Path) -> None:
    big = make_folder(tmp_path / "big")
    for path in big.glob("*/*/*"):
        path.write_bytes(path.read_bytes() + bytes(2_000_000))  # decoders ignore what follows the image
    tars = make_tars(big, tmp_path / "tars")
    out, first = tmp_path / "set", tmp_path / "set" / "train-00000-of-00012.array_record"
    command = prepare_command(out, *tars, "--num-processes=1", train_shards=12)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 30
    while not first.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
    os.kill(process.pid, signal.SIGKILL)  # the main process alone: its worker must not go on without it
    process.communicate(timeout=10)  # ends when the worker, which holds the same pipe, has ended
    kept = {name: value for name, value in state(out).items() if name.endswith(".array_record")}
    assert 1 <= len(kept) < 12
    assert not (out / "train.json").exists()

    assert "does not exist" in failing(prepare_command(out, "--verify"))
    assert "another input" in failing(prepare_command(out, f"--folder={folder}", train_shards=12))
    printed = prepare(out, *tars, "--verify", train_shards=12)
    assert f"12 images to 12 shards, of which {len(kept)} exist" in printed
    after = state(out)
    assert {name: after[name] for name in kept} == kept
    assert not [name for name in after if name.endswith(".partial")]
    assert {name: image for path in out.glob("train-*") for _, name, image in records(path)} == {
        f"{path.parent.name}/{path.name}": path.read_bytes() for path in (big / "train").glob("*/*")
    }


def test_verify_names_shard_and_record_of_a_flipped_byte(tars: list[str], tmp_path: Path) -> None:
    prepare(tmp_path / "set", *tars)
    shard = tmp_path / "set" / "train-00001-of-00003.array_record"
    data = bytearray(shard.read_bytes())
    image = list(records(shard))[2][2]
    data[data.index(image) + len(image) // 2] ^= 1
    shard.write_bytes(data)
    command = prepare_command(tmp_path / "set", "--verify")
    message = failing(command)
    assert re.findall(r"(train-\S+) record (\d+)", message) == [(shard.name, "2")]
    assert "1 problems" in message

    # A byte that belongs to no record; then none at all.
    data = bytearray((tmp_path / "set" / "eval-00000-of-00002.array_record").read_bytes())
    data[-70_000] ^= 1
    (tmp_path / "set" / "eval-00000-of-00002.array_record").write_bytes(data)
    (tmp_path / "set" / "train-00000-of-00003.array_record").unlink()
    message = failing(command)
    assert "eval-00000-of-00002.array_record was changed outside its records" in message
    assert "train-00000-of-00003.array_record is missing" in message

    # What is damaged is not kept when the missing one is written again.
    assert f"{shard} record 2 is damaged" in failing(prepare_command(tmp_path / "set", *tars))
    shard.unlink()
    (tmp_path / "set" / "eval-00000-of-00002.array_record").unlink()
    assert "are sound" in prepare(tmp_path / "set", *tars, "--verify")


def test_verify_finds_what_does_not_decode(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    bad = root / "train" / CLASSES[1] / f"{CLASSES[1]}_2.JPEG"
    bad.write_bytes(image_file(0)[:-200])
    (root / "val" / CLASSES[0] / "empty.JPEG").write_bytes(b"")
    message = failing(prepare_command(tmp_path / "set", f"--folder={root}", "--verify"))
    assert f"({CLASSES[1]}/{bad.name}) does not decode" in message
    assert f"({CLASSES[0]}/empty.JPEG) does not decode" in message
    assert "2 problems" in message


def test_imagenet_is_expected_unless_told_otherwise(prepared: Path, tars: list[str], tmp_path: Path) -> None:
    for options in (["--verify"], tars):
        command = [word for word in prepare_command(prepared, *options) if word != "--no-expect-imagenet"]
        assert "train has 3 classes, ImageNet has 1,000" in failing(command)
    assert "another input or of another number" in failing(prepare_command(prepared, *tars, train_shards=4))
    assert "train has only 12 images" in failing(prepare_command(tmp_path, *tars, train_shards=13))


@pytest.mark.parametrize("name", ["train.tar", "val.tar", "devkit.tar.gz"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "text", "other"])
def test_a_damaged_download_is_bad_input(tars: list[str], tmp_path: Path, name: str, damage: str) -> None:
    good = {Path(option.split("=")[1]).name: Path(option.split("=")[1]).read_bytes() for option in tars}
    for file, data in good.items():
        (tmp_path / file).write_bytes(data)
    victim = tmp_path / name
    match damage:
        case "missing":
            victim.unlink()
        case "empty":
            victim.write_bytes(b"")
        case "cut":
            victim.write_bytes(good[name][: len(good[name]) // 2])
        case "text":
            victim.write_text("404 not found\n" * 100)
        case "other":
            victim.write_bytes(good["val.tar" if name != "val.tar" else "train.tar"])
    with pytest.raises(ConfigError, match=re.escape(name)):
        list_tars(tmp_path / "train.tar", tmp_path / "val.tar", devkit=tmp_path / "devkit.tar.gz", val_synsets=None)


def test_bad_input_is_a_message_and_exit_code_2(tars: list[str], tmp_path: Path) -> None:
    message = failing(prepare_command(tmp_path / "set", tars[0]))
    assert "--val-tar" in message
    assert "--devkit" in message
    assert "none.tar' cannot be read" in failing(prepare_command(tmp_path / "set", "--train-tar=none.tar", *tars[1:]))
    assert not (tmp_path / "set").exists()
    assert "--verify" in failing(prepare_command(tmp_path / "set"))


def test_a_file_that_cannot_be_written_is_bad_input(folder: Path, tmp_path: Path) -> None:
    command = prepare_command(tmp_path / "set", f"--folder={folder}")
    message = failing(["bash", "-c", 'ulimit -f 1; exec "$@"', "bash", *command])  # files of at most 1 KiB
    assert re.search(r"array_record' cannot be written: .*File too large", message)
    assert {path.name for path in (tmp_path / "set").iterdir()} == {".lock", "train.plan.json"}
    prepare(tmp_path / "set", f"--folder={folder}")


def test_names_in_a_tar_reach_no_path(tmp_path: Path, folder: Path) -> None:
    tars = make_tars(folder, tmp_path / "tars")
    with tarfile.open(tmp_path / "tars" / "val.tar", "a") as tar:
        link = tarfile.TarInfo("ILSVRC2012_val_99999999.JPEG")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        hidden = tarfile.TarInfo("../../._x.JPEG")
        tar.addfile(hidden)
    before = set(tmp_path.rglob("*"))
    prepare(tmp_path / "set", *tars)
    assert {path.parent for path in set(tmp_path.rglob("*")) - before} == {tmp_path, tmp_path / "set"}
    assert sum(len(list(records(shard))) for shard in (tmp_path / "set").glob("eval-*")) == 6


def test_what_cannot_be_printed_stops_nothing(folder: Path, tmp_path: Path) -> None:
    command = prepare_command(tmp_path / "set", f"--folder={folder}", "--num-processes=1")
    closed = subprocess.run(["bash", "-c", '"$@" >&- 2>&-', "bash", *command], timeout=60, check=False)
    assert closed.returncode == 0
    assert sum(len(list(records(shard))) for shard in (tmp_path / "set").glob("*.array_record")) == 18
    verify = prepare_command(tmp_path / "set", "--verify")
    left = subprocess.run(["bash", "-c", '"$@" 2>&1 >/dev/full', "bash", *verify], timeout=60, check=False, stdout=-1)
    assert left.returncode == 0
    assert b"stdout cannot be written" in left.stdout


def test_an_image_that_cannot_be_read_is_a_failed_input_and_no_bad_shard(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    bad = root / "train" / CLASSES[1] / "bad.jpg"
    bad.symlink_to("/proc/self/mem")  # can be opened; to read it is an input/output error
    message = failing(prepare_command(tmp_path / "set", f"--folder={root}", "--num-processes=1"), code=4)
    assert re.search(
        rf"the input failed: {CLASSES[1]}/bad.jpg in '{root}/train' cannot be read: .*(error|address)", message
    )
    bad.unlink()
    assert "are sound" in prepare(tmp_path / "again", f"--folder={root}", "--verify")


def test_what_is_not_used_is_said_and_what_was_replaced_is_noticed(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    (root / "val" / CLASSES[0] / "notes.txt").write_text("of the set")
    command = prepare_command(tmp_path / "set", f"--folder={root}", "--num-processes=1")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert f"{root}/val: not used are 1 files whose names end in none of" in done.stderr
    (root / "train" / CLASSES[1] / f"{CLASSES[1]}_2.JPEG").write_bytes(image_file(77))
    assert "another input" in failing(command)


def test_only_paths_of_this_machine_are_taken(folder: Path, tmp_path: Path) -> None:
    for out in ("az://bucket/set", "s3:/bucket/set"):
        command = [word if not word.startswith("--out") else f"--out={out}" for word in prepare_command(tmp_path)]
        done = subprocess.run(
            [*command, f"--folder={folder}"], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
        )
        assert done.returncode == 2
        assert "--out = " in done.stderr
        assert "is a URL" in done.stderr or "one slash" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_error_waits_for_the_pool_of_workers() -> None:
    """Otherwise the thread of the pool runs on while Python ends, which then fails with a traceback now and then."""
    code = """
import threading
from nfnet_flax.data.shards import worker_pool

try:
    with worker_pool(2) as pool:
        assert pool.submit(abs, -1).result() == 1
        raise RuntimeError
except RuntimeError:
    assert threading.enumerate() == [threading.main_thread()], threading.enumerate()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=Path(__file__).parent.parent)
