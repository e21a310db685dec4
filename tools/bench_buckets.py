"""Compares ways to read a shuffled epoch of a set in a bucket: an emulator on this machine, with a delay per request.

`python tools/bench_buckets.py [--kind gs] [--delay-ms 30]` (extra `test`) makes a set of random bytes in place of
images, writes it to the emulator, and reads batches as training does, without decoding:

    local     the same files on a disk
    direct    a request for each record
    whole     copies of all shards that a batch needs are waited for
    both      what the package does: a request for each record whose shard is not there yet, copies in the background
    half      the same, with room for half of the copies

For each way it prints the seconds to the first batch, the records/s of the first and the second epoch, and the bytes
that came from the bucket, compared with the size of the set. The emulator and its proxy need processors, too: compare
the rows, and do not take them for what a real store does.
"""

import argparse
import contextlib
import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grain
import numpy as np

from nfnet_flax.data.array_record_source import ArrayRecords, ArrayRecordSource
from nfnet_flax.data.bucket_records import BucketRecords
from nfnet_flax.data.bucket_shards import BucketShards
from nfnet_flax.data.prefetch import Batches, Rows, ThreadLane
from tests import stores
from tools.figures import Row, write_figures
from tools.prepare_imagenet import Options, run

WAYS = ("local", "direct", "whole", "both", "half")
LANES = 2


def write_files(folder: Path, num_records: int, num_bytes: int) -> None:
    """Writes random bytes as files of two classes."""
    rng = np.random.default_rng(0)
    for index in range(num_records):
        path = folder / "train" / f"class_{index % 2}" / f"{index:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.bytes(num_bytes))
    for name in ("class_0", "class_1"):
        (folder / "val" / name).mkdir(parents=True)
        (folder / "val" / name / "0.jpg").write_bytes(rng.bytes(num_bytes))


def source_of(way: str, folder: Path, url: str, cache: Path) -> ArrayRecords:
    """The training split."""
    place = str(folder) if way == "local" else url
    size = sum(path.stat().st_size for path in folder.glob("train-*"))
    room = {"direct": 0.0, "half": size / 2**31}.get(way)
    config = ArrayRecordSource(
        train=(f"{place}/train-*",), eval=(f"{place}/eval-*",), cache_dir=str(cache), cache_gib=room
    )
    return config.open("train", 0)


def fetch(shards: BucketShards, shard: str) -> None:
    """Waits until there is a copy of a shard."""
    with shards.held(shard):
        pass


def read_epochs(way: str, source: ArrayRecords, batch_size: int) -> tuple[float, list[float]]:
    """Seconds to the first batch, and records/s of two epochs."""
    order = grain.MapDataset.range(len(source)).shuffle(seed=0).repeat()
    records = source._records

    def indexes(step: int) -> list[int]:
        return [int(order[position]) for position in range(step * batch_size, (step + 1) * batch_size)]

    def compute(step: int) -> Rows:
        wanted = indexes(step)
        if way == "whole":
            assert isinstance(records, BucketRecords)
            shards = {source.describe(index).split(" record ")[0] for index in wanted}
            with ThreadPoolExecutor(4) as threads:
                list(threads.map(functools.partial(fetch, records.shards), shards))
        else:
            source.read_ahead(iter(wanted))
        return {"num_bytes": np.array([len(source[index]["image"]) for index in wanted])}

    steps = len(source) // batch_size
    started, times = time.perf_counter(), list[float]()
    stop: Callable[[], None] = lambda: None  # noqa: E731
    if way in ("both", "half"):
        stop = source.begin_copying(index for step in range(2 * steps) for index in indexes(step))
    lanes = [ThreadLane(index, compute) for index in range(LANES)]
    with Batches(lanes, range(2 * steps), prefetch_batches=4, stall_timeout_s=300, on_close=stop) as batches:
        for _ in batches:
            times.append(time.perf_counter() - started)
    epochs = [times[steps - 1], times[2 * steps - 1] - times[steps - 1]]
    return times[0], [steps * batch_size / seconds for seconds in epochs]


@contextlib.contextmanager
def bucket(kind: str, delay_s: float) -> Iterator[tuple[str, Callable[[bool], None]]]:
    """A store; yields the URL of its proxy, and a function that turns the delay of each request on or off."""
    with stores.proxied(kind, []) as (url, set_rules):
        os.environ.update(stores.environment(kind, url))
        yield url, lambda is_slow: set_rules([{"do": "slow", "seconds": delay_s}] if is_slow else [])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=stores.KINDS, default="gs")
    parser.add_argument("--delay-ms", type=float, default=30, help="delay of each request")
    parser.add_argument("--num-records", type=int, default=8192)
    parser.add_argument("--kb", type=float, default=100, help="size of a record, in kB")
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the table there, as docs/figures/ has them"
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, bucket(options.kind, options.delay_ms / 1e3) as (proxy, set_slow):
        files, folder, url = Path(scratch, "files"), Path(scratch, "set"), f"{options.kind}://{stores.BUCKET}/set"
        write_files(files, options.num_records, int(1e3 * options.kb))
        for place in (str(folder), url):
            run(
                Options(
                    out=place,
                    folder=files,
                    expect_imagenet=False,
                    train_shards=options.shards,
                    eval_shards=1,
                    num_processes=1,
                )
            )
        set_slow(True)
        size = sum(path.stat().st_size for path in folder.glob("train-*"))
        print(f"{'':<10}{'opened, s':>10}{'1st batch, s':>14}{'records/s':>11}{'2nd epoch':>11}{'bytes':>8}")
        rows: list[Row] = []
        for way in options.ways:
            before = len(stores.requests_seen(proxy))
            began = time.perf_counter()
            source = source_of(way, folder, url, Path(scratch, f"cache-{way}"))
            opened = time.perf_counter() - began
            first, rates = read_epochs(way, source, options.batch_size)
            moved = sum(int(str(entry[5])) for entry in stores.requests_seen(proxy)[before:])
            print(
                f"{way:<10}{opened:>10.2f}{first:>14.2f}{rates[0]:>11.0f}{rates[1]:>11.0f}{moved / size:>8.2f}",
                flush=True,
            )
            rows.append(
                {
                    "way": way,
                    "first batch after": f"{first:.2f} s",
                    "records/s, first epoch": round(rates[0]),
                    "later epochs": round(rates[1]),
                    "bytes moved in two epochs": f"{moved / size:.1f}",
                }
            )
        if options.json:
            write_figures(options.json, rows)


if __name__ == "__main__":
    main()
