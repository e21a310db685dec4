"""The identity of a run: everything on which its updates depend, recorded in its folder and compared at every start.

The processes of a run compare these facts with one another, and a start compares them with those of the run's first
start. Recipe, input, class names and the user's own code must be the same. Differences of the environment (versions,
processor, settings of JAX) are only reported, as only the last bits depend on it. Settings on which no update depends
may change.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax

from nfnet_flax import runtime
from nfnet_flax.config import ConfigError, require
from nfnet_flax.config_json import CodeNotLoaded, differences, to_json
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.pipeline import input_changes
from nfnet_flax.json_files import read_json, write_json
from nfnet_flax.parallel.processes import Processes, check_agreement
from nfnet_flax.recipe import (
    Recipe,
    free_differences,
    length_change,
    read_recipe,
    recipe_differences,
    save_recipe,
)
from nfnet_flax.training import checkpoint, layout
from nfnet_flax.training.kept_code import OwnCode, changed_files, check_code, code_of, keep
from nfnet_flax.training.record import has_trained, stored_class_names, stored_initial, stored_input
from nfnet_flax.training.run_folder import RunFolder
from nfnet_flax.units import shown


def check_same_run(processes: Processes, recipe: Recipe, workdir: str, timeout_s: float, **options: str) -> None:
    """Checks, before anything is computed, that all processes have the same settings; `options` are those of the start.

    Raises:
      ConfigError: recipe, the user's own code that it uses, workdir, versions, kind of device or processor, settings of
        JAX or the number of devices differ, or a process did not report them in time.
    """
    if processes.count == 1:
        return

    def fields(data: Any, path: str) -> dict[str, str]:
        if not isinstance(data, dict):
            return {path: repr(data)}
        return {name: text for key, value in data.items() for name, text in fields(value, f"{path}.{key}").items()}

    shared = dataclasses.replace(recipe, data=recipe.data.with_execution_of(DataConfig(prefetch_batches=2)))
    # Images, initial weights and a teacher may have other paths on each host: their contents are compared.
    settings = to_json(shared, places=False)
    del settings["init_from"]
    facts = {
        **runtime.environment(),
        "devices of each process": str(jax.local_device_count()),
        "workdir": workdir,
        **options,
        **fields(settings, "recipe"),
        **{f"code {path}": digest for path, digest in code_of(recipe).digests().items()},
    }
    check_agreement(processes, "run", facts, timeout_s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity:
    """The identity of the run that a start is about to begin or continue."""

    recipe: Recipe
    input: dict[str, Any]
    """Facts on which the contents of the batches depend (`pipeline.input_identity`)."""
    class_names: tuple[str, ...]
    """Names of the classes, in the order of the labels."""
    environment: dict[str, str]
    """Facts on which the last bits depend (`runtime.environment`)."""
    code: OwnCode
    """The user's own code that the recipe uses."""
    initial: dict[str, str] | None = None
    """The record of the weights that it starts from (`initial.InitialWeights`); None: random ones, or a checkpoint."""


def claim(processes: Processes, folder: RunFolder, identity: Identity, timeout_s: float) -> list[str]:
    """Records the identity of a new run (in process 0), or checks that the folder belongs to the same run.

    Returns:
      Messages for the user: allowed differences from the last start, and what they mean.

    Raises:
      ConfigError: the folder cannot be written, belongs to another recipe, input or classes, to other code or other
        initial weights, or is not the same folder in all processes.
    """
    lines = []
    workdir = folder.path
    if processes.is_first:
        lines = _claim(workdir, identity)
        folder.push()
    processes.barrier("claimed", timeout_s)
    if not processes.is_first:
        folder.pull()
        remedy = f"is not the folder of process 0, as process {processes.index} finds no recipe.json in it: "
        remedy += "give one on a file system that all hosts share"
        require((workdir / layout.RECIPE).exists(), "workdir", str(workdir), remedy)
        _check_recipe(workdir, read_recipe(workdir / layout.RECIPE), identity.recipe)
        changed = _check_input(workdir, identity.input)
        remedy = f"differ from those that process 0 finds ({'; '.join(changed)}): give all hosts the same copy"
        require(not changed, "the images", f"of process {processes.index}", remedy)
        names = stored_class_names(workdir)
        remedy = "are not those of process 0; give all processes the same training set"
        require(names == identity.class_names, "the class names", identity.class_names, remedy)
    return lines


def _claim(workdir: Path, identity: Identity) -> list[str]:
    step = checkpoint.latest_step(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lines = _take_off_record(workdir, identity)
        lines += _claim_code(workdir, identity.code)
        if not (workdir / layout.RECIPE).exists():
            save_recipe(identity.recipe, workdir / layout.RECIPE)
        before = read_recipe(workdir / layout.RECIPE)
        _check_recipe(workdir, before, identity.recipe)
        recipe, said = _check_initial(workdir, before, identity, step)
        lines += said
        num_examples = identity.input["source"]["num_examples"]
        longer = length_change(before, identity.recipe, num_examples=num_examples, step=step or 0)
        for name in (layout.INPUT, layout.CLASSES):
            if step is not None and not (workdir / name).exists():
                raise ConfigError(f"workdir {str(workdir)!r} holds checkpoints but no {name}: start in a new workdir")
        _record(workdir / layout.INPUT, identity.input)
        images = _check_input(workdir, identity.input)
        _record(workdir / layout.CLASSES, {"class_names": list(identity.class_names)})
        if identity.initial is not None:
            _record(workdir / layout.INITIAL, identity.initial)
        lines += _claim_environment(workdir, identity.environment)
        lines += [longer] if longer is not None else []
        if images:
            what = "held-out images or contents of training images changed; the new ones are used from now on"
            lines.append(f"{what}: {'; '.join(images)}")
            write_json(workdir / layout.INPUT, identity.input)
        if changed := free_differences(before, recipe):
            lines.append(f"changed since the last start, without an effect on updates: {'; '.join(changed)}")
        if before != recipe:
            save_recipe(recipe, workdir / layout.RECIPE)
    except OSError as error:
        raise ConfigError(f"workdir {str(workdir)!r} cannot be written ({error.strerror}): give another one") from error
    return lines


def _take_off_record(workdir: Path, identity: Identity) -> list[str]:
    """If the last start trained nothing, for example because of an image or a wrong number, and this start is another
    run, removes the record of the last start. Returns messages for the user. Called by the owner of the folder."""
    if has_trained(workdir):
        return []
    changed = [f"code of {path}" for path in changed_files(workdir, identity.code)]
    if (workdir / layout.RECIPE).exists() and not changed:  # with other code it may not be readable
        try:
            changed += recipe_differences(read_recipe(workdir / layout.RECIPE), identity.recipe)
        except CodeNotLoaded as error:
            changed.append(f"{error}")
    if (workdir / layout.INPUT).exists():
        changed += input_changes(stored_input(workdir), identity.input)[0]
    names = stored_class_names(workdir)
    if names is not None and names != identity.class_names:
        changed.append(f"class names: {shown(names)} -> {shown(identity.class_names)}")
    then, now = stored_initial(workdir), identity.initial
    if then is not None and now is not None and then["content"] != now["content"]:
        changed.append(f"init_from: {then['source']} -> {now['source']}, with other content")
    if not changed:
        return []
    for name in (layout.RECIPE, layout.INPUT, layout.CLASSES, layout.INITIAL):
        (workdir / name).unlink(missing_ok=True)
    if (workdir / layout.CODE).exists():
        shutil.rmtree(workdir / layout.CODE)
    return [f"another run than at the last start, which trained nothing here: {'; '.join(dict.fromkeys(changed))}"]


def _claim_code(workdir: Path, code: OwnCode) -> list[str]:
    """Records the user's own code, or checks that it is as recorded. Returns messages for the user.

    Raises:
      ConfigError: it changed.
    """
    check_code(workdir, code)
    lines = [
        f"the code of {name} is in no file, so the run keeps no copy of it, and a change of it is not noticed: "
        "define it in a file"
        for name in code.without_source
    ]
    if code.files and not (workdir / layout.CODE).exists() and has_trained(workdir):
        lines.append(f"the run's own code was not recorded; from now on it is: {', '.join(code.files)}")
    keep(workdir, code)
    return lines


def _check_initial(workdir: Path, before: Recipe, identity: Identity, step: int | None) -> tuple[Recipe, list[str]]:
    """Checks that a run that starts at step 0 again starts from the same weights as before.

    Returns:
      The recipe to record, in which `init_from` changes only if its weights were read and compared; and messages for
      the user.

    Raises:
      ConfigError: the weights are different ones.
    """
    recipe, now = identity.recipe, identity.initial
    if step is not None and recipe.init_from != before.init_from:
        line = f"init_from = {recipe.init_from!r} has no effect: the run continues from a checkpoint, and began with "
        return dataclasses.replace(recipe, init_from=before.init_from), [f"{line}{before.init_from!r}"]
    then = stored_initial(workdir)
    if then is not None and now is not None and then["content"] != now["content"]:
        raise ConfigError(
            f"init_from = {recipe.init_from!r}: holds other weights than this run began with ({then['source']}, "
            f"content {then['content']} -> {now['source']}, content {now['content']}): restore those, or give another "
            "workdir. If they are of a run that was trained further, note that nfnet convert run writes a file that "
            "does not change"
        )
    return recipe, []


def _check_recipe(workdir: Path, stored: Recipe, recipe: Recipe) -> None:
    """Raises `ConfigError` if a field differs on which updates depend."""
    if lines := recipe_differences(stored, recipe):
        raise ConfigError(
            f"workdir {str(workdir)!r} belongs to another recipe; give another workdir, or the same values as before:\n"
            + "\n".join(f"  {line}" for line in lines)
        )


def _record(path: Path, data: Any) -> None:
    if not path.exists():
        write_json(path, data)


def _check_input(workdir: Path, now: dict[str, Any]) -> list[str]:
    """Returns the differences that are only reported (`pipeline.input_changes`).

    Raises:
      ConfigError: the images, their number or order, or the settings of the batches changed; the message says which.
    """
    lines, said = input_changes(stored_input(workdir), now)
    if lines:
        raise ConfigError(
            f"workdir {str(workdir)!r} was trained on another input; restore these images or use another workdir:\n"
            + "\n".join(f"  {line}" for line in lines)
        )
    return said


def _claim_environment(workdir: Path, environment: dict[str, str]) -> list[str]:
    """Records the environment; returns messages for the user if it changed since the last start."""
    path = workdir / layout.ENVIRONMENT
    step = checkpoint.latest_step(workdir)
    changed: list[str] = []
    if path.exists():
        before = read_json(path, "move it away; nfnet train writes it again")
        changed = differences(before, environment)
        if not changed:
            return []
        # Kept as a record of the environment that computed the steps so far. If the file already exists, the last
        # environment has not computed any step that was saved.
        kept = workdir / f"environment-until-step-{step or 0}.json"
        if not kept.exists():
            path.rename(kept)
    write_json(path, environment)
    if not changed or step is None:
        return []
    return [
        f"another environment than before ({'; '.join(changed)}): from step {step} on the last bits will differ from "
        "those of a run that stayed in one; for the same bits, stop now and continue where these values are as before"
    ]
