"""Checks that a run has the same bits on several layouts of processes and devices, and if it is moved between them.

    python tools/soak_layouts.py [--store gs]

Trains a small digits recipe (dropout, stochastic depth and augmentation on) in real processes on this machine, with
forced host devices. First, a run on each layout is compared bit for bit with that on one device: parameters, momentum,
EMA and the metrics of every step. Then one run is stopped or killed several times, and continues on another layout each
time: 1x4 -> SIGTERM -> 2x2 -> SIGKILL of one process -> 4x1 -> SIGTERM during an evaluation -> 1x8. Exits with 1 if
anything differs. With `--store gs` or `--store s3`, the run that is moved is in a bucket of an emulator on 127.0.0.1,
and each start finds an empty folder for temporary files, as on other machines. With `--fast`: the layouts with
`reproducible` off, which may differ by 1e-5.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from nfnet_flax.exit_codes import EXIT_DONE, EXIT_LOST, EXIT_STOPPED
from nfnet_flax.storage import BucketUrl
from nfnet_flax.training.metrics import read_rows
from tests import runs, stores

NUM_STEPS = 30
OPTIONS = (
    f"--num-steps={NUM_STEPS}",
    "--model.widths=8 8 16 16",
    "--model.depths=1 1 1 1",
    "--model.group-width=4",
    "--eval-every-steps=15",
    "--checkpoint.every-steps=5",
    "--data.num-threads=1",
    "--distributed.start-timeout-s=120",
    "--distributed.heartbeat-timeout-s=20",
)
LAYOUTS = ((1, 1), (1, 2), (1, 4), (1, 8), (2, 2), (4, 1), (2, 4))
FAST = ("--execution.no-reproducible", "--execution.num-microbatches=None")
TOLERANCE = 1e-5
"""Largest relative difference that is accepted with `--fast`."""
UNREPEATABLE = ("throughput/", "time/", "processes/", "memory/")


def start(
    workdir: Path, num_processes: int, num_devices: int, *options: str, place: BucketUrl | None = None
) -> list[subprocess.Popen[str]]:
    """Starts a run with given numbers of processes and of devices per process; they print into files next to the
    workdir. With `place`, the run is there and not in the workdir."""
    environment = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}",
        # As users' runs are compiled: what is promised is about these programs.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
        "TMPDIR": tempfile.mkdtemp(dir=workdir.parent),
    }
    life = len(list(workdir.parent.glob(f"{workdir.name}.*.0.txt")))
    outputs = [(workdir.parent / f"{workdir.name}.{life}.{index}.txt").open("w") for index in range(num_processes)]
    words = (*OPTIONS, *options)
    if num_processes == 1:
        return [runs.start(str(place or workdir), *words, environment=environment, output=outputs[0])]
    return runs.start_all(str(place or workdir), num_processes, *words, outputs=outputs, environment=environment)


def printed(workdir: Path) -> str:
    """The text that the first process of the newest start has printed."""
    files = sorted(workdir.parent.glob(f"{workdir.name}.*.0.txt"), key=lambda path: int(path.name.split(".")[1]))
    return files[-1].read_text()


def end(workdir: Path, processes: list[subprocess.Popen[str]], *allowed: int) -> None:
    """Waits for the end of all processes and checks their exit codes."""
    codes = [process.wait(timeout=600) for process in processes]
    if any(code not in allowed for code in codes):
        raise SystemExit(f"{workdir.name}: exit codes {codes}, allowed {allowed}\n{printed(workdir)}")


def signal_when(
    workdir: Path, processes: list[subprocess.Popen[str]], pattern: str, to: int, number: signal.Signals
) -> None:
    """Sends a signal to one process as soon as the run has printed a text that matches a pattern."""
    while not re.search(pattern, printed(workdir), re.MULTILINE):
        if any(process.poll() is not None for process in processes):
            raise SystemExit(f"{workdir.name}: a process ended too early\n{printed(workdir)}")
        time.sleep(0.005)
    processes[to].send_signal(number)


def rows_of(workdir: Path) -> list[dict[str, float]]:
    """Metrics of every step, without times."""
    return [
        {name: value for name, value in row.items() if not name.startswith(UNREPEATABLE)}
        for row in read_rows(workdir / "metrics.jsonl")
    ]


def compare(want: Path, got: Path) -> bool:
    """Whether two runs ended with the same bits and metrics; prints the differences."""
    arrays = [runs.saved_arrays(workdir, NUM_STEPS) for workdir in (want, got)]
    unequal = [name for name in arrays[0] if arrays[0][name].tobytes() != arrays[1][name].tobytes()]
    rows = [rows_of(workdir) for workdir in (want, got)]
    same_rows = rows[0] == rows[1] and len(rows[1]) == NUM_STEPS
    line = f"{got.name:<12} arrays that differ {len(unequal):>3} of {len(arrays[0])}; metrics "
    print(line + ("equal" if same_rows else "DIFFER"), flush=True)
    if unequal:
        worst = max(distance(arrays[0][name], arrays[1][name]) for name in unequal)
        print(f"{'':<12} largest difference {worst:.1e} of the array's largest value; {unequal[:3]}")
    if not same_rows:
        differing = [(a, b) for a, b in zip(*rows, strict=False) if a != b]
        print(f"{'':<12} {len(differing)} rows differ, the first: {differing[:1]}")
    return not unequal and same_rows


def distance(want: np.ndarray, got: np.ndarray) -> float:
    """Largest difference of two arrays, as a share of the largest value."""
    return float(np.max(np.abs(got.astype(np.float64) - want)) / max(np.max(np.abs(want)), np.finfo(np.float32).tiny))


def compare_roughly(want: Path, got: Path) -> bool:
    """Whether losses, parameters, momentum and EMA of two runs are equal to `TOLERANCE`; prints the differences.

    All arrays of a kind are compared together, by the norm of the difference. The array with the largest difference is
    named.
    """
    losses = [np.array([row["train/loss"] for row in rows_of(workdir)]) for workdir in (want, got)]
    assert losses[0].shape == losses[1].shape == (NUM_STEPS,), losses
    apart = {"losses": float(np.max(np.abs(losses[1] - losses[0]) / losses[0]))}
    arrays = [runs.saved_arrays(workdir, NUM_STEPS) for workdir in (want, got)]
    for kind, key in {"parameters": "['params']", "momentum": "['trace']", "EMA": "['ema_params']"}.items():
        names = [name for name in arrays[0] if key in name]
        one, other = (np.concatenate([each[name].ravel() for name in names], dtype=np.float64) for each in arrays)
        apart[kind] = float(np.linalg.norm(other - one) / np.linalg.norm(one))
    farthest, worst = max(
        ((name, distance(arrays[0][name], arrays[1][name])) for name in arrays[0]), key=lambda x: x[1]
    )
    print(f"{got.name:<12} {', '.join(f'{kind} {value:.1e}' for kind, value in apart.items())}", flush=True)
    print(f"{'':<12} farthest off: {farthest}, {worst:.1e} of its largest value")
    return max(apart.values()) <= TOLERANCE


def moved(folder: Path, place: BucketUrl | None) -> Path:
    """Trains a run that is moved between layouts, and returns its folder, or a copy of the one in a bucket."""
    workdir = folder / "moved"
    processes = start(workdir, 1, 4, place=place)
    signal_when(workdir, processes, r"^step +7/", 0, signal.SIGTERM)
    end(workdir, processes, EXIT_STOPPED)
    processes = start(workdir, 2, 2, place=place)
    signal_when(workdir, processes, r"^step +11/", 1, signal.SIGKILL)
    end(workdir, processes, -signal.SIGKILL, EXIT_LOST, -signal.SIGABRT)
    processes = start(workdir, 4, 1, place=place)
    signal_when(workdir, processes, r"^step +15/", 2, signal.SIGTERM)  # the evaluation is due after this step
    end(workdir, processes, EXIT_STOPPED)
    end(workdir, start(workdir, 1, 8, place=place), EXIT_DONE)
    return workdir if place is None else runs.copied(str(place), NUM_STEPS)


def main() -> int:
    """Runs all layouts and compares them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only-moved", action="store_true", help="only the layout of one device and the moved run")
    parser.add_argument("--fsdp", action="store_true", help="each layout also with `execution.fsdp` 2 and 4")
    parser.add_argument("--store", choices=stores.KINDS, help="kind of the bucket of the run that is moved")
    parser.add_argument("--fast", action="store_true", help="only the layouts, with `reproducible` off")
    options = parser.parse_args()
    words, alike = (FAST, compare_roughly) if options.fast else ((), compare)
    os.environ.setdefault("NPROC", "8")
    good = True
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as opened:
        folder = Path(name)
        place = None
        if options.store is not None:
            os.environ |= stores.environment(options.store, opened.enter_context(stores.store(options.store)))
            place = BucketUrl(options.store, stores.BUCKET, "runs/moved")
        reference = folder / "1x1"
        end(reference, start(reference, 1, 1, *words), EXIT_DONE)
        for num_processes, num_devices in () if options.only_moved else LAYOUTS[1:]:
            workdir = folder / f"{num_processes}x{num_devices}"
            end(workdir, start(workdir, num_processes, num_devices, *words), EXIT_DONE)
            good &= alike(reference, workdir)
        for num_processes, num_devices in LAYOUTS[1:] if options.fsdp else ():
            for fsdp in (2, 4):
                if num_processes * num_devices % fsdp == 0:
                    workdir = folder / f"{num_processes}x{num_devices} fsdp {fsdp}"
                    end(
                        workdir,
                        start(workdir, num_processes, num_devices, f"--execution.fsdp={fsdp}", *words),
                        EXIT_DONE,
                    )
                    good &= alike(reference, workdir)
        if not options.fast:
            good &= compare(reference, moved(folder, place))
    print((f"all within {TOLERANCE}" if options.fast else "all equal") if good else "NOT equal")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
