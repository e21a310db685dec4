"""Many short training runs, each in a folder and a process of its own, as many at a time as there are cores.

A study that was stopped or killed continues with the same command: cells that have ended are not repeated, and runs
continue from their checkpoints. As a run depends on its recipe and seed alone, the results are then the same.
"""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import IO

from nfnet_flax.claims.cell import Result, is_started, read_result
from nfnet_flax.claims.child import LOG, check_recipe, last_lines, program_versions, removal, write_recipe
from nfnet_flax.claims.evidence import Runs, version_text
from nfnet_flax.config import ConfigError, require_count
from nfnet_flax.exit_codes import EXIT_BAD_INPUT, EXIT_DONE, EXIT_STOPPED
from nfnet_flax.messages import warn
from nfnet_flax.progress import Task, tracking
from nfnet_flax.recipe import Recipe


def num_cores() -> int:
    """Number of cores that this process may use."""
    return len(_cores()) or os.cpu_count() or 1


def _cores() -> list[int]:
    """Numbers of these cores; empty where the system does not tell them."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def run_study(
    cells: Mapping[str, Recipe],
    folder: Path,
    *,
    num_jobs: int,
    variables: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
) -> dict[str, Result]:
    """Trains all cells that have no result yet; returns the results of all, by the names of the cells.

    Args:
      cells: name of each cell, which is the name of its folder, and its recipe.
      folder: holds a folder for each cell.
      num_jobs: number of runs at the same time; each has a core of its own where there are enough.
      variables: name of a cell -> variables that its process has besides those of this process, such as `XLA_FLAGS`.

    Raises:
      ConfigError: the folder has cells of other recipes, or a run failed; other than diverging, which is a result.
      KeyboardInterrupt: the study was interrupted; the runs have saved their state.
      StorageFailed: a result cannot be read.
    """
    require_count("jobs", num_jobs)
    found = {name: _known(folder / name, recipe) for name, recipe in cells.items()}
    waiting = [name for name, result in found.items() if result is None]
    processes = _Processes(num_jobs)
    done = f" ({len(cells) - len(waiting)} other runs are done already)" if len(waiting) < len(cells) else ""
    with (
        tracking(f"training{done}", len(waiting), "runs", at_once=True) as task,
        ThreadPoolExecutor(num_jobs) as pool,  # leaving it waits for the runs
    ):
        futures = {
            name: pool.submit(_carry_out, folder / name, cells[name], variables.get(name, {}), processes, task)
            for name in waiting
        }
        try:
            for name, future in futures.items():
                found[name] = future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            if (count := processes.stop()) > 0:
                warn(f"stopping: {count} {'run saves its' if count == 1 else 'runs save their'} state")
            raise
    return {name: result for name, result in found.items() if result is not None}


def _known(folder: Path, recipe: Recipe) -> Result | None:
    """The result of a cell, if it has ended."""
    if not is_started(folder):
        return None
    check_recipe(folder, recipe)
    result, ours = read_result(folder), program_versions()
    if result is not None and result.versions not in ({}, ours):  # none are in results of earlier versions
        raise ConfigError(
            f"{folder} has the result of a run by {version_text(result.versions)}, and this is {version_text(ours)}: "
            f"give another --out, or {removal(folder)}"
        )
    return result


def runs_of(results: Iterable[Result]) -> Runs:
    """When and by what runs were made, for their evidence."""
    found = list(results)
    dates = sorted(result.date for result in found if result.date)
    versions = [result.versions for result in found if result.versions]
    return Runs(
        number=len(found),
        not_recorded=sum(not (result.versions and result.date) for result in found),
        first_date=dates[0] if dates else "",
        last_date=dates[-1] if dates else "",
        versions=[each for place, each in enumerate(versions) if each not in versions[:place]],
    )


def _carry_out(
    folder: Path, recipe: Recipe, variables: Mapping[str, str], processes: "_Processes", task: Task
) -> Result:
    if not is_started(folder):
        write_recipe(folder, recipe)  # not before: a run that never began must not be in the way of another
    with (folder / LOG).open("a") as log:
        code = processes.run([sys.executable, "-m", "nfnet_flax.claims.cell", str(folder)], variables, log)
    result = read_result(folder)
    if code != EXIT_DONE or result is None:
        said, log_file = last_lines(folder, 1), folder / LOG
        if code == EXIT_BAD_INPUT:  # what it said has the remedy
            raise ConfigError(f"the run in {folder} cannot go on: {said} (log: {log_file})")
        raise ConfigError(
            f"the run in {folder} ended with exit code {code} ({said}; log: {log_file}): remove the cause, and give "
            "the same command again; it continues"
        )
    task.advance()
    return result


class _Processes:
    """The processes of a study, at most `num_jobs` at a time, each on a core of its own if there are enough."""

    def __init__(self, num_jobs: int) -> None:
        cores = _cores()
        self._free: list[int | None] = [*cores[:num_jobs]] if len(cores) >= num_jobs else [None] * num_jobs
        self._running: set[subprocess.Popen[bytes]] = set()
        self._is_stopped = False
        self._lock = threading.Lock()

    def run(self, command: list[str], variables: Mapping[str, str], log: IO[str]) -> int:
        """Runs a command; returns its exit code. The end of its input tells it that it shall stop.

        A session of its own, because Ctrl-C is for this process, which then stops the others.
        """
        with self._lock:
            if self._is_stopped:
                return EXIT_STOPPED
            core = self._free.pop()
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **variables},
                start_new_session=True,
            )
            self._running.add(process)
            if core is not None:
                with contextlib.suppress(OSError):  # it has ended already
                    os.sched_setaffinity(process.pid, {core})
        try:
            return process.wait()
        finally:
            with self._lock:
                self._running.discard(process)
                self._free.append(core)
                assert process.stdin is not None
                process.stdin.close()

    def stop(self) -> int:
        """Starts no other process, and tells those that run to save their state and end; returns their number."""
        with self._lock:
            self._is_stopped = True
            for process in self._running:
                assert process.stdin is not None
                process.stdin.close()
            return len(self._running)
