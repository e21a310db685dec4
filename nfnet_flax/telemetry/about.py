"""What TensorBoard shows about a run from its start: its settings, its parameters, and how its charts are laid out."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import jax

from nfnet_flax.config_json import to_json
from nfnet_flax.telemetry.flat_recipe import Scalar, flat
from nfnet_flax.telemetry.overview import Chart
from nfnet_flax.units import printable

_NO_HPARAMS = re.compile(
    r"(checkpoint|telemetry)(\..+)?|platform|(log|eval)_every_steps|tensorboard"
    r"|data\.(eval_batch_size|num_threads|num_workers|prefetch_batches|stall_timeout_s)|execution\.(fsdp|spatial)"
    r"|data|optim|execution|.+\.[0-9]+"
)
"""Fields of a recipe that do not change what is learned, and names of parts whose class is always the same."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class About:
    """What is written once, and replaced at each start, as some of the settings may change."""

    texts: Mapping[str, str]
    """Tag -> text in Markdown."""
    hparams: Mapping[str, Scalar]
    """Name -> value, for the tab `HParams`, where each of the `COMPARED_RUNS` is a row."""
    charts: Mapping[str, tuple[Chart, ...]]
    """Charts by category, for the tab `Custom Scalars`."""


def hparams_of(recipe: Any) -> dict[str, Scalar]:
    """The fields of a recipe that decide what is learned, by name, with values that TensorBoard can compare: numbers,
    truth values and texts."""
    return {
        name: "none" if value in (None, "") else printable(value) if isinstance(value, str) else value
        for name, value in flat(recipe).items()
        if not _NO_HPARAMS.fullmatch(name)
    }


def recipe_text(recipe: Any) -> str:
    """A recipe as it is stored, in Markdown."""
    return _as_code(json.dumps(to_json(recipe), indent=1))


@dataclasses.dataclass(frozen=True)
class _Parameter:
    """A row of the table of parameters; the names of the fields are its headings."""

    name: str
    shape: str
    type: str
    size: int


def parameters_text(groups: str, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> str:
    """How the parameters are updated, and a table of all of them with their sizes, in Markdown.

    Args:
      groups: the result of `groups_table`.
      shapes: shape and type of each parameter, by name.
    """
    from clu.parameter_overview import make_table

    rows = [_Parameter(name, str(each.shape), each.dtype.name, math.prod(each.shape)) for name, each in shapes.items()]
    total = f"{len(rows)} arrays, {sum(row.size for row in rows):,} parameters"
    return f"{_as_code(groups)}\n\n{_as_code(make_table(rows))}\n\n{total}"


def _as_code(text: str) -> str:
    return f"```\n{text}\n```"
