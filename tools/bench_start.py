"""Times the start of a run that continues: from the command to the end of the first step, and its parts.

The run is first stopped after a step, in a folder of its own with caches of its own, so the programs that it compiled
are kept. Then it is started several times, each time until its first step is done, and killed.

`python tools/bench_start.py [digits f0]` prints a line for each start. With several `--code` folders, copies of this
repository, the starts take turns: the noise of a busy machine then meets all alike.
"""

import argparse
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
F0 = (
    *("--model.widths", "256", "512", "1536", "1536", "--model.depths", "1", "2", "6", "3"),
    *("--model.group-width", "128", "--data.image-size", "128", "--data.eval-image-size", "128"),
    *("--data.batch-size", "16", "--data.eval-batch-size", "16"),
)
RUNS = {"digits": (), "f0": F0}
FIRST_STEP = re.compile(r"first step after ([\d.]+) s")
READY = re.compile(r"ready ([\d.]+) s after the start: (.*)")


def started(code: Path, name: str, folder: Path) -> tuple[subprocess.Popen[str], float]:
    """A process that trains, and when it began."""
    command = [sys.executable, "-m", "nfnet_flax.cli", "train", "recipes/digits.py", "--workdir", f"{folder}/run"]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache",
        "PYTHONPATH": str(code),
        "PYTHONUNBUFFERED": "1",
    }
    began_s = time.perf_counter()
    process = subprocess.Popen(
        [*command, *RUNS[name]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=code,
        env=environment,
        start_new_session=True,
    )
    return process, began_s


def until_first_step(process: subprocess.Popen[str]) -> str:
    """What a process prints until its first step is done."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if FIRST_STEP.search(line):
            return "".join(lines)
    raise SystemExit("".join(lines))


def prepare(code: Path, name: str, folder: Path) -> None:
    """Trains a step, which compiles it, and saves it."""
    process, began_s = started(code, name, folder)
    until_first_step(process)
    print(f"{name}, {code}: first start {time.perf_counter() - began_s:.1f} s", flush=True)
    process.send_signal(signal.SIGTERM)
    process.communicate()


def processor_s(process: subprocess.Popen[str]) -> float:
    """Seconds that all threads of a process have computed."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start(code: Path, name: str, folder: Path) -> tuple[float, float, str]:
    """Seconds and processor seconds of a start, and its parts in words."""
    process, began_s = started(code, name, folder)
    printed = until_first_step(process)
    taken_s, computed_s = time.perf_counter() - began_s, processor_s(process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    ready, first = READY.search(printed), FIRST_STEP.search(printed)
    if ready is None or first is None or "continuing from step" not in printed:
        raise SystemExit(printed)
    return taken_s, computed_s, f"{ready[2]}; first step {first[1]} s"


def main() -> None:
    """Prints a line for each start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", default=list(RUNS), choices=[[], *RUNS], help="which run")
    parser.add_argument("--starts", type=int, default=3, help="how often each is started")
    parser.add_argument("--code", type=Path, nargs="+", default=[ROOT], help="folders of this repository")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the table there, as docs/figures/ has them"
    )
    parser.add_argument("--folder", type=Path, help="keeps the runs there, for later calls")
    options = parser.parse_args()
    from tools.figures import Row, write_figures

    folder = options.folder or Path(tempfile.mkdtemp(prefix="bench_start."))
    rows: list[Row] = []
    try:
        for name in options.runs:
            found: dict[Path, list[tuple[float, float]]] = {}
            places = {code: folder / name / str(index) for index, code in enumerate(options.code)}
            for code, place in places.items():
                if not (place / "run").exists():
                    prepare(code.absolute(), name, place)
            for _ in range(options.starts):
                for code, place in places.items():
                    taken_s, computed_s, parts = start(code.absolute(), name, place)
                    found.setdefault(code, []).append((taken_s, computed_s))
                    print(f"{name}, {code}: {taken_s:5.1f} s, processor {computed_s:5.1f} s: {parts}", flush=True)
            for code, times in found.items():
                taken, computed = (statistics.median(column) for column in zip(*times, strict=True))
                print(f"{name}, {code}: median {taken:.1f} s, processor {computed:.1f} s")
                which = options.code.index(code) + 1  # a folder's name means nothing to others
                rows.append({"run": name, "code": which, "start": f"{taken:.1f} s", "processor": f"{computed:.1f} s"})
        if options.json:
            write_figures(options.json, rows)
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
