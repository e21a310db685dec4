"""Measures the memory and the time of `nfnet predict` for folders of growing numbers of files.

    python tools/soak_predict.py --numbers 1000 10000

Makes JPEG and PNG files of several sizes, every hundredth of which is cut in half, and weights of a small network.
Predicts each folder in a process of its own, with all forms of the results at once. Prints a row for each number of
files; exits with 1 if a result is missing, or if the largest folder needs more than a tenth more memory than the
smallest.
"""

import argparse
import csv
import dataclasses
import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from flax import nnx
from PIL import Image

from nfnet_flax.models import NFNetConfig, build_model
from nfnet_flax.weights import Preprocessing, save_weights

SIZES_PX = (48, 200, 640)
BROKEN_EVERY = 100


@dataclasses.dataclass(frozen=True)
class Soaked:
    """How one command ended."""

    exit_code: int
    seconds: float
    peak_mib: float
    """Largest memory of the process, in MiB."""
    good: int
    failed: int
    page_mib: float
    """Size of the web page, in MiB."""


def make_files(folder: Path, count: int) -> None:
    """Writes the image files: copies of a few, as encoding takes longer than what is measured."""
    rng = np.random.default_rng(0)
    files = []
    for px in SIZES_PX:
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((px, px * 3 // 4))
        for kind in ("JPEG", "PNG"):
            file = io.BytesIO()
            coarse.save(file, kind)
            files.append(file.getvalue())
    for number in range(count):
        content = files[number % len(files)]
        if number % BROKEN_EVERY == BROKEN_EVERY - 1:
            content = content[: len(content) // 2]
        target = folder / f"{number // 1000}" / f"{number}.jpg"  # the format is recognized by the content
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def soak(root: Path, weights: Path, count: int) -> Soaked:
    """Predicts a folder with so many files."""
    make_files(root / f"{count}", count)
    outputs = [word for form in ("csv", "json", "html") for word in (f"--{form}", str(root / f"{count}.{form}"))]
    command = [sys.executable, "-m", "nfnet_flax.cli", "predict", str(root / f"{count}"), "--weights", str(weights)]
    start = time.monotonic()
    process = subprocess.Popen(
        [*command, *outputs], stdout=subprocess.DEVNULL, env={"JAX_PLATFORMS": "cpu", **os.environ}
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    with (root / f"{count}.csv").open(newline="") as file:
        errors = [row["error"] for row in csv.DictReader(file)]
    failed = sum(map(bool, errors))
    return Soaked(
        exit_code=process.returncode,
        seconds=seconds,
        peak_mib=usage.ru_maxrss / 1024,
        good=len(errors) - failed,
        failed=failed,
        page_mib=(root / f"{count}.html").stat().st_size / 2**20,
    )


def main() -> None:
    """Soaks all numbers of files, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--numbers", type=int, nargs="+", default=[1000, 10_000], help="numbers of files, ascending")
    numbers: list[int] = parser.parse_args().numbers
    good, peaks = True, list[float]()
    with tempfile.TemporaryDirectory(prefix="soak_predict_") as folder:
        root = Path(folder)
        config = NFNetConfig(widths=(16, 16), depths=(1, 1), group_width=8, expansion=0.5)
        save_weights(
            root / "w.safetensors",
            build_model(config, num_classes=100, rngs=nnx.Rngs(0)),
            source="a soak",
            parameters="raw",
            preprocessing=Preprocessing(
                image_size=64, crop_margin=8, resampler="area_cubic", mean=(120.0,) * 3, std=(60.0,) * 3
            ),
        )
        print(f"{'files':>8}{'exit':>6}{'seconds':>9}{'peak MiB':>10}{'good':>8}{'failed':>8}{'page MiB':>10}")
        for count in numbers:
            found = soak(root, root / "w.safetensors", count)
            print(
                f"{count:>8,}{found.exit_code:>6}{found.seconds:>9.1f}{found.peak_mib:>10.0f}{found.good:>8,}"
                f"{found.failed:>8,}{found.page_mib:>10.1f}",
                flush=True,
            )
            failed = count // BROKEN_EVERY
            good &= (found.good, found.failed, found.exit_code) == (count - failed, failed, int(failed > 0))
            peaks.append(found.peak_mib)
    good &= peaks[-1] <= 1.1 * peaks[0]
    print("as promised" if good else "NOT as promised")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
