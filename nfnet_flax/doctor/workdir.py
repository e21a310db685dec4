"""Checks of the folder of a run: what it contains, and what is wrong with it. They only read."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from nfnet_flax.config import ConfigError
from nfnet_flax.config_json import CodeNotLoaded
from nfnet_flax.doctor.findings import Finding, nearest, seen, tree_bytes, wrong
from nfnet_flax.progress import track
from nfnet_flax.training import layout
from nfnet_flax.training.layout import Damaged, read_array, read_sealed, steps_in
from nfnet_flax.training.mirror import fetch_state
from nfnet_flax.training.run_folder import RunFolder
from nfnet_flax.training.storage import StorageFailed
from nfnet_flax.units import human_size

if TYPE_CHECKING:
    from nfnet_flax.recipe import Recipe

_MAX_LINES = 5
"""Largest number of damaged lines of a file that are named."""
_DELETION_S = 1.0
"""Time within which a run that is training has deleted a checkpoint that it no longer keeps, in seconds."""


def check_workdir(folder: RunFolder, recipe: "Recipe | None", *, until_s: float) -> list[Finding]:
    """Recipe, checkpoints and metrics of a run.

    Args:
      folder: folder of the run, which need not have begun.
      recipe: the recipe with which the run shall continue; None: its own.
      until_s: time of `time.monotonic` after which no more contents of checkpoints are read.
    """
    workdir = folder.path
    if workdir.exists() and not workdir.is_dir():
        return [wrong(f"{workdir} is no folder", "give another workdir")]
    findings = [seen(f"{workdir}" + ("" if workdir.exists() else " does not exist yet; nfnet train makes it"))]
    existing = nearest(workdir)
    # For root, `access` is always true, and writing a test file would change something; so the read-only flag is
    # checked.
    if not os.access(existing, os.W_OK | os.X_OK) or os.statvfs(existing).f_flag & os.ST_RDONLY:
        remedy = "change its permissions, mount it writable, or give another one"
        findings.append(wrong(f"{existing} cannot be written", remedy))
    if workdir.exists():
        findings += [
            finding for kind in layout.CHECKPOINT_KINDS for finding in _check_checkpoints(workdir / kind, until_s)
        ]
        findings += _check_metrics(workdir)
        findings += _check_trackers(workdir)
        findings += _check_logs(workdir / layout.LOG)
        findings += _check_owner(folder)
        findings += _check_identity(workdir, recipe)
    return findings


def _check_owner(folder: RunFolder) -> list[Finding]:
    from nfnet_flax.training.lease import owner_of

    found = owner_of(folder.owner_folder)
    if found is None:
        return []
    owner, alive_at = found
    text = f"process {owner.pid} on host {owner.host!r} trains here since {owner.since}; last sign of life: {alive_at}"
    return [seen(text)]


def _check_checkpoints(folder: Path, until_s: float) -> list[Finding]:
    """The checkpoints in a folder, and what is wrong with them; the contents of the newest are read first."""
    if folder.exists() and not folder.is_dir():
        return [wrong(f"{folder} is no folder", "move it away; nfnet train makes one")]
    problems: dict[int, Damaged | StorageFailed] = {}
    unread, good = [], []
    for step in steps_in(folder):
        problem, is_read = _problem_of(folder / str(step), until_s)
        if problem is not None:
            problems[step] = problem
        elif (folder / str(step)).exists():  # a run may have deleted it meanwhile
            good.append(step)
            unread += [] if is_read else [step]
    findings = []
    if good:
        about = _about(folder / str(good[0]))
        findings.append(seen(f"{folder.name}: steps {', '.join(map(str, reversed(good)))}; {about}"))
    if unread:
        steps = ", ".join(map(str, unread))
        findings.append(seen(f"{folder.name}: not enough time to read the contents of {steps}; give more --timeout-s"))
    for path in folder.glob("*tmp*"):
        findings.append(seen(f"{path} is being written, or was when the run was killed; it is no checkpoint"))
    findings += [_describe_problem(folder / str(step), problems[step], good) for step in sorted(problems)]
    return findings or [seen(f"{folder.name}: none")]


def _about(newest: Path) -> str:
    try:
        return f"newest {newest.name} of {human_size(tree_bytes(newest))}, {_age(newest)} old"
    except FileNotFoundError:
        return f"newest {newest.name}, which the run has deleted meanwhile"


def _problem_of(checkpoint: Path, until_s: float) -> tuple[Damaged | StorageFailed | None, bool]:
    """What is wrong with a checkpoint, if anything, and whether all of it was read."""
    try:
        return None, _read(checkpoint, until_s)
    except (Damaged, StorageFailed):
        time.sleep(_DELETION_S)
    if not checkpoint.exists():
        return None, False
    try:
        return None, _read(checkpoint, until_s)
    except (Damaged, StorageFailed) as error:
        return error, False


def _read(checkpoint: Path, until_s: float) -> bool:
    """Compares a checkpoint with its checksums; False if there was not enough time for all of it.

    Raises:
      Damaged: it differs from what was saved.
      StorageFailed: it cannot be read.
    """
    fetch_state(checkpoint)
    _, saved = read_sealed(checkpoint)
    context = layout.array_context()
    for name, text in track(saved.items(), f"reading {checkpoint}", "arrays"):
        if time.monotonic() >= until_s:
            return False
        read_array(checkpoint, name, text, context)
    return True


def _describe_problem(checkpoint: Path, problem: Damaged | StorageFailed, good: list[int]) -> Finding:
    if isinstance(problem, StorageFailed):
        return wrong(f"{problem}", "check the permissions and the disk; it need not be damaged")
    if checkpoint.parent.name == layout.BEST:
        remedy = "move it away; the best is then chosen among later evaluations"
    elif before := [step for step in good if step < int(checkpoint.name)]:
        remedy = f"nfnet train sets it aside and goes on from step {before[0]}"
    else:
        remedy = "restore a good one from a copy, or move all checkpoints away to begin anew"
    return wrong(f"{checkpoint} is damaged ({problem})", remedy)


def _check_identity(workdir: Path, recipe: "Recipe | None") -> list[Finding]:
    """Whether the records by which a run is recognized exist, and whether the recipe is the same as before."""
    from nfnet_flax.recipe import read_recipe, recipe_differences
    from nfnet_flax.training.record import has_trained

    has_begun = any(steps_in(workdir / kind) for kind in layout.CHECKPOINT_KINDS)
    findings = []
    for name in (layout.INPUT, layout.CLASSES):
        if has_begun and not (workdir / name).exists():
            findings.append(wrong(f"{workdir / name} is missing", "put it back, or start in a new workdir"))
    stored = workdir / layout.RECIPE
    if not stored.exists():
        remedy = "nfnet train with the run's own recipe writes it again"
        return [*findings, wrong(f"{stored} is missing", remedy) if has_begun else seen("no run has begun here")]
    try:
        own = read_recipe(stored)
    except CodeNotLoaded as error:  # this is no sign that anything is wrong with the run
        return [*findings, seen(str(error))]
    except ConfigError as error:  # its message says what to do
        return [*findings, Finding(text=str(error), is_wrong=True)]
    findings += _check_code(workdir, own)
    changed = [] if recipe is None else recipe_differences(own, recipe)
    if not has_trained(workdir):
        return findings + [
            seen(f"the last start, which trained nothing, had another recipe ({line})") for line in changed
        ]
    return findings + [wrong(f"the run has another recipe ({line})", "use the values of the run") for line in changed]


def _check_code(workdir: Path, recipe: "Recipe") -> list[Finding]:
    """Whether the user's own code that is loaded is the same as when the run began."""
    from nfnet_flax.training.kept_code import changed_files, code_of, describe
    from nfnet_flax.training.record import has_trained

    code, folder = code_of(recipe), workdir / layout.CODE
    changes = changed_files(workdir, code)
    if changes and has_trained(workdir):
        return [wrong(f"the run began with other code ({describe(changes)})", f"restore it; copies are in {folder}")]
    if changes:
        return [seen(f"the last start, which trained nothing, had other code ({describe(changes)})")]
    if code.files and folder.exists():
        return [seen(f"code: {', '.join(code.files)} as on record in {folder}")]
    return []


def _check_metrics(workdir: Path) -> list[Finding]:
    from nfnet_flax.training.metrics import read_metrics

    path, events = workdir / layout.METRICS, workdir / layout.TENSORBOARD
    findings = []
    if os.path.lexists(events) and not events.is_dir():
        findings.append(wrong(f"{events} is no folder", "move it away; TensorBoard's files are written there"))
    if not path.exists():
        return findings
    found = read_metrics(path)
    last = f", to step {found.rows[-1]['step']}" if found.rows else ""
    findings.append(seen(f"metrics: {len(found.rows)} rows{last}"))
    if found.damaged_lines:
        lines = ", ".join(map(str, found.damaged_lines[:_MAX_LINES]))
        lines += ", ..." if len(found.damaged_lines) > _MAX_LINES else ""
        remedy = f"nfnet train keeps it as it is in {workdir / layout.SET_ASIDE} and goes on with the good rows"
        findings.append(wrong(f"{path} is damaged (line {lines})", remedy))
    return findings


def _check_trackers(workdir: Path) -> list[Finding]:
    from nfnet_flax.telemetry.tracking import read_record

    try:
        found = read_record(workdir / layout.TRACKERS)
    except (ConfigError, StorageFailed) as error:  # its message says what to do
        return [Finding(text=str(error), is_wrong=True)]
    if not found:
        return []
    shown = [f"{key} to step {given.mark[0]}" if given.mark[0] > 0 else key for key, given in sorted(found.items())]
    return [seen(f"trackers: {', '.join(shown)}")]


def _check_logs(folder: Path) -> list[Finding]:
    """The logs of earlier starts; of a run in a bucket, there are none on this machine."""
    if os.path.lexists(folder) and not folder.is_dir():
        return [wrong(f"{folder} is no folder", "move it away; nfnet train writes what it prints there")]
    logs = sorted(folder.glob("*.log"))
    return [seen(f"logs: {len(logs)}, the newest is {logs[-1]}")] if logs else []


def _age(path: Path) -> str:
    seconds = time.time() - path.stat().st_mtime
    for length, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
