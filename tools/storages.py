"""The images of a folder in every kind of storage, and how many a second can be read from each, at random."""

import functools
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from nfnet_flax.data.random_access import Source, SourceConfig
from nfnet_flax.data.source_config import ArrayRecordSource, FolderSource, ParquetSource, WebDatasetSource
from tests.packed_sets import compressed, make_parquet, make_webdataset, plain

ROW_GROUP = 100
"""Rows of a row group, as the Hugging Face hub's library wrote sets of images for years."""
_ROUND_S = 0.5


def write_storages(folder: Path, out: Path) -> None:
    """Writes the images of `folder/train` and `folder/val` as ArrayRecord, Parquet and tar files."""
    tool = str(Path(__file__).with_name("prepare_imagenet.py"))
    command = [sys.executable, tool, f"--out={out / 'array_record'}", f"--folder={folder}", "--no-expect-imagenet"]
    subprocess.run([*command, "--train-shards=3", "--eval-shards=1"], check=True, stdout=subprocess.DEVNULL)
    make_parquet(folder, out / "parquet", write=functools.partial(plain, row_group_size=ROW_GROUP))
    make_parquet(folder, out / "compressed", write=functools.partial(compressed, row_group_size=ROW_GROUP))
    make_webdataset(folder, out / "webdataset")


def storages(folder: Path, out: Path) -> dict[str, SourceConfig]:
    """The source of each kind of storage."""
    records = out / "array_record"
    return {
        "image folder": FolderSource(root=str(folder)),
        "ArrayRecord": ArrayRecordSource(train=(f"{records}/train-*",), eval=(f"{records}/eval-*",)),
        "Parquet": ParquetSource(root=str(out / "parquet")),
        "Parquet, compressed": ParquetSource(root=str(out / "compressed")),
        "tar files": WebDatasetSource(root=str(out / "webdataset")),
    }


def rows_per_second(folder: Path, out: Path, *, num_threads: int, num_rounds: int) -> dict[str, list[float]]:
    """Images per second that threads read at random, decoded by nobody, in each round; storages take turns.

    The last entry reads compressed Parquet files without the copy, each image with its row group.
    """
    configs = storages(folder, out)
    (out / "uncopied").symlink_to(out / "compressed" / "data")
    uncopied = ParquetSource(root=str(out / "uncopied"), cache=str(out / "none"), keep_index=False)
    configs["Parquet, compressed, without the copy"] = uncopied
    sources = {name: config.open("train", 0) for name, config in configs.items()}
    rates: dict[str, list[float]] = {name: [] for name in sources}
    with ThreadPoolExecutor(num_threads) as threads:
        for number in range(-1, num_rounds):
            for name, source in sources.items():
                began = time.perf_counter()
                seeds = [(number + 1) * num_threads + thread for thread in range(num_threads)]
                count = sum(threads.map(functools.partial(_read_for_a_while, source), seeds))
                if number >= 0:  # the first round opens files and fills caches
                    rates[name].append(count / (time.perf_counter() - began))
    return rates


def _read_for_a_while(source: Source, seed: int) -> int:
    order = np.random.default_rng(seed).integers(len(source), size=1 << 16)
    until = time.perf_counter() + _ROUND_S
    for count, index in enumerate(order.tolist(), start=1):
        source[index]
        if time.perf_counter() > until:
            return count
    return len(order)


def print_of_array_record(heading: str, rates: dict[str, list[float]]) -> None:
    """Prints medians, and medians of the ratios to ArrayRecord within a round."""
    if "ArrayRecord" not in rates:
        return
    print(f"\n{heading:<40}{'images/s':>9}{'of ArrayRecord':>16}")
    for name, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(values, rates["ArrayRecord"], strict=True))
        print(f"{name:<40}{statistics.median(values):>9.0f}{ratio:>15.2f}x")
