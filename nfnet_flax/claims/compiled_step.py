"""One compilation for a claim: a training step under the TPU compiler, in a process of its own, whose plan is kept in a
file.

`python -m nfnet_flax.claims.compiled_step FOLDER TOPOLOGY REMATERIALIZATION` compiles the step of the recipe in
`FOLDER/recipe.json` and writes `FOLDER/REMATERIALIZATION.json`. When its standard input ends, as it does when the
process that started it ends in any way, it ends.
"""

import dataclasses
import importlib.metadata
import os
import re
import subprocess
import sys
import threading
import time
import typing
from pathlib import Path
from typing import Any

from nfnet_flax.claims.child import (
    RECIPE,
    at_end_of_input,
    child,
    last_lines,
    prepare_folder,
    program_versions,
)
from nfnet_flax.config import ConfigError
from nfnet_flax.data.source_config import ArrayRecordSource
from nfnet_flax.exit_codes import EXIT_DONE, EXIT_STOPPED
from nfnet_flax.garbage import collect_rarely
from nfnet_flax.json_files import read_json, write_json
from nfnet_flax.models.classifier import Rematerialization
from nfnet_flax.programs.plan import Plan, devices_of, plan, set_environment
from nfnet_flax.progress import COMPUTING_LINE_S, tracking
from nfnet_flax.recipe import Recipe, read_recipe

_NUM_OPERATIONS = 10
"""Number of the most expensive operations that a plan names."""
_POLL_S = 0.2
_TOO_LARGE = "RESOURCE_EXHAUSTED"
"""What the compiler's error says of a program that does not fit into the memory of the chip."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What one compilation gave."""

    rematerialization: Rematerialization
    plan: Plan | None
    """None: there is no program, for the reason in `problem`."""
    num_chips: int
    """Number of chips of the topology; some kinds have two devices on a chip. 0 if there is no program."""
    libtpu: str
    """Version of the compiler."""
    problem: str = ""
    """Why there is no program."""
    limit_s: float | None = None
    """Time limit that the compilation exceeded, in seconds; None: it did not."""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    """Versions of this package and of JAX; empty in results of earlier versions."""

    @property
    def is_too_large(self) -> bool:
        """Whether the step does not fit into the memory of the chip: another form of it may."""
        return not self.plan.fits if self.plan is not None else _TOO_LARGE in self.problem


def without_images(recipe: Recipe) -> Recipe:
    """A recipe of ImageNet whose source does not depend on what lies in the folder data/imagenet, as a compilation
    opens no images."""
    source = ArrayRecordSource(train=("train-*.array_record",), eval=("eval-*.array_record",))
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, source=source))


def prepared_folder(folder: Path, recipe: Recipe, topology: str) -> Path:
    """The folder, inside `folder`, of the compilations of a recipe for a topology; it has the recipe.

    Raises:
      ConfigError: it is that of another recipe, or cannot be made.
    """
    slice_name = re.sub(r"\W", "_", topology)
    place = folder / recipe.name / f"{slice_name}-{recipe.execution.num_microbatches}_parts"
    prepare_folder(place, recipe)
    return place


def compiled(
    folder: Path,
    topology: str,
    rematerialization: Rematerialization,
    timeout_s: float,
    stopped: threading.Event | None = None,
) -> Compiled:
    """The kept result of a compilation; if there is none, or only one with a shorter time limit or of other versions of
    this package, JAX or the compiler, compiles.

    A compilation that ended in another way, such as for lack of memory, is not kept, so the next call repeats it.

    Args:
      folder: folder of the compilation, with its recipe, as `prepared_folder` makes it.
      topology: kind and number of TPU chips.
      rematerialization: what is used in place of the recipe's.
      timeout_s: time limit, in seconds.
      stopped: ends the compilation when it is set by another thread; None: nothing does.

    Raises:
      ConfigError: the kept file is damaged, or the compilation was stopped.
      StorageFailed: it cannot be read.
    """
    path = folder / f"{rematerialization}.json"
    kept = read_compiled(path)
    is_of_these = kept is not None and (kept.versions, kept.libtpu) == (program_versions(), libtpu_version())
    if kept is not None and is_of_these and (kept.limit_s is None or kept.limit_s >= timeout_s):
        return kept
    place = f"{folder.parent.name}, rematerialization {rematerialization}"
    with (
        child("nfnet_flax.claims.compiled_step", [str(folder), topology, rematerialization], folder) as process,
        tracking(f"compiling the step for {topology} ({place})", first_line_s=COMPUTING_LINE_S),
    ):
        try:
            code = _exit_code(process, timeout_s, stopped)
        except subprocess.TimeoutExpired:
            process.kill()
            text = f"did not compile within {timeout_s:g} s"
            too_slow = _without_plan(rematerialization, text, timeout_s)
            write_json(path, dataclasses.asdict(too_slow))
            return too_slow
    found = read_compiled(path) if code == EXIT_DONE else None
    if found is None:
        text = f"the compilation ended with exit code {code}: {last_lines(folder)}"
        found = _without_plan(rematerialization, text, None)
    return found


def _exit_code(process: subprocess.Popen[bytes], timeout_s: float, stopped: threading.Event | None) -> int:
    """Waits for the end of a process."""
    if stopped is None:
        return process.wait(timeout_s)
    ends_s = time.monotonic() + timeout_s
    while process.poll() is None:
        if stopped.wait(_POLL_S):
            raise ConfigError("the compilation was stopped")
        if time.monotonic() >= ends_s:
            raise subprocess.TimeoutExpired(process.args, timeout_s)
    return process.returncode


def read_compiled(path: Path) -> Compiled | None:
    """The content of a file that a compilation wrote; None: there is none.

    Raises:
      ConfigError: it is damaged.
      StorageFailed: it cannot be read.
    """
    if not path.exists():
        return None
    remedy = "remove it; the command then repeats the compilation"
    content = read_json(path, remedy)
    try:
        return compiled_of(content)
    except (TypeError, KeyError, ValueError) as error:
        raise ConfigError(f"{path} is damaged ({error}): {remedy}") from error


def compiled_of(content: dict[str, Any]) -> Compiled:
    """The inverse of `dataclasses.asdict`, also after it was JSON."""
    stored = content["plan"]
    if stored is not None:
        operations = [(str(name), int(cycles)) for name, cycles in stored["most_expensive"]]
        stored = Plan(**{**stored, "most_expensive": operations})
    return Compiled(**{**content, "plan": stored})


def libtpu_version() -> str:
    """Version of the TPU compiler; empty: it is not installed."""
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _without_plan(rematerialization: Rematerialization, problem: str, limit_s: float | None) -> Compiled:
    return Compiled(
        rematerialization=rematerialization,
        plan=None,
        num_chips=0,
        libtpu=libtpu_version(),
        problem=problem,
        limit_s=limit_s,
        versions=program_versions(),
    )


def main(folder: Path, topology: str, rematerialization: Rematerialization) -> int:
    """Compiles; returns an exit code of `exit_codes`. What the compiler refuses is a result, too.

    Raises:
      ConfigError: there is no compiler, or it does not know the topology.
    """
    at_end_of_input(lambda: os._exit(EXIT_STOPPED))  # the compiler cannot be interrupted, and there is nothing to save
    set_environment()
    recipe = read_recipe(folder / RECIPE)
    execution = dataclasses.replace(recipe.execution, rematerialization=rematerialization)
    chips = {tuple(device.coords) for device in devices_of(topology)}
    try:
        found = Compiled(
            rematerialization=rematerialization,
            plan=plan(dataclasses.replace(recipe, execution=execution), topology, num_operations=_NUM_OPERATIONS),
            num_chips=len(chips),
            libtpu=libtpu_version(),
            versions=program_versions(),
        )
    except ConfigError as error:
        found = _without_plan(rematerialization, str(error), None)
    write_json(folder / f"{rematerialization}.json", dataclasses.asdict(found))
    return EXIT_DONE


if __name__ == "__main__":
    collect_rarely()
    _folder, _topology, _rematerialization = sys.argv[1:]
    assert _rematerialization in typing.get_args(Rematerialization)
    sys.exit(main(Path(_folder), _topology, typing.cast(Rematerialization, _rematerialization)))
