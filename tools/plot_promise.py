"""Trains a run at once and a second one that is killed twice and moved, compares their bits, and draws both.

    python tools/plot_promise.py docs/promise.svg [--folder DIR]

Both train a small NFNet on scikit-learn's digits, in real processes on this machine, with forced CPU devices. The first
run stays on one device. The second one starts on one device, is killed (SIGKILL) and continues on two, is killed again
and continues on four. Exits with 1, and draws nothing, if any metric of a step or any array of the last checkpoint
differs. `--folder` keeps the two runs; without it they are in a temporary folder.
"""

import argparse
import hashlib
import os
import re
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import matplotlib

from nfnet_flax.exit_codes import EXIT_DONE
from nfnet_flax.training.metrics import OF_THE_MACHINE, read_rows
from tests import runs

matplotlib.use("Agg")
from matplotlib import pyplot as plt

NUM_STEPS = 180
OPTIONS = (
    f"--num-steps={NUM_STEPS}",
    "--model.widths=16 32",
    "--model.depths=1 1",
    "--data.batch-size=64",
    "--data.num-held-out=360",
    "--eval-every-steps=60",
    "--checkpoint.every-steps=20",
)
LIVES = ((1, 70), (2, 130), (4, NUM_STEPS))
"""Devices of each life of the run that is moved, and the step at which it is killed; the last one ends by itself."""
COLORS = ("tab:blue", "tab:orange", "tab:green")


def train(workdir: Path, num_devices: int, kill_at: int | None = None) -> int:
    """Trains until the end, or kills the process once it reports a step; returns the step from which it started."""
    environment = {**runs.with_devices(num_devices), "JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "NPROC": "8"}
    process = runs.start(workdir, *OPTIONS, environment=environment)
    printed = runs.finish(process) if kill_at is None else runs.signal_at(process, kill_at, signal.SIGKILL)
    if process.returncode != (EXIT_DONE if kill_at is None else -signal.SIGKILL):
        raise SystemExit(f"exit code {process.returncode}\n{printed}")
    reported = re.search(r"^step +(\d+)/", printed, re.MULTILINE)
    assert reported is not None, printed
    return int(reported[1]) - 1


def rows_of(workdir: Path) -> list[dict[str, float]]:
    """Metrics of every step, without times."""
    return [
        {name: value for name, value in row.items() if not name.startswith(OF_THE_MACHINE)}
        for row in read_rows(workdir / "metrics.jsonl")
    ]


def digest(workdir: Path) -> str:
    """SHA-256 of all arrays of the last checkpoint: parameters, momentum, moving averages and the step."""
    arrays = runs.saved_arrays(workdir, NUM_STEPS)
    found = hashlib.sha256()
    for name in sorted(arrays):
        found.update(name.encode() + arrays[name].tobytes())
    return found.hexdigest()


def plot(picture: Path, stayed: list[dict[str, float]], moved: list[dict[str, float]], starts: list[int]) -> None:
    """Draws the loss of both runs, and where the second one was killed.

    Args:
      picture: the file.
      stayed: metrics of the run on one device.
      moved: metrics of the run that was killed.
      starts: for each life of that run, the checkpoint with which it began.
    """
    plt.rcParams["svg.hashsalt"] = "nfnet_flax"
    figure, axes = plt.subplots(figsize=(9, 3.2), layout="constrained")
    steps = [row["step"] for row in stayed]
    axes.plot(steps, [row["train/loss"] for row in stayed], color="0.75", linewidth=5, label="never stopped, 1 device")
    ends = [*starts[1:], NUM_STEPS]
    for (num_devices, kill_at), start, end, color in zip(LIVES, starts, ends, COLORS, strict=True):
        part = [row for row in moved if start <= row["step"] <= end]
        label = f"killed and moved: {num_devices} device{'s'[: num_devices > 1]}"
        axes.plot([row["step"] for row in part], [row["train/loss"] for row in part], color=color, linewidth=1.2)
        axes.plot([], [], color=color, linewidth=1.2, label=label)
        if kill_at < NUM_STEPS:
            axes.axvline(kill_at, color="tab:red", linestyle=":", linewidth=1)
            text = f"kill -9 after step {kill_at}:\ncontinues from step {end}"
            axes.annotate(text, (kill_at + 1.5, 2.0), color="tab:red", fontsize=8)
    axes.set(xlabel="step", ylabel="training loss", xlim=(0, NUM_STEPS), ylim=(0, None))
    axes.set_title(
        "One run on CPU devices, killed twice and moved: the same bits as the run that never stopped", fontsize=10
    )
    axes.legend(fontsize=8, loc="lower left", ncols=2)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, metadata={"Date": None})


def main() -> int:
    """Trains, compares and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path, help="file to draw, such as docs/promise.svg")
    parser.add_argument("--folder", type=Path, help="folder for the two runs, which is kept")
    options = parser.parse_args()
    os.environ.pop("XLA_FLAGS", None)
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        stayed, moved = folder / "stayed", folder / "moved"
        train(stayed, 1)
        starts = [train(moved, count, None if kill_at == NUM_STEPS else kill_at) for count, kill_at in LIVES]
        rows = [rows_of(workdir) for workdir in (stayed, moved)]
        digests = [digest(workdir) for workdir in (stayed, moved)]
        same = rows[0] == rows[1] and len(rows[0]) == NUM_STEPS and digests[0] == digests[1]
        print(f"steps of which all metrics are equal: {sum(map(dict.__eq__, *rows))} of {NUM_STEPS}")
        print(f"SHA-256 of the last checkpoint's arrays: {digests[0]} and {digests[1]}")
        print("the same bits" if same else "NOT the same bits")
        if same:
            plot(options.picture, rows[0], rows[1], starts)
            print(f"picture: {options.picture}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
