"""Writes docs/api.md, a list of the public names of the package, from their docstrings.

python tools/make_api_overview.py [FILE]
"""

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).parent.parent))

import nfnet_flax

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "api.md"
MODULES = (
    "nfnet_flax.models",
    "nfnet_flax.optim",
    "nfnet_flax.objectives",
    "nfnet_flax.data.source_config",
    "nfnet_flax.data.random_access",
    "nfnet_flax.weights",
    "nfnet_flax.prediction",
    "nfnet_flax.export",
    "nfnet_flax.parallel.reduce",
    "nfnet_flax.telemetry.signal",
    "nfnet_flax.telemetry.trackers",
)
"""Modules whose public names users may need besides those of the package itself."""
_BEGINNING = """# API overview

After this page you know which classes and functions the package offers, and in which file each one is explained.

`help(nfnet_flax.train)` prints a whole docstring, with arguments and errors. Everything is typed (`py.typed`).
[Getting started](getting_started.md#in-python) shows the most important functions at work, and
[extending](extending.md) the base classes. This page is made by `python tools/make_api_overview.py`.
"""


def names_of(module: ModuleType) -> list[str]:
    """The public names of a module: those that it lists, or those that are defined in it."""
    listed = getattr(module, "__all__", None)
    own = (name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__)
    return sorted((name for name in listed or own if not name.startswith("_")), key=str.lower)


def rows_of(module: ModuleType) -> Iterator[str]:
    """A row for each class, function and module."""
    for name in names_of(module):
        value = getattr(module, name)
        if not (inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value)):
            continue
        doc = re.sub(r"\s+", " ", (inspect.getdoc(value) or "").partition("\n\n")[0]).replace("|", "\\|")
        source = inspect.unwrap(value) if inspect.isroutine(value) else value
        file = Path(inspect.getsourcefile(source) or "").relative_to(ROOT)
        yield f"| `{name}` | {doc} | `{file}` |"


def page() -> str:
    """The page."""
    lines = [_BEGINNING]
    for module in (nfnet_flax, *map(importlib.import_module, MODULES)):
        lines += [f"## {module.__name__}", "", "| name | what | file |", "|---|---|---|", *rows_of(module), ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    path.write_text(page())
    print(f"page: {path}")
