"""`nfnet doctor`: reports what a run will find on this machine, and what is wrong. It only reads and changes nothing.

Every check runs in a thread of its own with a time limit, as reading from a disk that does not answer never ends.
Devices are looked for in another process, because a driver that hangs can only be killed.
"""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nfnet_flax.config import ConfigError
from nfnet_flax.data.prefetch import InputFailed
from nfnet_flax.doctor.bucket import check_bucket
from nfnet_flax.doctor.data import check_data
from nfnet_flax.doctor.devices import check_devices
from nfnet_flax.doctor.findings import Finding, seen, wrong
from nfnet_flax.doctor.images import check_images
from nfnet_flax.doctor.machine import check_disks, check_machine, check_versions
from nfnet_flax.doctor.workdir import check_workdir
from nfnet_flax.messages import as_given
from nfnet_flax.storage import BucketUrl
from nfnet_flax.training.layout import RECIPE
from nfnet_flax.training.run_folder import reading
from nfnet_flax.training.storage import StorageFailed

if TYPE_CHECKING:
    from nfnet_flax.recipe import Recipe

Check = Callable[[], list[Finding]]


def examine(
    place: Path | BucketUrl | None,
    recipe_path: str | None,
    *,
    timeout_s: float,
    all_images: bool = False,
    recipes: "list[Recipe] | None" = None,
) -> Iterator[tuple[str, list[Finding]]]:
    """Yields each topic with its findings, as soon as they are known.

    Args:
      place: folder of a run, which need not have begun; None: no run is examined.
      recipe_path: path of a recipe file, with its arguments; None: the recipe that is stored in the workdir, if any.
      timeout_s: time limit of each check, in seconds; for all images, of the time without any progress.
        A check that has not ended by then is a finding.
      all_images: whether every image is decoded, too.
      recipes: to this list the recipe that is examined is added, if there is one.
    """
    recipes = [] if recipes is None else recipes
    folder = None
    if isinstance(place, BucketUrl):
        findings = _within(timeout_s, functools.partial(check_bucket, place))
        yield "bucket", findings
        place = None if any(finding.is_wrong for finding in findings) else place
    if place is not None:
        folder = reading("workdir", str(place))
    workdir = None if folder is None else folder.path
    yield "versions", _within(timeout_s, check_versions)
    yield "recipe", _within(timeout_s, functools.partial(_check_recipe, workdir, recipe_path, recipes))
    recipe = recipes[0] if recipes else None
    devices = functools.partial(check_devices, recipe, workdir, is_stored=recipe_path is None, timeout_s=timeout_s)
    yield "devices", _within(timeout_s + 10, devices)
    yield "machine", _within(timeout_s, functools.partial(check_machine, recipe))
    if recipe is not None:
        yield "data", _within(timeout_s, functools.partial(check_data, recipe, workdir))
    if all_images:
        for finding in check_images(recipe, workdir, timeout_s=timeout_s):  # has time limits of its own
            yield "images", [finding]
    if folder is not None:
        until_s = time.monotonic() + timeout_s / 2  # reading a large checkpoint must not look like a disk that hangs
        yield "workdir", _within(timeout_s, functools.partial(check_workdir, folder, recipe, until_s=until_s))
    yield "disks", _within(timeout_s, functools.partial(check_disks, folder))


def _check_recipe(workdir: Path | None, recipe_path: str | None, recipes: "list[Recipe]") -> list[Finding]:
    """Adds the recipe to `recipes`, if there is one."""
    from nfnet_flax.recipe import read_recipe
    from nfnet_flax.recipe_file import load_recipe

    if recipe_path is not None:
        recipes.append(load_recipe(recipe_path))
    elif workdir is not None and (workdir / RECIPE).exists():
        with contextlib.suppress(ConfigError):  # `check_workdir` reports it
            recipes.append(read_recipe(workdir / RECIPE))
    return [seen(recipe.name) for recipe in recipes] or [seen("none, so no data are examined")]


def describe(topic: str, findings: list[Finding]) -> str:
    """The lines of a topic."""
    lines = [("WRONG: " if one.is_wrong else "") + as_given(" ".join(one.text.split())) for one in findings]
    return "\n".join(f"{topic if index == 0 else '':<10}{line}" for index, line in enumerate(lines))


def _within(timeout_s: float, check: Check) -> list[Finding]:
    """The findings of a check; an error that it raises is a finding, too, and so is that it did not end in time."""
    found: list[list[Finding]] = []

    def run() -> None:
        try:
            found.append(check())
        except (ConfigError, InputFailed, StorageFailed) as error:  # its message says what to do
            found.append([Finding(text=str(error), is_wrong=True)])
        except Exception as error:
            found.append([wrong(f"{type(error).__name__}: {error}", "this check could not be finished")])

    thread = threading.Thread(target=run, name="check", daemon=True)  # one that is stuck must not stop this process
    thread.start()
    thread.join(timeout_s)
    return found[0] if found else [wrong(f"no answer within {timeout_s:g} s", "a disk or driver hangs; look at it")]
