"""The tables of a report, as plain text in cells; `text.py` and `page.py` show the same ones."""

import dataclasses
import itertools
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime

from nfnet_flax.report.facts import RunFacts, Topic
from nfnet_flax.report.recipe_changes import Fields, defaults_of, differences_between, fields_of
from nfnet_flax.telemetry.goodput import CAUSES, Account, Part, SessionAccount
from nfnet_flax.units import long_duration, metric_text

PART_TEXTS: dict[Part, str] = {
    "productive": "productive steps",
    "repeated": "repeated steps",
    "start": "start",
    "restore": "restoring",
    "compile": "compiling",
    "input": "waiting for data",
    "save": "saving",
    "evaluation": "evaluation",
    "end": "ending",
    "unrecorded": "not recorded",
    "not_running": "not running",
}
"""Part of the wall time -> its name in a report."""
_MAX_SESSIONS = 100
"""Number of sessions that are listed one by one, the newest."""
_MAX_LAYERS = 10
"""Number of layers that are listed, the most clipped ones."""
_CHANCE_FACTOR = 1.5
"""A top-1 accuracy below so many times that of guessing is said to be little better than guessing."""
_NOTHING = "-"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """One table."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    """Sentences about it."""
    num_text: int = 1
    """Number of columns, from the left, that hold text; the others hold numbers, which are aligned at the right."""


def summary(runs: Sequence[RunFacts]) -> Table:
    """How each run went, a column for each."""
    rows: dict[str, list[str]] = {}
    for run in runs:
        for name, value in _summary_of(run).items():
            rows.setdefault(name, []).append(value)
    # What is not known of any run would only take room.
    kept = [(name, *values) for name, values in rows.items() if set(values) != {_NOTHING}]
    headings = ("", *(run.label for run in runs))
    return Table(title="Summary", headings=headings, rows=tuple(kept), num_text=len(headings))


def _summary_of(run: RunFacts) -> dict[str, str]:
    account = run.account
    start = None
    if account is not None:
        start = next((one.session.start for one in reversed(account.sessions) if one.session.start is not None), None)
    rates = [value for value in run.column("throughput/images_per_s")[1] if value is not None]
    devices = _NOTHING
    if start is not None:
        devices = f"{start.num_devices} x {start.device_kind}, processes: {start.num_processes}"
    return {
        "state": run.status,
        "folder": run.place,
        "seed": _NOTHING if run.recipe is None else str(run.recipe.seed),
        "goodput": _NOTHING if account is None else f"{account.goodput:.1%}",
        "wall time": _NOTHING if account is None else long_duration(account.wall_s),
        "sessions": _NOTHING if account is None else f"{len(account.sessions)}{_interrupted(account)}",
        "repeated steps": _NOTHING if account is None else f"{account.num_repeated:,}",
        "images/s, median": f"{statistics.median(rates):,.1f}" if rates else _NOTHING,
        "devices": devices,
        "training loss, first to last": _first_to_last(run, "train/loss"),
        "best held-out top-1, EMA": _best(run, "eval_ema/top1"),
        "best held-out top-1, raw": _best(run, "eval/top1"),
        "damaged images replaced": f"{run.num_corrupt:,}, anew in each epoch" if run.num_corrupt else _NOTHING,
        "published top-1": "none on record" if run.published is None else f"{run.published[1].top1_percent:.1f}%",
    }


def _interrupted(account: Account) -> str:
    number = len(account.interruptions)
    lost_s = sum(one.total_s for one in account.interruptions)
    return f", {number} interrupted, which cost {long_duration(lost_s)}" if number else ""


def _first_to_last(run: RunFacts, name: str) -> str:
    found = [(step, value) for step, value in zip(*run.column(name), strict=True) if value is not None]
    return " to ".join(f"{value:.4g} at step {step:,}" for step, value in [found[0], found[-1]]) if found else _NOTHING


def _best(run: RunFacts, name: str) -> str:
    steps, values = run.column(name)
    found = [(value, step) for step, value in zip(steps, values, strict=True) if value is not None]
    if not found:
        return _NOTHING
    value, step = max(found, key=lambda pair: (pair[0], -pair[1]))
    return f"{value:.2%} at step {step:,}"


def breakdown(runs: Sequence[RunFacts]) -> Table:
    """On what the wall time of each run was spent: two columns for each."""
    known = [run for run in runs if run.account is not None]
    headings = [""]
    for run in known:
        headings += ["time" if len(runs) == 1 else run.label, "share"]
    parts = [part for part in PART_TEXTS if any(run.account and run.account.seconds[part] > 0 for run in known)]
    rows = []
    for part in parts:
        cells = [PART_TEXTS[part]]
        for run in known:
            assert run.account is not None
            seconds = run.account.seconds[part]
            cells += [long_duration(seconds), f"{seconds / max(run.account.wall_s, 1e-9):.1%}"]
        rows.append(tuple(cells))
    total = ["wall time"]
    for run in known:
        assert run.account is not None
        total += [long_duration(run.account.wall_s), "100.0%"]
    notes = [line for run in known for line in _time_notes(run, with_label=len(runs) > 1)]
    rows += [tuple(total)] if known else []
    return Table(title="Where the time went", headings=tuple(headings), rows=tuple(rows), notes=tuple(notes))


def _time_notes(run: RunFacts, *, with_label: bool) -> list[str]:
    assert run.account is not None
    account, about = run.account, f"{run.label}: " if with_label else ""
    lines = [f"{about}{account.num_productive:,} steps count, {account.num_repeated:,} were lost and repeated"]
    causes = [f"{long_duration(account.not_running_s[cause])} after it was {cause}" for cause in CAUSES]
    shown = [text for cause, text in zip(CAUSES, causes, strict=True) if account.not_running_s[cause] > 0]
    lines += [f"{about}not running: {', '.join(shown)}"] if shown else []
    if account.finished_s > 0:
        finished = long_duration(account.finished_s)
        lines.append(f"{about}{finished} in which it was finished, before it was made longer, do not count")
    if account.num_needless:
        lines.append(f"{about}starts that found it finished, which do not count: {account.num_needless}")
    return lines


def sessions(run: RunFacts) -> Table | None:
    """The sessions of a run and what each end cost; None: they are not on record."""
    if run.account is None:
        return None
    numbered = list(enumerate(run.account.sessions, start=1))
    shown = numbered[-_MAX_SESSIONS:]
    notes = [f"the first {len(numbered) - len(shown)} sessions are left out"] if len(shown) < len(numbered) else []
    if run.account.interruptions:
        notes.append(
            "what an end cost: the time until the next session began, its start, restoring and compiling, and the "
            "steps that were lost; input and evaluations of lost steps are not included"
        )
    headings = ("", "began (UTC)", "ended", "from", "to", "lasted")
    costs = ("not running", "start", "restoring", "compiling", "repeated", "cost")
    return Table(
        title="Sessions, and what each interruption cost",
        headings=(*headings, *costs),
        rows=tuple((str(number), *_session_row(run, one)) for number, one in shown),
        notes=tuple(notes),
        num_text=3,
    )


def _session_row(run: RunFacts, one: SessionAccount) -> tuple[str, ...]:
    session = one.session
    began = datetime.fromtimestamp(session.began_at_s, UTC).strftime("%Y-%m-%d %H:%M:%S")
    ending: str = one.ending or ("running" if run.is_training else "killed")
    if session.reason is not None:
        ending += f": {session.reason}"
    cells = (
        began,
        ending,
        _NOTHING if session.from_step is None else f"{session.from_step:,}",
        _NOTHING if session.from_step is None else f"{session.last_step:,}",
        long_duration(sum(one.seconds.values())),
    )
    cost = one.interruption
    if cost is None:
        return (*cells, *[_NOTHING] * 6)
    parts = (cost.not_running_s, cost.start_s, cost.restore_s, cost.compile_s)
    repeated = f"{cost.num_repeated:,} in {long_duration(cost.repeated_s)}"
    return (*cells, *map(long_duration, parts), repeated, long_duration(cost.total_s))


def accuracy(run: RunFacts) -> Table | None:
    """The newest evaluation, raw and EMA, and what a paper reports; None: there was no evaluation."""
    rows = [row for row in run.rows if any(name.startswith("eval") for name in row)]
    if not rows:
        return None
    newest = rows[-1]
    found = dict.fromkeys(name.partition("/")[2] for name in newest if name.startswith("eval"))
    names = [name for name in found if not name.startswith("num_")]
    cells = [("", *(metric_text(name, 0.0)[0] for name in names))]
    for prefix, label in (("eval", "raw"), ("eval_ema", "EMA")):
        values = [newest.get(f"{prefix}/{name}") for name in names]
        shown = [
            _NOTHING if value is None else metric_text(name, value)[1]
            for name, value in zip(names, values, strict=True)
        ]
        cells.append((f"{label}, step {newest['step']:,}", *shown))
    notes = []
    top1, num_classes = newest.get("eval_ema/top1", newest.get("eval/top1")), run.recipe and run.recipe.num_classes
    if top1 is not None and num_classes and top1 <= _CHANCE_FACTOR / num_classes:
        notes.append(f"not much better than guessing one of {num_classes:,} classes ({1 / num_classes:.1%})")
    if run.published is not None:
        name, published = run.published
        percent = {"top1": published.top1_percent, "top5": published.top5_percent}
        texts = [f"{value:.1f}%" if (value := percent.get(metric)) is not None else _NOTHING for metric in names]
        cells.append((f"published for {name}", *texts))
        notes.append(f"published: {published.source}; ImageNet with 1000 classes at the test size of the paper")
    else:
        notes.append("no published accuracy is on record for this network with this number of classes")
    return Table(title="Held-out accuracy", headings=cells[0], rows=tuple(cells[1:]), notes=tuple(notes))


def environment(run: RunFacts) -> Table | None:
    """The newest environment of a run, and in what it changed; None: it is not on record."""
    if not run.environments:
        return None
    newest = run.environments[-1]
    notes = []
    for before, after in itertools.pairwise(run.environments):
        changed = differences_between([before.facts, after.facts])
        lines = [f"{one.field}: {one.values[0]} -> {one.values[1]}" for one in changed]
        notes.append(f"changed after step {before.until_step:,}: {'; '.join(lines)}")
    rows = tuple((name, value or _NOTHING) for name, value in newest.facts.items())
    return Table(title="Environment", headings=("", "value"), rows=rows, notes=tuple(notes), num_text=2)


def recipe_changes(run: RunFacts, base: tuple[str, Fields] | None) -> Table | None:
    """In what a recipe differs from its base.

    Args:
      run: the run.
      base: name and fields of the recipe to compare with; None: the defaults.

    Returns:
      None: the recipe cannot be read.
    """
    if run.recipe is None:
        return None
    name, fields = base or ("default", defaults_of(run.recipe))
    note = (
        "the folder does not tell from which recipe file it is made, so it is compared with the defaults of its classes"
    )
    notes = () if base is not None else (f"{note}; --base RECIPE.py compares it with a recipe file",)
    rows = [(one.field, *one.values) for one in differences_between([fields, fields_of(run.recipe)])]
    return Table(title="Recipe", headings=("field", name, "run"), rows=tuple(rows), notes=notes, num_text=3)


def recipes_compared(runs: Sequence[RunFacts]) -> Table | None:
    """In what the recipes of several runs differ from one another; None: there are not several that can be read."""
    known = [(run, run.recipe) for run in runs if run.recipe is not None]
    if len(known) < 2:
        return None
    rows = [(one.field, *one.values) for one in differences_between([fields_of(recipe) for _, recipe in known])]
    headings = ("field", *(run.label for run, _ in known))
    notes = () if rows else ("they are the same",)
    title = "Fields in which the recipes differ"
    return Table(title=title, headings=headings, rows=tuple(rows), notes=notes, num_text=len(headings))


def clipping(run: RunFacts) -> Table | None:
    """The layers of which most units were clipped; None: that is not on record."""
    if run.layers is None:
        return None
    rows = sorted(run.layers.rows(), key=lambda row: -row.mean_fraction)
    steps = run.layers.steps
    about = f"{len(steps):,} steps on record, {steps[0]:,} to {steps[-1]:,}"
    shares = [value for value in run.column("agc/clipped_fraction")[1] if value is not None]
    notes = [
        f"{about}; of the units of all parameters, {statistics.fmean(shares):.1%} were clipped" if shares else about
    ]
    if len(rows) > _MAX_LAYERS:
        notes.append(f"the {_MAX_LAYERS} parameters that were clipped most; nfnet agc shows all")
    cells = (
        (row.name, f"{row.mean_fraction:.1%}", f"{row.median_ratio:.3g}", f"{row.largest_ratio:.3g}")
        for row in rows[:_MAX_LAYERS]
    )
    headings = ("parameter", "clipped, mean", "ratio, median", "ratio, largest")
    return Table(title="Adaptive gradient clipping", headings=headings, rows=tuple(cells), notes=tuple(notes))


def tables_of(run: RunFacts, base: tuple[str, Fields] | None) -> list[tuple[Topic, Table | None]]:
    """All tables about a single run, with what they are about; None where nothing is on record."""
    return [
        ("time", sessions(run)),
        ("metrics", accuracy(run)),
        ("recipe", recipe_changes(run, base)),
        ("clipping", clipping(run)),
        ("environment", environment(run)),
    ]
