"""`nfnet report`."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from nfnet_flax.cli.ahead import Code, load_given_code
from nfnet_flax.cli.options import FILE, parsed
from nfnet_flax.config import ConfigError, require
from nfnet_flax.exit_codes import EXIT_DONE
from nfnet_flax.json_files import write_named
from nfnet_flax.paths import check_not_input, check_target
from nfnet_flax.storage import bucket_url

if TYPE_CHECKING:
    from nfnet_flax.report.facts import RunFacts
    from nfnet_flax.report.recipe_changes import Fields

Format = Literal["text", "html", "json"]
_ENDS: dict[str, Format] = {".html": "html", ".htm": "html", ".json": "json", ".txt": "text"}
"""End of the name of a file -> its format."""


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """What runs did with their time, and how they went: goodput, what each interruption cost, curves, accuracy, recipe,
    environment. Prints it as text; --out writes a page. The folders of the runs are only read, and the runs may be
    training."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN ...")]
    """Folders of runs: paths, or URLs of buckets. Several are shown side by side."""
    out: Annotated[str | None, FILE] = None
    """File for the report, such as report.html: one page that needs no other file."""
    format: Annotated[Format | None, tyro.conf.arg(metavar="{text,html,json}")] = None
    """Form of the report in the file, and of what is printed if there is none. Without this option, the end of the name
    of the file says it, and text is printed."""
    base: Annotated[str | None, tyro.conf.arg(metavar="RECIPE.py")] = None
    """Recipe file, with its arguments, with which the recipes of the runs are compared. It is executed. Without this
    option they are compared with the defaults of the classes of the recipe."""
    overwrite: bool = False
    """Replace an existing file."""
    code: Code = ()


def run(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    options = parsed(ReportOptions, argv, "nfnet report")
    require(bool(options.runs), "runs", options.runs, "give the folder of a run, which nfnet train --workdir DIR made")
    target = None if options.out is None else check_target("out", options.out, overwrite=options.overwrite)
    form = _form(options)
    for given in options.runs:
        if target is not None and bucket_url("runs", given) is None:
            check_not_input("out", target, given)
    load_given_code(argv)
    from nfnet_flax.report.facts import read_facts, with_labels
    from nfnet_flax.report.recipe_changes import fields_of

    base = None
    if options.base is not None:
        from nfnet_flax.recipe_file import load_recipe

        base = (options.base, fields_of(load_recipe(options.base)))
    runs = with_labels([read_facts(given, field="runs") for given in options.runs])
    if target is not None:
        write_named("out", target, _made(runs, base, form).encode(errors="backslashreplace"))
        form = "text"
    print(_made(runs, base, form), end="")
    if target is not None:
        print(f"report: {target}")
    return EXIT_DONE


def _form(options: ReportOptions) -> Format:
    if options.format is not None or options.out is None:
        return options.format or "text"
    end = Path(options.out).suffix.lower()
    if end not in _ENDS:
        raise ConfigError(f"out = {options.out!r}: give a name that ends in {', '.join(_ENDS)}, or --format")
    return _ENDS[end]


def _made(runs: "list[RunFacts]", base: "tuple[str, Fields] | None", form: Format) -> str:
    from nfnet_flax.report.json_form import report_json
    from nfnet_flax.report.page import report_page
    from nfnet_flax.report.text import report_text

    return {"text": report_text, "html": report_page, "json": report_json}[form](runs, base)
