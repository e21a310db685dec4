"""What processes have in common that a claim starts for a long piece of work: a folder with a recipe, a log, and an
end that comes with the end of the process that started them."""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from nfnet_flax.config import ConfigError
from nfnet_flax.config_json import differences, to_json
from nfnet_flax.json_files import read_json
from nfnet_flax.recipe import Recipe, read_recipe, save_recipe
from nfnet_flax.runtime import versions

RECIPE, LOG = "recipe.json", "log"
_LAST_LINES = 3


def prepare_folder(folder: Path, recipe: Recipe) -> None:
    """Makes the folder of a piece of work, with its recipe, if it is not there.

    Raises:
      ConfigError: it is that of another recipe, or damaged, or cannot be made.
      StorageFailed: it cannot be read.
    """
    if (folder / RECIPE).exists():
        check_recipe(folder, recipe)
    else:
        write_recipe(folder, recipe)


def removal(folder: Path) -> str:
    """The remedy for the damaged folder of a piece of work."""
    return f"remove this folder ({folder}); the same command then repeats this run"


def kept_recipe(folder: Path) -> Recipe:
    """The recipe of a piece of work.

    Raises:
      ConfigError: it is missing or damaged.
      StorageFailed: it cannot be read.
    """
    path = folder / RECIPE
    read_json(path, removal(folder))
    try:
        return read_recipe(path)
    except ConfigError as error:  # its advice is that of nfnet train
        raise ConfigError(f"{path} is damaged, or of another version of this package: {removal(folder)}") from error


def check_recipe(folder: Path, recipe: Recipe) -> None:
    """Checks that a folder is that of a recipe.

    Raises:
      ConfigError: it is that of another one, or damaged.
      StorageFailed: it cannot be read.
    """
    # All fields: a run may continue with another length, but its result would not be that of this recipe.
    if changed := differences(to_json(kept_recipe(folder)), to_json(recipe)):
        said = f"{folder} has another run ({'; '.join(changed)})"
        raise ConfigError(f"{said}: give another --out, or remove this folder ({folder})")


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Makes the folder of a piece of work, and writes its recipe there.

    Raises:
      ConfigError: it cannot be made.
    """
    path = folder / RECIPE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_recipe(recipe, path)
    except OSError as error:
        raise ConfigError(f"out: {str(folder)!r} cannot be made ({error.strerror}): give another --out") from error


def program_versions() -> dict[str, str]:
    """Versions of what determines a result: this package and JAX."""
    return {name: version for name, version in versions().items() if name in ("nfnet_flax", "jax")}


@contextlib.contextmanager
def child(module: str, arguments: Sequence[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs a module of this package and prints into the log of a folder; it is killed by an exception.

    Its input ends when this process ends in any way. It has a session of its own, because Ctrl-C is for this process,
    which then ends the other.
    """
    command = [sys.executable, "-m", module, *arguments]
    with (
        (folder / LOG).open("ab") as log,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True) as process,
    ):
        try:
            yield process
        except BaseException:  # Ctrl-C, too; it is raised again
            process.kill()
            raise


def at_end_of_input(act: Callable[[], None]) -> None:
    """Calls `act` in a thread when the standard input ends: the process that started this one holds its other end,
    writes nothing, and closes it however it ends."""

    def wait() -> None:
        os.read(0, 1)  # not by `sys.stdin`: Python ends with a fatal error while a thread waits in its buffer
        act()

    threading.Thread(target=wait, daemon=True).start()


def last_lines(folder: Path, count: int = _LAST_LINES) -> str:
    """The end of the log of a process, in one line."""
    return " | ".join((folder / LOG).read_text(errors="replace").splitlines()[-count:]) or "it printed nothing"
