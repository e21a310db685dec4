"""Writes ImageNet, or any set in an image folder, Parquet files or tar files of WebDataset, as sharded ArrayRecord
files with random access; or checks such files.

    python tools/prepare_imagenet.py --out data/imagenet --train-tar ILSVRC2012_img_train.tar \
        --val-tar ILSVRC2012_img_val.tar --devkit ILSVRC2012_devkit_t12.tar.gz
    python tools/prepare_imagenet.py --out data/pets --folder pets --no-expect-imagenet --train-shards 8 --eval-shards 2
    python tools/prepare_imagenet.py --out data/beans --parquet beans --no-expect-imagenet --train-shards 4
    python tools/prepare_imagenet.py --out data/imagenet --verify

--out may be a place in a bucket, such as gs://BUCKET/imagenet or s3://BUCKET/imagenet (extra gcs or s3). Files are then
made one by one in the system's folder for temporary files (TMPDIR), and uploaded.

If it was stopped or killed, the same command continues: finished shards are kept. The images are recognized by their
names, sizes and classes: if one was replaced by another of the same size, give an empty folder. Labels are the
positions of the sorted WordNet ids (folder names). Within a split the examples are ordered by a hash of
`class_name/file_name`: neighbouring examples have different classes, and a folder, the tars, and the sets made from
either have the same order. Nothing is unpacked to disk, but the images of compressed Parquet files while the command
runs, and the images are stored byte for byte. The result needs as much space as the tars or the folder.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import tyro

from nfnet_flax import streams
from nfnet_flax.config import ConfigError, require
from nfnet_flax.config_json import to_json
from nfnet_flax.data.array_records import FORMAT_VERSION, Manifest, Shard, manifest_name, read_manifest, shard_name
from nfnet_flax.data.buckets import Place
from nfnet_flax.data.listing import Listing, list_folder, list_packed, list_tars
from nfnet_flax.data.packed_source import PackedSource
from nfnet_flax.data.prefetch import InputFailed
from nfnet_flax.data.random_access import digest
from nfnet_flax.data.shards import PARTIAL_SUFFIX, check_shard, make_shard, worker_pool
from nfnet_flax.data.source_config import FolderSource, ParquetSource, WebDatasetSource
from nfnet_flax.exit_codes import EXIT_BAD_INPUT, EXIT_DONE, EXIT_INPUT_FAILED, EXIT_STORAGE_FAILED
from nfnet_flax.json_files import StorageFailed, json_content, parse_json
from nfnet_flax.output import guarded_output
from nfnet_flax.paths import local_path
from nfnet_flax.progress import showing, tracking
from nfnet_flax.storage import BucketUrl, bucket_url, folder_at

IMAGENET_EXAMPLES = {"train": 1_281_167, "eval": 50_000}
IMAGENET_CLASSES = 1000
MAX_PROBLEMS_SHOWN = 20
INDEX = ".nfnet_index"
"""Folder for the index of Parquet files or tar files, while a set is prepared from them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Give the tar files, or a folder, or only --verify."""

    out: str
    """Folder of the prepared set, or its URL in a bucket (gs://, s3://)."""
    train_tar: Path | None = None
    """The file ILSVRC2012_img_train.tar."""
    val_tar: Path | None = None
    """The file ILSVRC2012_img_val.tar."""
    devkit: Path | None = None
    """The file ILSVRC2012_devkit_t12.tar.gz, which contains the classes of the validation images."""
    val_synsets: Path | None = None
    """Text file that replaces --devkit: each line is 'ILSVRC2012_val_00000001.JPEG n01751748', or only the class."""
    folder: Path | None = None
    """Folder that replaces the tar files, with the images train/CLASS/* and val/CLASS/*."""
    parquet: Path | None = None
    """Folder of Parquet files that replaces the tar files, as ParquetSource reads it (extra parquet)."""
    webdataset: Path | None = None
    """Folder of tar files in the form of WebDataset that replaces the tar files, as WebDatasetSource reads it."""
    split: tuple[str, str] = ("train", "validation")
    """Names of the splits in that folder, or patterns of their files."""
    image: str = "image"
    """Column of Parquet files with the images."""
    label: str = "label"
    """Column of Parquet files with the classes, or entry of JSON labels in tar files."""
    class_names_file: Path | None = None
    """Text file with the names of their classes, if the files have only numbers."""
    verify: bool = False
    """Check numbers of images, checksums, and that every image can be decoded. If there is something to prepare, this
    is done afterwards."""
    expect_imagenet: bool = True
    """Refuse a set that does not have ImageNet's 1000 classes, 1,281,167 training and 50,000 validation images."""
    train_shards: int = 256
    """Number of files of the training split."""
    eval_shards: int = 16
    """Number of files of the held-out split."""
    num_processes: int = os.cpu_count() or 1
    """Number of shards that are written or checked at the same time."""

    def __post_init__(self) -> None:
        tars = (self.train_tar, self.val_tar, self.devkit or self.val_synsets)
        require(all(tars) or not any(tars), "--train-tar", self.train_tar, "give --val-tar and --devkit along with it")
        require(not (self.devkit and self.val_synsets), "--val-synsets", self.val_synsets, "leave out, or --devkit")
        folders = [folder for folder in (self.folder, self.parquet, self.webdataset) if folder is not None]
        require(len(folders) + any(tars) <= 1, "--folder", self.folder, "give one of the tars, this, and other folders")
        remedy = "give this, or the tars, or --folder, --parquet or --webdataset"
        require(any((*tars, *folders, self.verify)), "--verify", False, remedy)
        for name, value in (("train", self.train_shards), ("eval", self.eval_shards)):
            require(1 <= value <= 99_999, f"--{name}-shards", value, "must lie in [1, 99999]")
        require(self.num_processes >= 1, "--num-processes", self.num_processes, "must be at least 1")

    def with_resolved_paths(self) -> "Options":
        """The same options with absolute paths of the input, without `~` and links.

        Raises:
          ConfigError: one of them is a URL, or not a valid path.
        """
        resolved: dict[str, Any] = {
            name: local_path(f"--{name.replace('_', '-')}", value)
            for name, value in vars(self).items()
            if isinstance(value, Path)
        }
        return dataclasses.replace(self, **resolved)

    def place(self) -> Place:
        """Where the set is or shall be.

        Raises:
          ConfigError: it is no valid path, or a URL of a kind that is not supported.
        """
        return bucket_url("--out", self.out) or local_path("--out", self.out)

    def packed_source(self, index: Path) -> PackedSource | None:
        """The set of Parquet files or tar files; its index is kept in the folder `index` meanwhile."""
        names = None if self.class_names_file is None else str(self.class_names_file)
        train, held_out = ((entry,) for entry in self.split)
        if self.parquet is not None:
            return ParquetSource(
                root=str(self.parquet),
                train=train,
                eval=held_out,
                image=self.image,
                label=self.label,
                class_names_file=names,
                cache=str(index),
            )
        if self.webdataset is None:
            return None
        return WebDatasetSource(
            root=str(self.webdataset),
            train=train,
            eval=held_out,
            json_key=self.label,
            class_names_file=names,
            cache=str(index),
        )

    def num_shards(self, split: str) -> int:
        """Number of files of a split."""
        return self.train_shards if split == "train" else self.eval_shards


def check_counts(split: str, class_names: Sequence[str], num_examples: int) -> None:
    """Raises ConfigError unless a split has ImageNet's numbers of classes and images."""
    for kind, found, wanted in (
        ("classes", len(class_names), IMAGENET_CLASSES),
        ("images", num_examples, IMAGENET_EXAMPLES[split]),
    ):
        if found != wanted:
            raise ConfigError(
                f"{split} has {found:,} {kind}, ImageNet has {wanted:,}: download it again, or give "
                "--no-expect-imagenet if it is another set"
            )


def _show_progress(label: str, futures: Sequence[Future], num_images: Sequence[int]) -> None:
    """Waits for all futures and shows their progress; raises the first of their errors."""
    number_of = dict(zip(futures, num_images, strict=True))
    with tracking(label, sum(num_images), "images") as task:
        for finished, future in enumerate(as_completed(futures), start=1):
            future.result()
            task.advance(number_of[future])
            task.text = f"{label}, {finished} of {len(futures)} shards"


def prepare_split(options: Options, split: str, listing: Listing, pool: ProcessPoolExecutor) -> None:
    """Writes the missing shards of a split, then its manifest.

    Raises:
      ConfigError: the folder contains shards of another input, or there are fewer images than shards.
    """
    num_shards = options.num_shards(split)
    require(num_shards <= len(listing), f"--{split}-shards", num_shards, f"{split} has only {len(listing)} images")
    input_digest = digest(listing.digest(), str(num_shards))
    place = options.place()
    folder = folder_at(place if isinstance(place, BucketUrl) else str(place))
    plan, manifest = f"{split}.plan.json", manifest_name(split)
    names = [shard_name(split, index, num_shards) for index in range(num_shards)]
    sizes = folder.files()
    if manifest in sizes:
        old = read_manifest(place, split)
        known = old.input_digest
        if known == input_digest and all(sizes.get(shard.file) == shard.num_bytes for shard in old.shards):
            print(
                f"{split}: complete, {len(listing):,} images of the same names and sizes in {num_shards} shards: "
                "nothing to do (their contents were not compared)"
            )
            return
    elif plan in sizes:
        known = str(parse_json(folder.read(plan), f"{place}/{plan}", "give an empty folder").get("input_digest"))
    else:
        known = "" if any(name.startswith(f"{split}-") for name in sizes) else input_digest
    if known != input_digest:
        raise ConfigError(
            f"{str(place)!r} holds {split} shards of another input or of another number of shards: give an empty folder"
        )
    if manifest not in sizes:
        folder.put(plan, json_content({"input_digest": input_digest}))
    borders = [len(listing) * index // num_shards for index in range(num_shards + 1)]
    parts = [listing.part(start, stop) for start, stop in itertools.pairwise(borders)]
    kept = sum(name in sizes for name in names)
    print(f"{split}: {len(listing):,} images to {num_shards} shards, of which {kept} exist", flush=True)
    futures: list[Future[Shard]] = [pool.submit(make_shard, place, *job) for job in zip(names, parts, strict=True)]
    _show_progress(split, futures, [len(part) for part in parts])
    shards = tuple(future.result() for future in futures)
    result = Manifest(
        format_version=FORMAT_VERSION, class_names=listing.class_names, input_digest=input_digest, shards=shards
    )
    folder.put(manifest, json_content(to_json(result)))
    folder.delete([plan])


def verify_split(options: Options, split: str, pool: ProcessPoolExecutor) -> list[str]:
    """Checks every shard that the manifest lists; returns one line per problem."""
    place = options.place()
    manifest = read_manifest(place, split)
    if options.expect_imagenet:
        check_counts(split, manifest.class_names, manifest.num_records)
    futures = [pool.submit(check_shard, place, shard, manifest.class_names) for shard in manifest.shards]
    _show_progress(f"verify {split}", futures, [shard.num_records for shard in manifest.shards])
    problems = [problem for future in futures for problem in future.result()]
    if not problems:
        print(f"{split}: {manifest.num_records:,} images of {len(manifest.class_names)} classes are sound")
    return problems


@contextlib.contextmanager
def _sole_owner(folder: Place) -> Iterator[None]:
    """Prevents that a second process uses the folder, and removes incomplete files of a killed process.

    In a bucket neither is needed: an object appears when it is complete, and a second process writes the same bytes.
    """
    if isinstance(folder, BucketUrl):
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another process is preparing {str(folder)!r}: wait for it, or stop it") from error
        for partial in folder.glob(f"*{PARTIAL_SUFFIX}"):
            partial.unlink()
        yield


def run(options: Options) -> None:
    """Prepares and then verifies a set, depending on the options.

    Raises:
      ConfigError: something is wrong with the input or the output.
      InputFailed: the input cannot be read.
    """
    options = options.with_resolved_paths()
    place = options.place()
    if isinstance(place, Path):
        _run(options, place, place / INDEX)
        return
    with tempfile.TemporaryDirectory(prefix="nfnet_flax-") as index:
        _run(options, place, Path(index))


def _run(options: Options, place: Place, index: Path) -> None:
    """Like `run`; the index of Parquet or tar files is kept in the folder `index` meanwhile."""
    listings: dict[str, Listing] = {}
    if options.folder is not None:
        if isinstance(place, Path):
            FolderSource(root=str(options.folder)).check_outside("--out", place)
        listings = list_folder(options.folder)
    elif (packed := options.packed_source(index)) is not None:
        if isinstance(place, Path):
            packed.check_outside("--out", place)
        listings = list_packed(packed)
    elif options.train_tar is not None and options.val_tar is not None:
        listings = list_tars(options.train_tar, options.val_tar, devkit=options.devkit, val_synsets=options.val_synsets)
    for split, listing in listings.items():
        for found in listing.unused:
            print(f"prepare_imagenet: {found.text}", file=sys.stderr, flush=True)
        if options.expect_imagenet:
            check_counts(split, listing.class_names, len(listing))
    with worker_pool(options.num_processes) as pool:
        if listings:
            with _sole_owner(place):
                for split, listing in listings.items():
                    prepare_split(options, split, listing, pool)
                shutil.rmtree(index, ignore_errors=True)
        problems = (
            [problem for split in ("train", "eval") for problem in verify_split(options, split, pool)]
            if options.verify
            else []
        )
    if problems:
        shown = "\n  ".join(problems[:MAX_PROBLEMS_SHOWN])
        more = f"\n  and {len(problems) - MAX_PROBLEMS_SHOWN} more" if len(problems) > MAX_PROBLEMS_SHOWN else ""
        raise ConfigError(f"{len(problems)} problems:\n  {shown}{more}")


def main() -> int:
    """Runs the command line; returns the exit code, which does not depend on whether anything can be printed."""
    streams.open_missing()
    try:
        with guarded_output(goes_on=True), showing():
            return _main()
    finally:
        streams.drop_unwritten()


def _main() -> int:
    try:
        run(tyro.cli(Options, description=__doc__))
    except InputFailed as error:
        print(f"prepare_imagenet: the input failed: {error}", file=sys.stderr)
        return EXIT_INPUT_FAILED
    except StorageFailed as error:
        print(f"prepare_imagenet: the bucket failed: {error}", file=sys.stderr)
        return EXIT_STORAGE_FAILED
    except (ConfigError, OSError) as error:
        print(f"prepare_imagenet: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 128 + signal.SIGINT
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
