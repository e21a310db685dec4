"""One cell of a study: a training run in a process of its own, whose result is kept in a file.

`python -m nfnet_flax.claims.cell FOLDER` trains the recipe in `FOLDER/recipe.json` in `FOLDER/run`, or continues that
run, and then writes `FOLDER/result.json`. When its standard input ends, as it does when the process that started it
ends in any way, it saves the run and ends.
"""

import dataclasses
import datetime
import os
import signal
import sys
import typing
from pathlib import Path
from typing import Literal

from nfnet_flax.claims.child import at_end_of_input, kept_recipe, program_versions, removal
from nfnet_flax.config import ConfigError
from nfnet_flax.data.prefetch import InputFailed
from nfnet_flax.exit_codes import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_INPUT_FAILED,
    EXIT_STOPPED,
    EXIT_STORAGE_FAILED,
)
from nfnet_flax.garbage import collect_rarely
from nfnet_flax.json_files import StorageFailed, read_json, write_json
from nfnet_flax.storage.file_locks import locked
from nfnet_flax.training.layout import METRICS
from nfnet_flax.training.loop import TrainingDiverged, train
from nfnet_flax.training.metrics import read_rows
from nfnet_flax.training.restoring import AllDamaged

RESULT, RUN = "result.json", "run"
_LOCK = "lock"
Outcome = Literal["finished", "diverged"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """How the run of a cell ended."""

    outcome: Outcome
    """`diverged`: the loss or a gradient was not finite."""
    step: int
    """Number of updates that are on record."""
    metrics: dict[str, float]
    """Metrics of the evaluation at its end; empty if it diverged."""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    """Versions of this package and of JAX; empty in results of earlier versions, which did not record them."""
    date: str = ""
    """Day on which it ended, such as 2026-01-31; empty as above."""


def read_result(folder: Path) -> Result | None:
    """The result of the cell in a folder; None: it has not ended yet.

    Raises:
      ConfigError: the file is damaged.
      StorageFailed: it cannot be read.
    """
    path = folder / RESULT
    if not path.exists():
        return None
    remedy = removal(folder)
    match read_json(path, remedy):
        case {"outcome": str(outcome), "step": int(step), "metrics": dict(metrics), **others} if (
            outcome in typing.get_args(Outcome)
        ):
            versions, date = others.get("versions", {}), others.get("date", "")
            return Result(
                outcome=typing.cast(Outcome, outcome), step=step, metrics=metrics, versions=versions, date=date
            )
        case content:
            raise ConfigError(f"{path} is damaged ({content!r}): {remedy}")


def is_started(folder: Path) -> bool:
    """Whether the run of a cell has begun: before, its folder may become that of another run."""
    return (folder / RUN).exists() or (folder / RESULT).exists()


def main(folder: Path) -> int:
    """Trains; returns an exit code of `exit_codes`. If the user can correct what went wrong, the last line that is
    printed says how."""
    at_end_of_input(lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        with locked(folder / _LOCK, wait=True):  # a process of a study that was killed may still be saving the run
            return _train(folder)
    except AllDamaged as error:
        code, text = EXIT_BAD_INPUT, f"{error.said}: {removal(folder)}"
    except ConfigError as error:
        code, text = EXIT_BAD_INPUT, str(error)
    except InputFailed as error:
        code, text = EXIT_INPUT_FAILED, str(error)
    except StorageFailed as error:
        code, text = EXIT_STORAGE_FAILED, str(error)
    print(" ".join(text.partition("\nTraceback")[0].split()), flush=True)
    return code


def _train(folder: Path) -> int:
    if read_result(folder) is not None:
        return EXIT_DONE
    recipe, run = kept_recipe(folder), folder / RUN
    try:
        ended = train(recipe, run, owns_process=True)
    except TrainingDiverged as error:
        print(error)
        rows = read_rows(run / METRICS)
        result = _ended_now("diverged", rows[-1]["step"] if rows else 0, {})
    else:
        if not ended.finished:
            return EXIT_STOPPED
        result = _ended_now("finished", ended.step, ended.metrics)
    write_json(folder / RESULT, dataclasses.asdict(result))
    return EXIT_DONE


def _ended_now(outcome: Outcome, step: int, metrics: dict[str, float]) -> Result:
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return Result(outcome=outcome, step=step, metrics=metrics, versions=program_versions(), date=date)


if __name__ == "__main__":
    collect_rarely()
    sys.exit(main(Path(sys.argv[1])))
