"""What the folder of a run holds, and what is wrong with it; reads, and changes nothing. `nfnet doctor` shows it."""

import contextlib
import dataclasses
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from nfnet_flax.config import ConfigError

if TYPE_CHECKING:
    from nfnet_flax.recipe import Recipe

KINDS = ("checkpoints", "best")
"""Folders of checkpoints within a workdir."""
_CHECKPOINT_FILES = ("_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt", "notes/metadata")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    text: str
    """What was seen; with a problem, also what to do about it."""
    is_wrong: bool = False
    """Whether it is a problem."""


def seen(text: str) -> Finding:
    """Something that is as it may be."""
    return Finding(text=text)


def wrong(problem: str, remedy: str) -> Finding:
    """A problem, and what to do about it."""
    return Finding(text=f"{problem}: {remedy}", is_wrong=True)


def check_workdir(workdir: Path, recipe: "Recipe | None") -> list[Finding]:
    """Recipe, checkpoints and metrics of a run.

    Args:
      workdir: folder of the run, begun or not.
      recipe: that it is to go on with; None: its own.
    """
    if workdir.exists() and not workdir.is_dir():
        return [wrong(f"{workdir} is no folder", "give another workdir")]
    findings = [seen(f"{workdir}" + ("" if workdir.exists() else " does not exist yet; nfnet train makes it"))]
    existing = nearest(workdir)
    # Root is told yes by `access`, and a probe would change something; so the read-only flag is looked at, too.
    if not os.access(existing, os.W_OK | os.X_OK) or os.statvfs(existing).f_flag & os.ST_RDONLY:
        findings.append(wrong(f"{existing} cannot be written", "mend its permissions or mount, or give another one"))
    if workdir.exists():
        findings += [finding for kind in KINDS for finding in _check_checkpoints(workdir / kind)]
        findings += _check_metrics(workdir / "metrics.jsonl")
        findings += _check_identity(workdir, recipe)
    return findings


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of what is named like a checkpoint, in order; nothing where there is no such folder."""
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def checkpoint_damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be restored, as far as files show whose arrays are not read; None: it seems whole."""
    for name in _CHECKPOINT_FILES:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size == 0:
            return f"{name} is empty"
    return None


def _check_identity(workdir: Path, recipe: "Recipe | None") -> list[Finding]:
    """What tells that a start in this folder is the same run as before."""
    from nfnet_flax.recipe import read_recipe, recipe_differences

    has_begun = any(checkpoint_steps(workdir / kind) for kind in KINDS)
    findings = []
    if has_begun and not (workdir / "input.json").exists():
        findings.append(wrong(f"{workdir / 'input.json'} is missing", "put it back, or start in a new workdir"))
    stored = workdir / "recipe.json"
    if not stored.exists():
        remedy = "nfnet train with the run's own recipe writes it again"
        return [*findings, wrong(f"{stored} is missing", remedy) if has_begun else seen("no run has begun here")]
    try:
        own = read_recipe(stored)
    except ConfigError as error:
        remedy = "move the file away; nfnet train with the run's own recipe writes it again"
        return [*findings, wrong(str(error), remedy)]
    changed = [] if recipe is None else recipe_differences(own, recipe)
    return findings + [wrong(f"the run has another recipe ({line})", "give its values back") for line in changed]


def _check_checkpoints(folder: Path) -> list[Finding]:
    steps, kind = checkpoint_steps(folder), folder.name
    damage = {step: reason for step in steps if (reason := checkpoint_damage(folder / str(step))) is not None}
    good = [step for step in steps if step not in damage]
    findings = []
    if good:
        newest = folder / str(good[-1])
        about = f"newest {good[-1]} of {human_size(tree_bytes(newest))}, {_age(newest)} old"
        findings.append(seen(f"{kind}: steps {', '.join(map(str, good))}; {about}"))
    for path in folder.glob("*tmp*"):
        findings.append(seen(f"{path} is being written, or was when the run was killed; it is no checkpoint"))
    for step, reason in damage.items():
        before = [other for other in good if other < step]
        consequence = f"go on from step {before[-1]}" if before else "begin anew"
        if (folder / str(step)).exists():  # a run may have deleted it meanwhile
            findings.append(wrong(f"{folder / str(step)} is damaged ({reason})", f"move it away to {consequence}"))
    return findings or [seen(f"{kind}: none")]


def _check_metrics(path: Path) -> list[Finding]:
    from nfnet_flax.training.metrics import read_rows

    if not path.exists():
        return []
    rows, num_lines = read_rows(path), len(path.read_text().splitlines())
    findings = [seen(f"metrics: {len(rows)} rows" + (f", to step {rows[-1]['step']}" if rows else ""))]
    if len(rows) < num_lines - 1:  # the last line may have been cut by a kill
        remedy = "mend or delete the line; a resume drops all rows from it on"
        findings.append(wrong(f"line {len(rows) + 1} of the {num_lines} in {path} is damaged", remedy))
    return findings


def nearest(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def tree_bytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    num_bytes = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a run may delete it meanwhile
            num_bytes += path.stat().st_size if path.is_file() else 0
    return num_bytes


def human_size(num_bytes: int) -> str:
    """Such as `1.5 GiB`."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB")):
        if num_bytes >= 2**power:
            return f"{num_bytes / 2**power:.1f} {unit}"
    return f"{num_bytes / 2**10:.1f} KiB"


def _age(path: Path) -> str:
    seconds = time.time() - path.stat().st_mtime
    for length, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
