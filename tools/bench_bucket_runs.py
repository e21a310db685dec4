"""Counts the requests of a run to its bucket, and times a start that continues from there.

    python tools/bench_bucket_runs.py [--store gs] [--latency-ms 30]

An emulator of the store runs on 127.0.0.1 behind a proxy that delays each request. The run saves twice; then it is
started again with an empty folder for temporary files, as on another machine, and prints the parts of its start.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests import runs, stores

OPTIONS = ("--num-steps=4", "--checkpoint.every-steps=2", "--eval-every-steps=1000")


def life(place: str, folder: Path, num_steps: int, start_timeout_s: float = 600.0) -> tuple[float, str]:
    """Trains up to a step; returns the seconds it took and what it printed."""
    folder.mkdir()
    started = time.monotonic()
    length = OPTIONS if num_steps == 4 else (*OPTIONS, f"--num-steps={num_steps}")
    process = runs.start(place, *length, environment={"TMPDIR": str(folder)})
    printed = process.communicate(timeout=start_timeout_s)[0]
    if process.returncode != 0:
        raise SystemExit(f"the run ended with code {process.returncode}:\n{printed}")
    return time.monotonic() - started, printed


def counted(requests: list[list[object]]) -> str:
    """Requests by method, without those of the lease, which come every five seconds."""
    kept = [str(method) for _, method, path, *_ in requests if "owner" not in str(path)]
    return f"{len(kept)} requests ({', '.join(f'{count} {name}' for name, count in sorted(Counter(kept).items()))})"


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=stores.KINDS, default="gs", help="kind of the bucket")
    parser.add_argument("--latency-ms", type=float, default=30.0, help="delay of each request")
    options = parser.parse_args()
    delay = [{"do": "slow", "seconds": options.latency_ms / 1e3}]
    with tempfile.TemporaryDirectory() as name, stores.proxied(options.store, delay) as (url, _):
        os.environ |= stores.environment(options.store, url)
        place = f"{options.store}://{stores.BUCKET}/runs/a"
        seconds, _ = life(place, Path(name) / "first", 4)
        before = stores.requests_seen(url)
        print(f"a run with two saves: {seconds:.1f} s, {counted(before)}")
        saves = [entry for entry in before if "checkpoints" in str(entry[2]) or "upload" in str(entry[2])]
        print(f"of them for its two checkpoints, with records: {counted(saves)}")
        seconds, printed = life(place, Path(name) / "second", 4)
        print(
            f"a start that finds the run finished: {seconds:.1f} s, {counted(stores.requests_seen(url)[len(before) :])}"
        )
        print(next(line for line in printed.splitlines() if line.startswith("ready")))


if __name__ == "__main__":
    main()
