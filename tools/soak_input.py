"""Tests the input in real processes: runs that are stopped, workers that are killed, and the batches of every layout.

    python tools/soak_input.py --repeats 20

Stops a run of the digits recipe with two worker processes many times by a SIGTERM to its process group, each time a
little later. The run continues from its own checkpoint, which shows that the checkpoint is complete. Then kills a
worker of that run `--kills` times. Then compares the batches for several numbers of processes and workers. Prints
tables; exits with 1 if anything is wrong.
"""

import argparse
import dataclasses
import hashlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from nfnet_flax.data import pipeline
from nfnet_flax.data.augment_config import CropAugment
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.mixing_config import MixingConfig, RandAugmentConfig
from nfnet_flax.data.source_config import FolderSource
from nfnet_flax.exit_codes import EXIT_INPUT_FAILED, EXIT_STOPPED

DIGITS = Path(__file__).parent.parent / "recipes" / "digits.py"
OPTIONS = [
    *("--num-steps", "1000000", "--log-every-steps", "1"),
    *("--eval-every-steps", "1000000", "--checkpoint.every-steps", "1000000"),
    *("--model.widths", "16", "32", "--model.depths", "1", "1"),
    *("--data.num-workers", "2"),
]


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a run ended after it was disturbed."""

    started_from: int
    disturbed_at: int
    exit_code: int
    seconds: float
    printed: str
    survivors: int
    """Number of workers that still run after the end of the run."""
    shared_memory: int
    """Number of files left in /dev/shm."""


def shared_memory() -> set[str]:
    """Names of the files in /dev/shm."""
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()


def workers_of(pid: int) -> list[int]:
    """Worker processes of a run."""
    children = [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
    return [child for child in children if b"nfnet_flax.data.workers" in Path(f"/proc/{child}/cmdline").read_bytes()]


def disturb(workdir: Path, num_lines: int, *, kill_worker: bool) -> Ending:
    """Starts or continues the run, and stops it or kills a worker once it has printed `num_lines` steps."""
    before = shared_memory()
    process = subprocess.Popen(
        [sys.executable, "-m", "nfnet_flax.cli", "train", str(DIGITS), "--workdir", str(workdir), *OPTIONS],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    assert process.stdout is not None
    printed, step, seen, at, pids = "", 0, 0, 0.0, list[int]()
    for line in process.stdout:
        printed += line
        if found := re.match(r"step +(\d+)/", line):
            seen += 1
            if seen == num_lines:
                step, at, pids = int(found[1]), time.monotonic(), workers_of(process.pid)
                if kill_worker:
                    os.kill(pids[-1], signal.SIGKILL)
                else:
                    os.killpg(process.pid, signal.SIGTERM)
    code = process.wait(timeout=300)
    start = re.search(r"continuing from step (\d+)", printed)
    return Ending(
        started_from=int(start[1]) if start else 0,
        disturbed_at=step,
        exit_code=code,
        seconds=time.monotonic() - at,
        printed=printed,
        survivors=sum(Path(f"/proc/{pid}").exists() for pid in pids),
        shared_memory=len(shared_memory() - before),
    )


def soak(workdir: Path, repeats: int, kills: int) -> bool:
    """Stops the run `repeats` times and kills a worker of it `kills` times; prints a row for each."""
    print(f"{'':<14}{'from':>6}{'at':>6}{'saved':>7}{'exit':>6}{'seconds':>9}{'workers left':>14}{'in /dev/shm':>13}")
    newest, good = 0, True
    for index in range(repeats + kills):
        kill_worker = index >= repeats
        ending = disturb(workdir, 1 + 3 * index % 17, kill_worker=kill_worker)
        saved = max((int(path.name) for path in (workdir / "checkpoints").iterdir()), default=0)
        as_promised = (
            ending.started_from == newest
            and ending.survivors == ending.shared_memory == 0
            and "Traceback" not in ending.printed
            and ending.seconds < 30
        )
        if kill_worker:
            named = re.search(r"input worker \d \(pid \d+\) was killed by SIGKILL", ending.printed)
            as_promised &= ending.exit_code == EXIT_INPUT_FAILED and named is not None and saved == newest
        else:
            as_promised &= ending.exit_code == EXIT_STOPPED and saved >= ending.disturbed_at
        what = "kill -9 worker" if kill_worker else "SIGTERM group"
        print(
            f"{what:<14}{ending.started_from:>6}{ending.disturbed_at:>6}"
            f"{saved:>7}{ending.exit_code:>6}{ending.seconds:>9.1f}{ending.survivors:>14}{ending.shared_memory:>13}"
            f"  {'' if as_promised else 'WRONG'}",
            flush=True,
        )
        if not as_promised:
            print(ending.printed)
        newest, good = saved, good and as_promised
    return good


def make_images(root: Path) -> DataConfig:
    """A folder of 80 small JPEGs, and an input that decodes them and augments in every way."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 80), ("val", 2)):
        for index in range(count):
            path = root / split / f"class_{index % 2}" / f"{index:03}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8))
            coarse.resize((60 + index % 9, 50 + index % 7)).save(path, quality=90)
    return DataConfig(
        source=FolderSource(root=str(root)),
        image_size=32,
        eval_image_size=32,
        batch_size=64,
        augment=CropAugment(),
        randaugment=RandAugmentConfig(),
        mixing=MixingConfig(group_size=16),
    )


def digest(config: DataConfig, start: int, count: int, num_processes: int) -> str:
    """Digest of the global batches of `count` steps."""
    source = pipeline.open_split(config, "train")
    parts = []
    for index in range(num_processes):
        with pipeline.train_batches(
            config,
            source,
            seed=0,
            start_step=start,
            num_steps=start + count,
            process_index=index,
            num_processes=num_processes,
        ) as batches:
            parts.append(list(batches))
    state = hashlib.sha256()
    for step in zip(*parts, strict=True):
        for name in sorted(step[0]):
            state.update(name.encode() + np.concatenate([rows[name] for rows in step]).tobytes())
    return state.hexdigest()[:16]


def compare_layouts(root: Path) -> bool:
    """Prints a digest of the batches for each number of processes and workers."""
    config = make_images(root)
    found = set()
    print(f"{'processes':>9}{'workers':>9}{'steps 0-5':>20}{'1000000-1000002':>20}")
    for num_processes in (1, 2, 4):
        for num_workers in (0, 1, 2, 4):
            chosen = dataclasses.replace(config, num_workers=num_workers)
            digests = tuple(digest(chosen, start, count, num_processes) for start, count in ((0, 6), (1_000_000, 3)))
            found.add(digests)
            print(f"{num_processes:>9}{num_workers:>9}{digests[0]:>20}{digests[1]:>20}", flush=True)
    return len(found) == 1


def main() -> int:
    """Runs all tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, help="how often the run is asked to stop")
    parser.add_argument("--kills", type=int, default=3, help="how often a worker is killed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        good = soak(Path(folder) / "run", options.repeats, options.kills)
        good &= compare_layouts(Path(folder) / "images")
    print("all as promised" if good else "NOT as promised")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
