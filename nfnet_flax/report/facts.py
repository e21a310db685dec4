"""Everything that a report shows of one run, read from its folder. Nothing there is changed, the run may be training
meanwhile, and what is missing or damaged is named instead of being an error."""

import dataclasses
import functools
import json
import math
import os
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from nfnet_flax.config import ConfigError
from nfnet_flax.json_files import read_json
from nfnet_flax.messages import as_given
from nfnet_flax.models.registry import PUBLISHED, Published, name_of
from nfnet_flax.paths import is_missing
from nfnet_flax.recipe import Recipe, read_recipe
from nfnet_flax.telemetry.goodput import Account, account_of
from nfnet_flax.telemetry.layer_records import LayerRecords, read_layers
from nfnet_flax.telemetry.sessions import History, read_history
from nfnet_flax.training import layout
from nfnet_flax.training.lease import ELSEWHERE_TIMEOUT_S, owner_of
from nfnet_flax.training.metrics import MetricsFile, Row, read_metrics
from nfnet_flax.training.record import stored_input
from nfnet_flax.training.run_folder import RunFolder, place_of, reading
from nfnet_flax.training.storage import StorageFailed

T = TypeVar("T")
Topic = Literal["recipe", "metrics", "time", "environment", "clipping"]
_REMEDY = "the report goes on without it"
_ENVIRONMENT_UNTIL = re.compile(r"environment-until-step-([0-9]+)\.json")
_NUM_CLASSES_PUBLISHED = 1000
_MAX_AGE_S = 5 * ELSEWHERE_TIMEOUT_S
"""Age of the last sign of life, in seconds, after which a process on another host is taken to have ended."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Environment:
    """What the last bits of some steps depend on."""

    until_step: int | None
    """Last step that was computed in it; None: it is the newest one."""
    facts: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What is known about one run."""

    place: str
    """Its folder, as a path or URL."""
    label: str
    """Short name that no other run of the report has."""
    recipe: Recipe | None
    name: str
    """Name of the run in its recipe; if that cannot be read, of its folder."""
    num_steps: int | None
    """Number of updates of the whole run; None: not known."""
    rows: tuple[Row, ...]
    """Its metrics, as `read_metrics` gives them."""
    history: History
    account: Account | None
    """On what its time was spent; None: that is not on record."""
    environments: tuple[Environment, ...]
    """In the order of their steps."""
    layers: LayerRecords | None
    """What clipping did in each layer; None: that is not on record."""
    published: tuple[str, Published] | None
    """Name of the network and what a paper reports for it; None: nothing is on record for this network and number of
    classes."""
    owner: str | None
    """The process that trains in the folder now; None: there is none."""
    checkpoints: tuple[int, ...]
    """Steps of the checkpoints, newest first."""
    notes: tuple[tuple[Topic, str], ...]
    """What is missing or damaged."""

    @property
    def is_training(self) -> bool:
        """Whether a process trains in the folder now."""
        return self.owner is not None

    @property
    def last_step(self) -> int:
        """Last step that is on record anywhere; 0: none."""
        found = [row["step"] for row in self.rows[-1:]] + list(self.checkpoints[:1])
        if self.account is not None:
            found += [self.account.sessions[-1].session.last_step]
        return max(found, default=0)

    @property
    def num_corrupt(self) -> int:
        """Number of damaged images that were replaced in training; an image counts in each epoch."""
        return round(sum(value or 0.0 for value in self.column("data/num_corrupt")[1]))

    @property
    def status(self) -> str:
        """How far it is, in one phrase."""
        done = f"step {self.last_step:,}" + ("" if self.num_steps is None else f" of {self.num_steps:,}")
        if self.owner is not None:
            return f"training, {done}; {self.owner}"
        if self.account is not None:
            last = self.account.sessions[-1].session
            how = "killed (no end is on record)" if last.ending is None else last.ending
            return f"{how}, {done}" + ("" if last.reason is None else f"; {last.reason}")
        return f"{'at its last step' if self.last_step == self.num_steps else 'not at its end'}, {done}"

    def note(self, topic: Topic) -> str | None:
        """What is missing or damaged of a topic, as one text; None: nothing."""
        found = [text for about, text in self.notes if about == topic]
        return "; ".join(found) or None

    def column(self, name: str) -> tuple[list[int], list[float | None]]:
        """Steps that have a metric, and its values; None where it was not finite."""
        found = [(row["step"], row[name]) for row in self.rows if name in row]
        return [step for step, _ in found], [value for _, value in found]


class _Notes:
    """Collects what is missing or damaged."""

    def __init__(self) -> None:
        self.found: list[tuple[Topic, str]] = []

    def add(self, topic: Topic, text: str) -> None:
        self.found.append((topic, as_given(text)))

    def attempt(self, topic: Topic, read: Callable[[], T]) -> T | None:
        """The result of a function that reads; None, and a note, if that fails."""
        try:
            return read()
        except (ConfigError, StorageFailed) as error:
            self.add(topic, str(error))
            return None


def read_facts(run: str | os.PathLike[str], *, field: str = "run") -> RunFacts:
    """Reads what is known about a run.

    Args:
      run: its folder: a path, or a URL such as `gs://BUCKET/FOLDER`, of which a copy is made on this machine.
      field: name of the value in messages.

    Raises:
      ConfigError: it is not the folder of a run.
      StorageFailed: the bucket of a run cannot be read.
    """
    folder = reading(field, run)
    workdir = folder.path
    if all(is_missing(workdir / name) for name in (layout.RECIPE, layout.METRICS, layout.EVENTS)):
        layout.check_run(field, run, workdir)
    notes = _Notes()
    recipe = notes.attempt("recipe", lambda: read_recipe(workdir / layout.RECIPE))
    metrics = _read_metrics(workdir, notes)
    history = notes.attempt("time", lambda: read_history(workdir / layout.EVENTS)) or History(sessions=())
    account = _account(history, notes)
    name = recipe.name if recipe is not None else _stored_name(workdir) or workdir.name
    return RunFacts(
        place=str(place_of(field, run)),
        label=name,
        recipe=recipe,
        name=name,
        num_steps=_num_steps(workdir, recipe, account),
        rows=tuple(metrics.rows),
        history=history,
        account=account,
        environments=_environments(workdir, notes),
        layers=_read_layers(workdir, recipe, notes),
        published=_published(recipe),
        owner=_owner(folder),
        checkpoints=tuple(notes.attempt("metrics", lambda: layout.steps_in(workdir / layout.CHECKPOINTS)) or ()),
        notes=tuple(notes.found),
    )


def _read_metrics(workdir: Path, notes: _Notes) -> MetricsFile:
    found = notes.attempt("metrics", lambda: read_metrics(workdir / layout.METRICS))
    if found is None:
        return MetricsFile(rows=[], damaged_lines=[])
    if not found.rows:
        notes.add("metrics", f"no metrics are on record yet ({layout.METRICS})")
    if found.damaged_lines:
        notes.add("metrics", f"{layout.METRICS} is damaged: {_lines(found.damaged_lines)} cannot be read")
    return found


def _account(history: History, notes: _Notes) -> Account | None:
    """The account of a history, and what has to be said about it."""
    if history.unread_lines:
        notes.add("time", f"{layout.EVENTS}: {_lines(history.unread_lines)} cannot be read; a kill cuts a line short")
    if history.num_late:
        notes.add("time", f"{history.num_late} lines of processes that did not own the run any more are left out")
    if not history.sessions:
        if not any(topic == "time" for topic, _ in notes.found):
            notes.add("time", f"not recorded: the run has no {layout.EVENTS}, which older versions did not write")
        return None
    first_step = next((one.from_step for one in history.sessions if one.from_step is not None), 0)
    if first_step:
        notes.add("time", f"recorded from step {first_step:,} on; older versions did not record it")
    found = account_of(history)
    if found.set_back_s > 1:
        notes.add(
            "time", f"clocks went back by {found.set_back_s:.0f} s in all, or differ between hosts: that is not counted"
        )
    return found


def _read_layers(workdir: Path, recipe: Recipe | None, notes: _Notes) -> LayerRecords | None:
    found = notes.attempt("clipping", lambda: read_layers(workdir / layout.AGC))
    if found is not None and found.unread_lines:
        notes.add("clipping", f"{layout.AGC}: {_lines(found.unread_lines)} cannot be read; a kill cuts a line short")
    if found is None or len(found.steps) == 0:
        clipping = None if recipe is None else type(recipe.optim.clipping).__name__
        if found is not None and clipping in (None, "AGC"):
            notes.add("clipping", f"not recorded: there is no {layout.AGC}, or nothing in it yet")
        return None
    return found


def _environments(workdir: Path, notes: _Notes) -> tuple[Environment, ...]:
    found = []
    for path in sorted(workdir.glob("environment*.json")):
        until = _ENVIRONMENT_UNTIL.fullmatch(path.name)
        if until is None and path.name != layout.ENVIRONMENT:
            continue
        data = notes.attempt("environment", functools.partial(read_json, path, _REMEDY))
        if data is not None:
            facts = {name: value for name, value in data.items() if isinstance(value, str)}
            found.append(Environment(until_step=None if until is None else int(until[1]), facts=facts))
    if not found and not any(topic == "environment" for topic, _ in notes.found):
        notes.add("environment", f"not recorded: there is no {layout.ENVIRONMENT}")
    return tuple(sorted(found, key=lambda one: float("inf") if one.until_step is None else one.until_step))


def _stored_name(workdir: Path) -> str | None:
    """Name of a run whose recipe cannot be made, as it names classes that are not loaded."""
    try:
        name = json.loads((workdir / layout.RECIPE).read_bytes().decode()).get("name")
    except (OSError, ValueError, RecursionError, AttributeError):
        return None
    return name if isinstance(name, str) else None


def _num_steps(workdir: Path, recipe: Recipe | None, account: Account | None) -> int | None:
    if account is not None and (start := account.sessions[-1].session.start) is not None:
        return start.num_steps
    if recipe is None:
        return None
    if recipe.num_steps is not None:
        return recipe.num_steps
    try:
        num_examples: Any = stored_input(workdir)["source"].get("num_examples")
        return recipe.total_steps(num_examples) if type(num_examples) is int else None
    except (ConfigError, StorageFailed):
        return None


def _published(recipe: Recipe | None) -> tuple[str, Published] | None:
    if recipe is None or recipe.num_classes != _NUM_CLASSES_PUBLISHED:
        return None
    name = name_of(recipe.model)
    return None if name is None or name not in PUBLISHED else (name, PUBLISHED[name])


def _owner(folder: RunFolder) -> str | None:
    try:
        found = owner_of(folder.owner_folder)
    except (StorageFailed, OSError):  # it is not known, which says nothing about the run
        return None
    if found is None:
        return None
    owner, alive_at = found
    # Whether a process on another host has ended is only known after a while, for which a report does not wait.
    if not owner.is_of_this_host() and _age_s(alive_at) > _MAX_AGE_S:
        return None
    return f"process {owner.pid} on host {owner.host}, last sign of life {alive_at}"


def _age_s(alive_at: str) -> float:
    """Seconds since a time that the lease has recorded, by the clock of this machine; infinite if it is no time."""
    try:
        return time.time() - datetime.strptime(alive_at, "%Y-%m-%d %H:%M:%S UTC").replace(tzinfo=UTC).timestamp()
    except ValueError:
        return math.inf


def _lines(numbers: list[int] | tuple[int, ...]) -> str:
    return f"line {numbers[0]}" if len(numbers) == 1 else f"{len(numbers)} lines, the first of them {numbers[0]},"


def with_labels(runs: list[RunFacts]) -> list[RunFacts]:
    """The runs with different labels: their names; where these are equal, as much of the folders as tells them apart;
    and numbers if the folders are equal, too."""
    names = [run.name for run in runs]
    labels = [
        name if names.count(name) == 1 else _end_of_place(run, runs) for name, run in zip(names, runs, strict=True)
    ]
    return [
        dataclasses.replace(run, label=label if labels.count(label) == 1 else f"{label} [{index}]")
        for index, (run, label) in enumerate(zip(runs, labels, strict=True), start=1)
    ]


def _end_of_place(run: RunFacts, runs: list[RunFacts]) -> str:
    """The shortest end of the folder of a run that no other run of the same name has."""
    parts = PurePosixPath(run.place).parts
    others = [PurePosixPath(other.place).parts for other in runs if other.name == run.name and other.place != run.place]
    lengths = range(1, len(parts))
    length = next((count for count in lengths if all(other[-count:] != parts[-count:] for other in others)), len(parts))
    return "/".join(parts[-length:])
