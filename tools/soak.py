"""Kills a run of several processes many times, and compares its result with that of an uninterrupted run.

    python tools/soak.py --kills 50 --processes 2 [--store gs]

Trains a small digits recipe in `--processes` processes on this machine. A random process gets SIGTERM or SIGKILL at a
random moment: while it starts or compiles, between steps, or while a checkpoint is being written. All processes must
end within a time limit, with the documented exit codes; then the same command is run again, until the run is finished.
Parameters, optimizer state, EMA and the metrics of every step must equal those of the uninterrupted run bit for bit.
Then the run's own record of its time (`events.jsonl`) is added up: its parts must be the time that has passed, within
1%, and the steps that were lost and repeated as many as were seen here. Prints a row for each kill and a summary; exits
with 1 if anything is wrong.

With `--store gs` or `--store s3`, the run that is killed is in a bucket of an emulator on 127.0.0.1, and each start
finds an empty folder for temporary files, as on another machine. Then a signal at a save comes while objects of a
checkpoint are written or deleted. The record of the time loses what was not sent before a kill, so fewer repeated steps
may be in it than were seen.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

from nfnet_flax.exit_codes import EXIT_DONE, EXIT_LOST, EXIT_STOPPED
from nfnet_flax.storage import BucketFolder, BucketUrl
from nfnet_flax.telemetry.goodput import account_of
from nfnet_flax.telemetry.sessions import Session, read_history
from nfnet_flax.training.layout import COMMIT, EVENTS
from nfnet_flax.training.metrics import OF_THE_MACHINE, read_rows
from tests import runs, stores

OPTIONS = (
    "--model.widths=8 8 8 8",
    "--model.depths=1 1 1 1",
    "--model.group-width=4",
    "--data.num-threads=1",
    "--eval-every-steps=15",
    "--checkpoint.every-steps=5",
    "--distributed.start-timeout-s=60",
    "--distributed.heartbeat-timeout-s=20",
)
MAX_STEPS_A_LIFE = 10
BOUND_S = 150.0
"""Time within which all processes must end after one was killed; the longest wait in it is the start timeout."""
UNSEEN_SHARE, UNSEEN_S = 0.01, 3.0
"""Largest difference of the time on record from the time that has passed: a share of it, or in a short run the seconds
that Python takes before it runs the first line, and after the last one; thrice as many if records are then sent."""

Moment = Literal["start", "step", "save"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Life:
    """The processes of a run from one start to its end."""

    began_at_s: float
    """When they were started, in seconds since 1970."""
    ended_at_s: float
    start_step: int | None
    """Step from which it continued; None if it ended before that."""
    last_step: int
    """Last step that it reported."""
    first_step_s: float | None
    """Seconds from the start of the processes to the end of the first step; None if there was no first step."""
    had_begun: bool
    """Whether the loop was running when the signal was sent, so that SIGTERM makes it save."""
    exit_codes: tuple[int, ...]
    ending_s: float
    """Seconds from the signal to the end of the last process."""
    printed: str


def lines_of(folder: Path, index: int) -> str:
    """The text that a process has printed so far."""
    path = folder / f"{index}.txt"
    return path.read_text() if path.exists() else ""


def live(workdir: Path | BucketUrl, folder: Path, options: list[str], count: int, plan: "Plan | None") -> Life:
    """Starts or continues the run, sends the signal of the plan, and waits for the end of all processes."""
    (folder / "tmp").mkdir(parents=True)
    started, began_at_s = time.monotonic(), time.time()
    outputs = [(folder / f"{index}.txt").open("w") for index in range(count)]
    empty_machine = {"TMPDIR": str(folder / "tmp")}
    processes = runs.start_all(str(workdir), count, *OPTIONS, *options, outputs=outputs, environment=empty_machine)
    first_step_s, signalled, had_begun = None, None, False
    while any(process.poll() is None for process in processes):
        time.sleep(0.01)
        now, printed = time.monotonic(), lines_of(folder, 0)
        if first_step_s is None and "first step after" in printed:
            first_step_s = now - started
        if plan is not None and signalled is None and plan.is_due(workdir, printed, now - started):
            had_begun = "first step after" in printed
            processes[plan.process].send_signal(plan.number)
            signalled = now
        if signalled is not None and now - signalled > BOUND_S:
            for process in processes:
                process.kill()
    steps = [int(step) for step in re.findall(r"^step +(\d+)/", lines_of(folder, 0), re.MULTILINE)]
    continued = re.search(r"continuing from step (\d+)", lines_of(folder, 0))
    start_step = int(continued[1]) if continued else 0 if steps else None
    for output in outputs:
        output.close()
    shutil.rmtree(folder / "tmp")
    return Life(
        began_at_s=began_at_s,
        ended_at_s=time.time(),
        start_step=start_step,
        last_step=steps[-1] if steps else start_step or 0,
        first_step_s=first_step_s,
        had_begun=had_begun,
        exit_codes=tuple(process.wait() for process in processes),
        ending_s=time.monotonic() - (signalled or started),
        printed="".join(lines_of(folder, index) for index in range(count)),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Which process gets which signal, and when."""

    number: signal.Signals
    process: int
    moment: Moment
    after_s: float
    """For the moment `start`: seconds after the start of the processes, or at the first step if that comes before."""
    after_steps: int
    """For the moments `step` and `save`: number of steps that this life has reported; for `save`, the signal is sent at
    the next save after that."""

    def is_due(self, workdir: Path | BucketUrl, printed: str, elapsed_s: float) -> bool:
        """Whether the signal has to be sent now."""
        if self.moment == "start":
            return elapsed_s > self.after_s or "first step after" in printed
        if len(re.findall(r"^step +\d+/", printed, re.MULTILINE)) < self.after_steps:
            return False
        return self.moment == "step" or is_saving(workdir)


def is_saving(workdir: Path | BucketUrl) -> bool:
    """Whether a checkpoint is being written, or an old one deleted in a bucket."""
    if isinstance(workdir, Path):  # a checkpoint has a temporary name until it is complete
        return any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
    names = list(BucketFolder(workdir / "checkpoints").files())
    return len({name.split("/")[0] for name in names}) > sum(name.endswith(f"/{COMMIT}") for name in names)


def draw(rng: random.Random, num_processes: int, start_s: float) -> Plan:
    """A random plan; `start_s` is about the time that a start takes, in seconds."""
    return Plan(
        number=rng.choice((signal.SIGTERM, signal.SIGKILL)),
        process=rng.randrange(num_processes),
        moment=rng.choices(("start", "step", "save"), weights=(1, 3, 2))[0],
        after_s=rng.uniform(0.0, start_s),
        after_steps=rng.randint(1, MAX_STEPS_A_LIFE),
    )


def as_promised(plan: Plan, life: Life) -> bool:
    """Whether every process ended as it should."""
    if life.ending_s > BOUND_S:
        return False
    if plan.number is signal.SIGTERM and life.had_begun:
        return all(code == EXIT_STOPPED for code in life.exit_codes)
    # Before the loop runs, there is nothing to save, and the signal ends the process like any other program. If process
    # 0 died, JAX aborts the others.
    allowed = {EXIT_LOST, -signal.SIGABRT, EXIT_STOPPED}
    return all(
        code in allowed | {-plan.number} if index == plan.process else code in allowed
        for index, code in enumerate(life.exit_codes)
    )


def soak(
    workdir: Path | BucketUrl,
    folder: Path,
    options: list[str],
    num_kills: int,
    num_processes: int,
    rng: random.Random,
) -> tuple[list[Life], bool]:
    """Kills the run `num_kills` times, prints a row for each, and then lets the run finish. Returns the lives, and
    whether all ended as promised."""
    print(f"{'':>4}{'signal':>9}{'to':>4}{'at':>7}{'from':>6}{'last':>6}{'first step s':>14}{'end s':>7}  exit codes")
    lives: list[Life] = []
    good, start_s = True, 30.0
    for index in range(num_kills):
        plan = draw(rng, num_processes, start_s)
        life = live(workdir, folder / f"life_{index}", options, num_processes, plan)
        lives.append(life)
        is_good = as_promised(plan, life)
        good &= is_good
        start_s = life.first_step_s or start_s
        first = f"{life.first_step_s:.1f}" if life.first_step_s is not None else "-"
        start = "-" if life.start_step is None else str(life.start_step)
        print(
            f"{index + 1:>4}{plan.number.name:>9}{plan.process:>4}{plan.moment:>7}{start:>6}"
            f"{life.last_step:>6}{first:>14}{life.ending_s:>7.1f}  {' '.join(map(str, life.exit_codes))}"
            f"{'' if is_good else '  WRONG'}",
            flush=True,
        )
        if not is_good:
            print(life.printed)
    last = live(workdir, folder / "last", options, num_processes, None)
    lives.append(last)
    if any(code != EXIT_DONE for code in last.exit_codes):
        print(f"the last life did not end the run: {last.exit_codes}\n{last.printed}")
        return lives, False
    summarise(lives)
    return lives, good


def repeated_in(steps: Sequence[tuple[int, int]]) -> list[int]:
    """Number of steps that were repeated after each start, from the first and last step of each life."""
    repeated, reached = [], 0
    for first, last in steps:
        repeated.append(max(0, reached - first))
        reached = last
    return repeated


def summarise(lives: list[Life]) -> None:
    """Prints the totals."""
    repeated = repeated_in([(life.start_step, life.last_step) for life in lives if life.start_step is not None])
    starts = [life.first_step_s for life in lives if life.first_step_s is not None]
    print(
        f"kills {len(lives) - 1}, steps repeated {sum(repeated)} (at most {max(repeated, default=0)} after a kill), "
        f"seconds from start to first step: median {statistics.median(starts):.1f}, longest {max(starts):.1f}"
    )


def is_accounted(workdir: Path, lives: list[Life], *, is_whole: bool) -> bool:
    """Whether the run's record of its time agrees with what was seen here; prints both.

    Args:
      workdir: folder of the run, or a copy of it.
      lives: what was seen.
      is_whole: whether the record has every line that was written.
    """
    account = account_of(read_history(workdir / EVENTS))
    passed_s = lives[-1].ended_at_s - lives[0].began_at_s
    parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in account.seconds.items() if seconds >= 0.05)
    print(f"seconds: {passed_s:.1f} have passed, {account.wall_s:.1f} are on record: {parts}")
    unseen_s = UNSEEN_S if is_whole else 3 * UNSEEN_S
    good = abs(account.wall_s - passed_s) <= max(UNSEEN_SHARE * passed_s, unseen_s)
    good &= math.isclose(sum(account.seconds.values()), account.wall_s, rel_tol=1e-9)
    good &= account.num_productive == account.sessions[-1].session.last_step
    seen = [one for one in (_steps_of(life, [each.session for each in account.sessions]) for life in lives) if one]
    repeated = sum(repeated_in(seen))
    good &= account.num_repeated == repeated if is_whole else account.num_repeated <= repeated
    print(f"goodput {account.goodput:.1%}; repeated steps: {repeated} seen, {account.num_repeated} on record")
    return good


def _steps_of(life: Life, sessions: Sequence[Session]) -> tuple[int, int] | None:
    """First and last step of a life; None if it did none.

    A step is recorded before it is printed, so a kill between the two leaves one step that was done and not seen.
    """
    own = next((one for one in sessions if life.began_at_s <= one.began_at_s <= life.ended_at_s), None)
    if life.start_step is not None:
        first, last = life.start_step, life.last_step
    elif own is not None and own.from_step is not None:
        first = last = own.from_step
    else:
        return None
    is_one_more = own is not None and own.last_step == last + 1
    return first, last + is_one_more


def is_equal(whole: Path, killed: Path, num_steps: int) -> bool:
    """Whether two runs ended with the same bits and have equal metrics, each step once; prints the differences."""
    want, got = (runs.saved_arrays(workdir, num_steps) for workdir in (whole, killed))
    unequal = [name for name in want.keys() | got.keys() if name not in want or name not in got]
    unequal += [name for name in want.keys() & got.keys() if want[name].tobytes() != got[name].tobytes()]
    rows = [
        [
            {name: value for name, value in row.items() if not name.startswith(OF_THE_MACHINE)}
            for row in read_rows(workdir / "metrics.jsonl")
        ]
        for workdir in (whole, killed)
    ]
    print(f"arrays that differ: {len(unequal)} of {len(want)} {unequal[:5]}")
    print(f"metrics of {len(rows[1])} steps {'are equal' if rows[0] == rows[1] else 'DIFFER'}")
    return not unequal and rows[0] == rows[1] and len(rows[1]) == num_steps


def main() -> int:
    """Runs the uninterrupted and the killed run, and compares them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="how often a process is killed")
    parser.add_argument("--processes", type=int, default=2, help="number of processes of the run")
    parser.add_argument("--store", choices=stores.KINDS, help="kind of the bucket; without it, the run is on a disk")
    parser.add_argument("--seed", type=int, default=0, help="random seed of signals, processes and moments")
    options = parser.parse_args()
    # Most of the time is compilation, and the speed of the program does not matter.
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    # A life ends at most this number of steps after the last checkpoint, so the run is not finished before the last
    # kill.
    num_steps = (MAX_STEPS_A_LIFE + 10) * options.kills + 15
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as opened:
        folder, length = Path(name), [f"--num-steps={num_steps}"]
        place: Path | BucketUrl = folder / "killed"
        if options.store is not None:
            os.environ |= stores.environment(options.store, opened.enter_context(stores.store(options.store)))
            place = BucketUrl(options.store, stores.BUCKET, "runs/killed")
        whole = live(folder / "whole", folder / "whole_life", length, options.processes, None)
        if any(code != EXIT_DONE for code in whole.exit_codes):
            print(f"the uninterrupted run failed: {whole.exit_codes}\n{whole.printed}")
            return 1
        lives, good = soak(place, folder, length, options.kills, options.processes, rng)
        killed = place if isinstance(place, Path) else runs.copied(str(place), num_steps)
        good = is_accounted(killed, lives, is_whole=options.store is None) and good
        good = is_equal(folder / "whole", killed, num_steps) and good
    print("all as promised" if good else "NOT as promised")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
