"""A report as JSON, for programs."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from nfnet_flax.report.facts import RunFacts
from nfnet_flax.report.recipe_changes import Fields, defaults_of, differences_between, fields_of
from nfnet_flax.telemetry.goodput import Account, Interruption


def report_json(runs: Sequence[RunFacts], base: tuple[str, Fields] | None) -> str:
    """A list with an object for each run; arguments as for `page.report_page`. What is not on record is null."""
    return json.dumps([_run(run, base) for run in runs], indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _run(run: RunFacts, base: tuple[str, Fields] | None) -> dict[str, Any]:
    changes = None
    if run.recipe is not None:
        name, fields = base or ("defaults", defaults_of(run.recipe))
        rows = differences_between([fields, fields_of(run.recipe)])
        changes = {"base": name, "fields": {row.field: list(row.values) for row in rows}}
    newest: dict[str, float | None] = {}
    for row in run.rows:
        newest |= {name: value for name, value in row.items() if name != "step"}
    published = None
    if run.published is not None:
        name, found = run.published
        published = {"model": name, "top1_percent": found.top1_percent, "top5_percent": found.top5_percent}
        published["source"] = found.source
    layers = None if run.layers is None else [dataclasses.asdict(row) for row in run.layers.rows()]
    return {
        "name": run.name,
        "place": run.place,
        "status": run.status,
        "step": run.last_step,
        "num_steps": run.num_steps,
        "time": None if run.account is None else _time(run.account),
        "newest_metrics": newest,
        "num_corrupt": run.num_corrupt,
        "published": published,
        "recipe_differences": changes,
        "environments": [{"until_step": one.until_step, "facts": one.facts} for one in run.environments],
        "clipping": layers,
        "notes": [{"about": topic, "text": text} for topic, text in run.notes],
    }


def _time(account: Account) -> dict[str, Any]:
    return {
        "goodput": account.goodput,
        "wall_s": _rounded(account.wall_s),
        "seconds": {part: _rounded(seconds) for part, seconds in account.seconds.items()},
        "not_running_s": {cause: _rounded(seconds) for cause, seconds in account.not_running_s.items()},
        "finished_s": _rounded(account.finished_s),
        "num_needless": account.num_needless,
        "num_productive": account.num_productive,
        "num_repeated": account.num_repeated,
        "set_back_s": _rounded(account.set_back_s),
        "sessions": [
            {
                "began_at_s": one.session.began_at_s,
                "ended_at_s": one.session.last_at_s,
                "ending": one.ending,
                "reason": one.session.reason,
                "from_step": one.session.from_step,
                "last_step": one.session.last_step,
                "seconds": {part: _rounded(seconds) for part, seconds in one.seconds.items()},
                "cost": None if one.interruption is None else _cost(one.interruption),
            }
            for one in account.sessions
        ],
    }


def _cost(interruption: Interruption) -> dict[str, Any]:
    found = dataclasses.asdict(interruption) | {"total_s": interruption.total_s}
    return {name: _rounded(value) if name.endswith("_s") else value for name, value in found.items()}


def _rounded(seconds: float) -> float:
    return round(seconds, 3)
