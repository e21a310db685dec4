"""Writes docs/recipe_reference.md, a list of all fields of a recipe, from the dataclasses that define them.

python tools/make_recipe_reference.py [FILE]
"""

import ast
import dataclasses
import inspect
import itertools
import re
import sys
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from nfnet_flax.config import field_hints, members_of, text_of
from nfnet_flax.open_config import is_own, kinds_of
from nfnet_flax.optim import ParamGroup
from nfnet_flax.recipe import Recipe

PAGE = Path(__file__).parent.parent / "docs" / "recipe_reference.md"
_BEGINNING = """# Every field of a recipe

After this page you know every setting of a run: its name, its type, its default and what it does.

A field of a part has the name of the part before it: `optim.weight_decay` in Python is the option
`--optim.weight-decay` of `nfnet train`. Where a part may be of several types, the option with the name of the part
chooses one, such as `--optim.method AdamW`, and each type has its own fields. `none` turns a part off that may be None.
Classes of [your own](extending.md) add theirs. [Recipes](recipes.md) says how to write one. This page is made by
`python tools/make_recipe_reference.py` from the classes.
"""


def default_of(field: "dataclasses.Field[Any]") -> str:
    """The default of a field as it would be written in a recipe; empty if the field must be given."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is dataclasses.MISSING:
        return "must be given"
    text = f"{type(value).__name__}()" if dataclasses.is_dataclass(value) else repr(value)
    return f"`{text}`".replace("|", "\\|")


def type_of(hint: Any) -> str:
    """A type in a cell of a table."""
    text = " or ".join("None" if member is type(None) else text_of(member) for member in members_of(hint))
    text = re.sub(r"<class '([\w.]+)'>", r"\1", text)
    return "`" + re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text).replace("|", "\\|") + "`"


def help_of(kind: type, name: str) -> str:
    """What stands below a field, in one line; of the class nearest to `kind` that says it."""
    for owner in kind.__mro__:
        if name in vars(owner).get("__annotations__", {}):
            body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
            assert isinstance(body, ast.ClassDef)
            for field, after in itertools.pairwise(body.body):
                is_field = isinstance(field, ast.AnnAssign) and getattr(field.target, "id", None) == name
                if is_field and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                    return re.sub(r"\s+", " ", str(after.value.value)).strip().replace("|", "\\|")
    raise SystemExit(f"{kind.__name__}.{name}: no text stands below it")


def parts_of(kind: type) -> Iterator[tuple[str, list[type]]]:
    """Fields that are configurations themselves, or tuples of such, each with the classes that it may hold."""
    for name, hint in field_hints(kind).items():
        members = [part for member in members_of(hint) for part in (member, *typing.get_args(member))]
        bases = [part for part in members if isinstance(part, type) and dataclasses.is_dataclass(part)]
        known = [found for base in bases for found in kinds_of(base).values()]
        kinds = [found for found in known if found is not ParamGroup and not is_own(found)]
        if kinds:
            yield name, kinds


def table(kind: type, path: str, fields: dict[str, Any]) -> list[str]:
    """The rows of a class's fields; `path` is the name of the part that holds them."""
    known = {field.name: field for field in dataclasses.fields(kind)}
    rows = ["| field | type | default | what |", "|---|---|---|---|"]
    for name, hint in fields.items():
        row = (f"`{path}.{name}`".replace("`.", "`"), type_of(hint), default_of(known[name]), help_of(kind, name))
        rows.append(f"| {' | '.join(row)} |")
    return rows


def section(kind: type, path: str, depth: int) -> Iterator[str]:
    """The fields of a class, then those of its parts."""
    if hints := field_hints(kind):
        yield from (*table(kind, path, hints), "")
    for name, kinds in parts_of(kind):
        whole = f"{path}.{name}".removeprefix(".")
        yield from (f"{'#' * min(depth, 4)} {whole}", "")
        is_tuple = any(typing.get_origin(member) is tuple for member in members_of(field_hints(kind)[name]))
        if is_tuple:
            yield from ("A tuple of any number of these. In options, the position stands before a field's name.", "")
        for found in kinds:
            yield from (wrapped(f"**`{found.__name__}`**: {first_paragraph(found)}"), "")
            yield from section(found, "" if is_tuple else whole, depth + 1)


def first_paragraph(kind: type) -> str:
    """The first paragraph of a docstring in one line."""
    return re.sub(r"\s+", " ", (inspect.getdoc(kind) or "").partition("\n\n")[0])


def wrapped(text: str) -> str:
    """A paragraph in lines of at most 120 columns."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def page() -> str:
    """The page."""
    groups = ("## Groups of parameters", "", wrapped(first_paragraph(ParamGroup)), "", *section(ParamGroup, "", 2))
    lines = (_BEGINNING, "## The recipe", "", wrapped(first_paragraph(Recipe)), "", *section(Recipe, "", 2), *groups)
    text = "\n".join(lines)
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    path.write_text(page())
    print(f"page: {path}")
