"""Starts a run twice at the same time, in many trials, and compares its result with that of an undisturbed run.

    python tools/soak_owners.py --trials 20

In each trial one process trains, and a second one is started on the same folder at a random moment: while the first one
starts, compiles, trains or saves. In some trials the first one is killed by SIGKILL just before. One of the two must
own the folder and continue. The other one must end with code 2 and change nothing, unless the first one was killed; and
a restart after SIGKILL must not wait. Then the owner is stopped by a random signal, and the next trial continues the
run. At the end no checkpoint and no row of the metrics may be missing, and the state must be equal bit for bit. Prints
a row for each trial and a summary; exits with 1 if anything is wrong.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from nfnet_flax.exit_codes import EXIT_BAD_INPUT, EXIT_DONE, EXIT_STOPPED
from nfnet_flax.training.layout import steps_in
from tests import runs
from tools.soak import OPTIONS, is_equal

STEPS_A_TRIAL = 10
MAX_DELAY_S = 30.0
BOUND_S = 150.0


class Started:
    """A process of the run, and the file that it prints to."""

    def __init__(self, workdir: Path, log: Path, *options: str) -> None:
        self.log = log
        with log.open("w") as output:
            self.process = runs.start(workdir, *OPTIONS, *options, output=output)

    def printed(self) -> str:
        """The text that it has printed so far."""
        return self.log.read_text()

    def num_steps(self) -> int:
        """Number of steps that it has reported so far."""
        return len(re.findall(r"^step +\d+/", self.printed(), re.MULTILINE))

    def wait(self, bound_s: float | None = BOUND_S) -> int:
        """Waits for its end and returns the exit code; kills it after `bound_s` seconds; None: there is no limit."""
        try:
            return self.process.wait(bound_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def trial(workdir: Path, folder: Path, options: list[str], rng: random.Random) -> bool:
    """Starts two processes and waits for the end of both; prints a row, and returns whether everything was right."""
    folder.mkdir()
    saved_before = steps_in(workdir / "checkpoints")
    delay_s, is_killed = rng.uniform(0.0, MAX_DELAY_S), rng.random() < 0.4
    first = Started(workdir, folder / "first.txt", *options)
    time.sleep(delay_s)
    if is_killed:
        first.process.kill()
        first.process.wait()
    second = Started(workdir, folder / "second.txt", *options)
    both = (first, second)
    deadline = time.monotonic() + BOUND_S
    # The owner is the process that trains; it may train some steps after the other one has ended.
    alive = (second,) if is_killed else both
    while time.monotonic() < deadline and all(each.num_steps() < STEPS_A_TRIAL for each in alive):
        if all(each.process.poll() is not None for each in both):
            break
        time.sleep(0.05)
    while time.monotonic() < deadline and all(each.process.poll() is None for each in both):
        time.sleep(0.05)
    number = rng.choice((signal.SIGTERM, signal.SIGKILL))
    for each in both:
        if each.process.poll() is None:
            each.process.send_signal(number)
    codes = [each.wait() for each in both]
    expected = EXIT_STOPPED if number is signal.SIGTERM else -signal.SIGKILL
    if is_killed:
        good = codes == [-signal.SIGKILL, expected] and "waiting for up to" not in second.printed()
    else:
        refused = [each for each, code in zip(both, codes, strict=True) if code == EXIT_BAD_INPUT]
        good = sorted(codes) == sorted([EXIT_BAD_INPUT, expected]) and "in use: process" in refused[0].printed()
    # No process deleted what the last owner needs: the newest checkpoint still exists, or there is a newer one.
    good &= not saved_before or max(steps_in(workdir / "checkpoints"), default=0) >= saved_before[0]
    good &= "Traceback" not in first.printed() + second.printed()
    print(
        f"second after {delay_s:4.1f} s, first {'killed' if is_killed else 'alive '}, end by {number.name}: exit codes "
        f"{codes[0]:>3} {codes[1]:>3}, steps {first.num_steps():>2} {second.num_steps():>2}{'' if good else '  WRONG'}",
        flush=True,
    )
    if not good:
        print(first.printed(), second.printed(), sep="\n---\n")
    return good


def main() -> int:
    """Runs the undisturbed run and the trials, and compares the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20, help="how often two processes are started")
    parser.add_argument("--seed", type=int, default=0, help="random seed of moments and signals")
    arguments = parser.parse_args()
    # Most of the time is compilation, and the speed of the program does not matter.
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    num_steps = 4 * STEPS_A_TRIAL * arguments.trials + 15
    options, rng = [f"--num-steps={num_steps}"], random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if (code := Started(folder / "whole", folder / "whole.txt", *options).wait(None)) != EXIT_DONE:
            print(f"the undisturbed run ended with code {code}")
            return 1
        results = [
            trial(folder / "disturbed", folder / f"trial_{index}", options, rng) for index in range(arguments.trials)
        ]
        last = Started(folder / "disturbed", folder / "last.txt", *options)
        good = last.wait(None) == EXIT_DONE and all(results)
        good = is_equal(folder / "whole", folder / "disturbed", num_steps) and good
    print("all as promised" if good else "NOT as promised")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
