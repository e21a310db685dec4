"""Breaks the requests of a run to its bucket, and compares what becomes of the run with what is promised.

    python tools/soak_faults.py [--stores gs s3] [--faults "503 for ever" ...]

Emulators of the stores run on 127.0.0.1 behind a proxy (`tests/fault_proxy.py`). For each fault a small digits run
trains until the fault has happened: it must either survive, or end with code 6 and the reason within the time limit.
Then the fault is gone, and the run is continued with an empty folder for temporary files, as on another machine. It
must end with the bits and metrics of a run on a disk that met no fault. Prints a row for each fault; exits with 1 if
anything is wrong.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from nfnet_flax.exit_codes import EXIT_DONE, EXIT_STORAGE_FAILED
from nfnet_flax.storage import BucketFolder, BucketUrl, bucket
from nfnet_flax.training.layout import COMMIT
from tests import runs, stores
from tests.test_processes import TINY
from tools.soak import is_equal

NUM_STEPS = 12
OPTIONS = (*TINY, "--checkpoint.every-steps=4", "--eval-every-steps=6")
WRITES = {"method": "PUT|POST", "after": 45}
"""Writes after the first checkpoint, which is about 30 objects with the records."""
BOUND_S = 300.0
"""Longest time of a life, in seconds: two and a half minutes of repeating, and the run itself on a busy machine."""

# Fault -> its rules, and whether the run survives it.
FAULTS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "503 three times": ([{"do": "status", "status": 503, "times": 3, **WRITES}], True),
    "429": ([{"do": "status", "status": 429, "times": 1, **WRITES}], True),
    "cut in the middle of an upload": ([{"do": "reset", "bytes": 100, "times": 3, **WRITES}], True),
    "answers lost": ([{"do": "lost", "times": 3, **WRITES}], True),
    "answers cut short": ([{"do": "truncate", "bytes": 20, "times": 3, "method": "GET"}], True),
    "a second for each request": ([{"do": "slow", "seconds": 1.0}], True),
    "one request never answered": ([{"do": "hang", "times": 1, **WRITES}], True),
    "deleting forbidden": ([{"do": "status", "status": 403, "body": "no", "method": "DELETE"}], True),
    "401": ([{"do": "status", "status": 401, "body": "no", **WRITES}], False),
    "403": ([{"do": "status", "status": 403, "body": "no", **WRITES}], False),
    "404": ([{"do": "status", "status": 404, "body": "no", **WRITES}], False),
    "503 for ever": ([{"do": "status", "status": 503, **WRITES}], False),
}


def live(place: str, folder: Path) -> tuple[int, float, str]:
    """Trains; returns the exit code, the seconds it took and what it printed."""
    folder.mkdir()
    started = time.monotonic()
    process = runs.start(place, *OPTIONS, environment={"TMPDIR": str(folder)})
    try:
        printed = process.communicate(timeout=BOUND_S)[0]
    except runs.subprocess.TimeoutExpired:
        process.kill()
        printed = process.communicate()[0]
    return process.returncode, time.monotonic() - started, printed


def outcome(kind: str, rules: list[dict[str, Any]], whole: Path, folder: Path, survives: bool) -> str:
    """What became of a run that met a fault; begins with `WRONG` if that is not as promised."""
    with stores.proxied(kind, []) as (url, set_rules):
        os.environ |= stores.environment(kind, url)
        bucket._file_system.cache_clear()
        place = BucketUrl(kind, stores.BUCKET, "runs/a")
        set_rules(rules)
        code, seconds, printed = live(str(place), folder / "first")
        set_rules([])
        names = BucketFolder(place).files("checkpoints")
        steps = sorted(int(name.split("/")[1]) for name in names if name.endswith(f"/{COMMIT}"))
        reason = printed.strip().splitlines()[-1][-160:]
        if code != (EXIT_DONE if survives else EXIT_STORAGE_FAILED):
            return f"WRONG: code {code} after {seconds:.0f} s\n{printed}"
        again, _, printed = live(str(place), folder / "second")
        if again != EXIT_DONE or not is_equal(whole, runs.copied(str(place), NUM_STEPS), NUM_STEPS):
            return f"WRONG: code {again}, or other results, of the second start\n{printed}"
    said = "survived" if survives else f"code {code}: {reason}"
    return f"{seconds:.0f} s, checkpoints {steps}: {said}"


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stores", nargs="+", choices=stores.KINDS, default=list(stores.KINDS))
    parser.add_argument("--faults", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    options = parser.parse_args()
    good = True
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "whole"
        code, _, printed = live(str(whole), Path(name) / "tmp")
        if code != EXIT_DONE:
            print(printed)
            return 1
        for kind in options.stores:
            for fault in options.faults:
                folder = Path(name) / f"{kind}-{fault}"
                folder.mkdir()
                rules, survives = FAULTS[fault]
                found = outcome(kind, rules, whole, folder, survives)
                good &= not found.startswith("WRONG")
                print(f"{kind}: {fault}: {found}", flush=True)
    print("all as promised" if good else "NOT as promised")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
