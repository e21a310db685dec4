"""Tests sets in buckets for a long time: memory, kills and a full disk, with an emulator on this machine.

    python tools/soak_buckets.py [--kind gs] [--shards 100] [--rounds 20]      (extra `test`)

1. Reads a set of `--shards` shards of 2 MB, first directly, then while copies are made, then from the copies, and
   prints the memory of the process after each tenth of the records. It must stay flat.
2. Starts three processes that read the same set through one folder of copies, and kills one of them after a random
   time, `--rounds` times, each time with new copies. The others must read every record right and fetch no shard twice,
   except the one that the killed process was at.
3. Reads a set with copies on a disk of 24 MB (a `tmpfs`, if this user may mount one), which is too small for it. Every
   record must be right, and other files must still find room.

Prints tables; exits with 1 if anything is wrong.
"""

import argparse
import contextlib
import hashlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from nfnet_flax.data.array_record_source import ArrayRecords, ArrayRecordSource
from nfnet_flax.data.random_access import begin_copying, copies_of, read_ahead
from tests import stores
from tools.bench_buckets import write_files
from tools.prepare_imagenet import Options, run

RECORD_BYTES = 100_000
BATCH = 64


def opened(url: str, cache: str, cache_gib: float | None) -> ArrayRecords:
    """The training split."""
    config = ArrayRecordSource(train=(f"{url}/train-*",), eval=(f"{url}/eval-*",), cache_dir=cache, cache_gib=cache_gib)
    return config.open("train", 0)


def read_all(source: ArrayRecords, *, seed: int) -> Iterator[tuple[int, bytes]]:
    """All records in a random order, read ahead by batches as in training."""
    order = list(range(len(source)))
    random.Random(seed).shuffle(order)
    stop = begin_copying(source, iter(order))
    for start in range(0, len(order), BATCH):
        read_ahead(source, order[start : start + BATCH])
        for index in order[start : start + BATCH]:
            yield index, source[index]["image"]
    stop()


def content_digest(source: ArrayRecords, *, seed: int) -> str:
    """Digest of all records, independent of the order in which they are read."""
    digests = {index: hashlib.blake2b(image, digest_size=16).digest() for index, image in read_all(source, seed=seed)}
    return hashlib.blake2b(b"".join(digests[index] for index in sorted(digests)), digest_size=8).hexdigest()


def memory_mb() -> float:
    """Memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1e3
    raise AssertionError("no VmRSS")


def soak_memory(url: str, cache: Path, wanted: str) -> bool:
    """Reads the set several times, and prints the memory."""
    good = True
    print(f"{'':<24}{'MB after each tenth of the records':<66}{'records/s':>10}")
    for name, room in (("directly", 0.0), ("while copies are made", None), ("from copies", None)):
        source = opened(url, str(cache), room)
        began, found, digests = time.perf_counter(), list[float](), dict[int, bytes]()
        for number, (index, image) in enumerate(read_all(source, seed=1), start=1):
            digests[index] = hashlib.blake2b(image, digest_size=16).digest()
            if number % (len(source) // 10) == 0:
                found.append(memory_mb())
        rate = len(source) / (time.perf_counter() - began)
        whole = hashlib.blake2b(b"".join(digests[index] for index in sorted(digests)), digest_size=8).hexdigest()
        is_flat = max(found[3:]) < 1.1 * min(found[3:])
        good &= is_flat and whole == wanted
        texts = " ".join(f"{value:6.0f}" for value in found)
        print(f"{name:<24}{texts:<66}{rate:>10.0f}{'' if is_flat and whole == wanted else '  WRONG'}", flush=True)
        end = time.monotonic() + 120
        while room is None and (copies := copies_of(source)) is not None and copies.num_missing:
            stop = begin_copying(source, range(len(source)))
            time.sleep(0.5)
            stop()
            assert time.monotonic() < end
    return good


def reader(url: str, cache: Path, seed: int) -> subprocess.Popen[str]:
    """A process that reads the whole set, and prints its digest."""
    code = (
        f"from tools.soak_buckets import *; print(content_digest(opened({url!r}, {str(cache)!r}, None), seed={seed}))"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def soak_kills(url: str, proxy: str, scratch: Path, rounds: int, wanted: str) -> bool:
    """Kills processes that copy."""
    good, numbers = True, random.Random(0)
    print(f"{'killed after, s':<18}{'shards copied twice':>21}{'partial copies left':>21}{'seconds':>9}")
    for number in range(rounds):
        cache, delay_s = scratch / f"kill-{number}", numbers.uniform(1.5, 4.0)
        before, began = len(stores.requests_seen(proxy)), time.monotonic()
        processes = [reader(url, cache, seed) for seed in range(3)]
        time.sleep(delay_s)
        processes[0].kill()
        processes[0].communicate()
        answers = [process.communicate(timeout=300) for process in processes[1:]]
        right = all(answer == wanted for answer, _ in ((out.strip(), error) for out, error in answers))
        # A shard is one request of its whole length; a record is shorter.
        whole = Counter(
            str(entry[2])
            for entry in stores.requests_seen(proxy)[before:]
            if int(str(entry[5])) > 10 * RECORD_BYTES and entry[1] == "GET"
        )
        twice, left = sum(count - 1 for count in whole.values()), len(list(cache.glob("*/*.partial")))
        right &= twice <= 4 and left <= 4  # a process copies four shards at a time
        good &= right
        seconds = time.monotonic() - began
        print(f"{delay_s:<18.2f}{twice:>21}{left:>21}{seconds:>9.1f}{'' if right else '  WRONG'}", flush=True)
        if not right:
            print(answers)
        subprocess.run(["rm", "-rf", str(cache)], check=True)
    return good


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A disk of 24 MB; yields whether there is one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    is_there = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield is_there
    finally:
        if is_there:
            subprocess.run(["umount", str(folder)], check=True)


def soak_full_disk(url: str, folder: Path, wanted: str) -> bool:
    """Reads the set with copies on a disk that is too small."""
    with small_disk(folder) as is_there:
        if not is_there:
            print("full disk: not tried, as this user may not mount a tmpfs")
            return True
        source = opened(url, str(folder / "copies"), None)
        found = content_digest(source, seed=2)
        (folder / "other").write_bytes(bytes(1_000_000))
        copies = copies_of(source)
        assert copies is not None
        num_copied = copies.num_files - copies.num_missing
        good = found == wanted and num_copied > 0
        print(
            f"full disk: {num_copied} of {copies.num_files} shards copied, {'right' if good else 'WRONG'}", flush=True
        )
        del source
        return good


def main() -> int:
    """Runs all tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=stores.KINDS, default="gs")
    parser.add_argument("--shards", type=int, default=100, help="number of shards, of 20 records each")
    parser.add_argument("--rounds", type=int, default=20, help="how often a process is killed")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as name,
        stores.proxied(options.kind, []) as (proxy, _),
    ):
        os.environ.update(stores.environment(options.kind, proxy))
        scratch, url = Path(name), f"{options.kind}://{stores.BUCKET}/set"
        write_files(scratch / "files", 20 * options.shards, RECORD_BYTES)
        shards = {"train_shards": options.shards, "eval_shards": 1, "num_processes": 1}
        for place in (str(scratch / "set"), url):
            run(Options(out=place, folder=scratch / "files", expect_imagenet=False, **shards))
        wanted = content_digest(opened(str(scratch / "set"), str(scratch), None), seed=0)
        good = soak_memory(url, scratch / "copies", wanted)
        good &= soak_full_disk(url, scratch / "disk", wanted)
        good &= soak_kills(url, proxy, scratch, options.rounds, wanted)
    print("all as promised" if good else "NOT as promised")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
