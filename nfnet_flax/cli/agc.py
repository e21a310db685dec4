"""`nfnet agc`."""

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from nfnet_flax import columns
from nfnet_flax.cli.ahead import Code, load_given_code
from nfnet_flax.cli.options import parsed
from nfnet_flax.config import ConfigError
from nfnet_flax.exit_codes import EXIT_DONE
from nfnet_flax.json_files import write_named
from nfnet_flax.paths import check_not_input, check_target
from nfnet_flax.storage import bucket_url

if TYPE_CHECKING:
    from nfnet_flax.recipe import Recipe
    from nfnet_flax.telemetry.layer_records import LayerRecords


@dataclasses.dataclass(frozen=True)
class AgcOptions:
    """What adaptive gradient clipping did in each parameter of a run: share of clipped units, and ratio of gradient to
    parameters. Prints a table; --out draws layers x steps. The folder of the run is only read."""

    workdir: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RUN")]]
    """Folder of a run that clips by AGC: a path, or the URL of a bucket. It may be training."""
    out: Annotated[str | None, tyro.conf.arg(metavar="FILE.png|FILE.svg")] = None
    """File for the picture (extra `plots`)."""
    format: Literal["text", "json"] = "text"
    """Form of what is printed."""
    overwrite: bool = False
    """Replace an existing file."""
    code: Code = ()


def run(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    options = parsed(AgcOptions, argv, "nfnet agc")
    from nfnet_flax.plots import picture_kind
    from nfnet_flax.telemetry.layer_picture import layers_picture

    target = None
    if options.out is not None:
        kind = picture_kind("out", options.out)
        target = check_target("out", options.out, overwrite=options.overwrite)
        if bucket_url("workdir", options.workdir) is None:
            check_not_input("out", target, options.workdir)
    load_given_code(argv)
    recipe, ratio, records = _read(options.workdir)
    _print(records, ratio, options.format)
    if target is not None:
        title = f"{columns.one_line(recipe.name)}: adaptive gradient clipping"
        write_named("out", target, layers_picture(records, title=title, clipping=ratio, kind=kind))
        if options.format == "text":
            print(f"picture: {target}")
    return EXIT_DONE


def _read(workdir: str) -> "tuple[Recipe, float, LayerRecords]":
    """Recipe, lambda and records of a run.

    Raises:
      ConfigError: it is no run, does not clip by AGC, or has nothing on record.
    """
    from nfnet_flax.optim import AGC
    from nfnet_flax.telemetry.layer_records import read_layers
    from nfnet_flax.training import layout
    from nfnet_flax.training.reading import Run

    run = Run(workdir)
    clipping = run.recipe.optim.clipping
    if not isinstance(clipping, AGC):
        kind = "none" if clipping is None else type(clipping).__name__
        raise ConfigError(
            f"workdir = {workdir!r}: the run does not clip by AGC (optim.clipping is {kind}), so there is nothing to "
            "show: give another run"
        )
    records = read_layers(run.workdir / layout.AGC)
    if not len(records.steps):
        raise ConfigError(
            f"workdir = {workdir!r}: no clipping is on record in {layout.AGC}: the run has just begun, or had fewer "
            f"steps than log_every_steps = {run.recipe.log_every_steps}, or an earlier version trained it"
        )
    return run.recipe, clipping.ratio, records


def _print(records: "LayerRecords", ratio: float, form: Literal["text", "json"]) -> None:
    rows = records.rows()
    if form == "json":
        layers = [dataclasses.asdict(row) for row in rows]
        print(json.dumps({"lambda": ratio, "steps": records.steps.tolist(), "layers": layers}, indent=1))
        return
    width = max([len("parameter"), *(columns.width_of(columns.one_line(row.name)) for row in rows)])
    print(f"{len(records.steps):,} steps, {records.steps[0]:,} to {records.steps[-1]:,}; lambda {ratio:g}")
    print(f"{columns.left('parameter', width)}  clipped, mean  ratio, median  ratio, largest")
    for row in rows:
        name = columns.left(columns.one_line(row.name), width)
        print(f"{name}  {row.mean_fraction:>13.1%}  {row.median_ratio:>13.3g}  {row.largest_ratio:>14.3g}")
