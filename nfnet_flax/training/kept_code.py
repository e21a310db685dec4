"""Copies of a user's own code in the run's folder, by which a change of the code is noticed.

A run that uses classes of a user's own keeps copies, in `code/`, of the files that define them and of the modules that
these import from their own folder. The comparison ignores comments, docstrings, formatting, code under
`if __name__ == "__main__"`, and the function `recipe`, because the recipe itself is compared.
"""

import ast
import contextlib
import dataclasses
import difflib
import hashlib
import inspect
import os
import shutil
import sys
import sysconfig
import textwrap
import types
from collections.abc import Iterator, Mapping
from pathlib import Path

from nfnet_flax.config import ConfigError
from nfnet_flax.open_config import own_classes, type_name
from nfnet_flax.own_code import file_of, loaded_files, public_name
from nfnet_flax.training import layout
from nfnet_flax.training.storage import storage_errors

_MAX_FILES, _MAX_LINES = 3, 6
"""Largest number of changed files that a message shows, and of lines for each of them."""
_INSTALLED_AS = {"site-packages", "dist-packages"}
_INSTALLED_IN = [Path(__file__).parents[1], *(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib"))]
"""Folders of installed code: by name (above), and by path: those of this package and of Python itself."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnCode:
    """The code of a user's own that a recipe uses."""

    files: Mapping[str, bytes]
    """Path within `code/` -> source of the files on which updates depend."""
    recipes: Mapping[str, bytes]
    """Path within `code/` -> source of recipe files that import these. They are kept, so that the copies can be run,
    but not compared."""
    without_source: tuple[str, ...]
    """Names of classes whose source is not found, as if they were typed into an interpreter."""

    def digests(self) -> dict[str, str]:
        """Path -> digest of the part of the source that is compared."""
        return {path: hashlib.sha256(_plain(source).encode()).hexdigest()[:32] for path, source in self.files.items()}


def code_of(config: object) -> OwnCode:
    """The code of a user's own classes that a configuration consists of.

    Raises:
      ConfigError: a file that was loaded cannot be read any more.
    """
    classes = own_classes(config)
    if not classes:
        return OwnCode(files={}, recipes={}, without_source=())
    modules, texts, without_source = [], [], []
    for kind in classes:
        module = sys.modules.get(kind.__module__)
        if module is not None and kind.__module__ != "__main__" and file_of(module) is not None:
            modules.append(module)
        elif (text := _text_of(kind)) is not None:
            texts.append(text)
        else:
            without_source.append(type_name(kind))
    files = _with_imports(modules)
    if texts:
        files[f"{public_name('__main__')}.py"] = "\n\n".join(texts).encode()
    recipes: dict[str, bytes] = {}
    for name in loaded_files():
        found = _with_imports([sys.modules[name]])
        if found.keys() & files.keys() and any(map(_is_recipe, found.values())):
            recipes |= {path: source for path, source in found.items() if path not in files}
    return OwnCode(files=dict(sorted(files.items())), recipes=recipes, without_source=tuple(without_source))


def _text_of(kind: type) -> str | None:
    """The source of a class that is not in the file of a module: of the whole class if possible, or of its methods."""
    with contextlib.suppress(OSError, TypeError):
        return textwrap.dedent(inspect.getsource(kind))
    methods = []
    for value in vars(kind).values():
        function = value.fget if isinstance(value, property) else value
        # Functions in the file "<string>" are made by `dataclasses`.
        if isinstance(function, types.FunctionType) and function.__code__.co_filename != "<string>":
            try:
                methods.append(textwrap.indent(textwrap.dedent(inspect.getsource(function)), "    "))
            except OSError:
                return None
    return f"class {kind.__name__}:\n" + "".join(methods) if methods else None


def _with_imports(modules: list[types.ModuleType]) -> dict[str, bytes]:
    """Path within `code/` -> source, for modules and for those that they import from their own folder."""
    found: dict[str, bytes] = {}
    named = set(loaded_files())
    pending = [(public_name(module.__name__), file_of(module)) for module in modules]
    while pending:
        name, file = pending.pop()
        if file is None:
            continue
        is_package, is_alone = file.name == "__init__.py", file.stem == name  # the name of a file may contain dots
        path = file.name if is_alone else f"{name.replace('.', '/')}{'/__init__' if is_package else ''}.py"
        if path in found:
            continue
        found[path] = _source(file)
        if not _is_installed(file):
            root = file.parent if is_alone else file.parents[name.count(".") + is_package]
            names = [*_parents(name), *_imported(found[path], name if is_package else name.rpartition(".")[0])]
            pending += [(other, _own_file(other, root, named)) for other in dict.fromkeys(names)]
    return found


def _source(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{str(file)!r}, whose code is loaded, cannot be read any more ({error.strerror})") from error


def _parents(name: str) -> Iterator[str]:
    """Packages that contain a module; Python runs them before it."""
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts)))


def _imported(source: bytes, package: str) -> Iterator[str]:
    """Names of modules that import statements anywhere in a source may refer to."""
    for node in ast.walk(_parsed(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            names = [base, *(f"{base}.{alias.name}".lstrip(".") for alias in node.names)]
        else:
            continue
        for name in filter(None, names):
            yield from (*_parents(name), name)


def _own_file(name: str, root: Path, named: set[str]) -> Path | None:
    """The file of a module if it is the user's own, that is, in the folder `root` or among the modules in `named`."""
    if name in sys.modules:
        file = file_of(sys.modules[name])
        is_own = file is not None and (file.is_relative_to(root) or name in named)
        return file if file is not None and is_own and not _is_installed(file) else None
    place = root / name.replace(".", "/")
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)


def _is_installed(file: Path) -> bool:
    """Whether a file belongs to this package, an installed package or Python, of which the versions are recorded."""
    return not _INSTALLED_AS.isdisjoint(file.parts) or any(map(file.is_relative_to, _INSTALLED_IN))


def _parsed(source: bytes) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError):  # the file has changed since it was loaded
        return ast.Module([ast.Expr(ast.Name(repr(source), ast.Load()))], [])


def _is_recipe(source: bytes) -> bool:
    return any(map(_is_recipe_function, _parsed(source).body))


def _is_recipe_function(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name == "recipe"


def _plain(source: bytes) -> str:
    """A source without the parts that may change."""
    tree = _parsed(source)
    tree.body = [node for node in tree.body if not _is_recipe_function(node) and not _is_of_program(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [part for part in node.body if not _is_text(part)]
    return ast.unparse(tree)


def _is_text(node: ast.stmt) -> bool:
    """Whether a statement is only a text: the docstring of a function, a class or a field."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _is_of_program(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("__name__ == '__main__'", "'__main__' == __name__")


def keep(workdir: Path, code: OwnCode) -> None:
    """Writes all copies or none; does nothing if there are copies already.

    Raises:
      OSError: they cannot be written.
    """
    folder = workdir / layout.CODE
    if folder.exists() or not code.files:
        return
    partial = workdir / f".{layout.CODE}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    for path, source in {**code.recipes, **code.files}.items():
        file = partial / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(source)
    partial.rename(folder)


def changed_files(workdir: Path, code: OwnCode) -> dict[str, list[str]]:
    """Path -> changed lines, for each file that differs from the recorded copy; empty if there are no copies.

    Raises:
      StorageFailed: the record cannot be read.
    """
    folder = workdir / layout.CODE
    changes: dict[str, list[str]] = {}
    with storage_errors(folder, OSError):
        kept = {path: (folder / path).read_bytes() for path in code.files if (folder / path).is_file()}
        if not folder.exists():
            return changes
    for path, source in code.files.items():
        before, after = _plain(kept.get(path, b"")), _plain(source)
        if before != after:
            lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
            changes[path] = [line for line in lines if not line.startswith(("---", "+++", "@@"))]
    return changes


def check_code(workdir: Path, code: OwnCode) -> None:
    """Raises `ConfigError` if the code of a run differs from the recorded copies."""
    if changes := changed_files(workdir, code):
        raise ConfigError(
            f"the code of the run in {str(workdir)!r} changed since it began:\n{describe(changes)}\n"
            f"use the code as it was: {_how_to_run_the_copies(workdir)}; or give another workdir"
        )


def describe(changes: Mapping[str, list[str]]) -> str:
    """The first changed lines as text."""
    text = []
    for path, lines in list(changes.items())[:_MAX_FILES]:
        text += [f"  {path}:", *(f"    {line}" for line in lines[:_MAX_LINES])]
        if len(lines) > _MAX_LINES:
            text.append(f"    ... and {len(lines) - _MAX_LINES} lines more")
    if len(changes) > _MAX_FILES:
        text.append(f"  ... and {len(changes) - _MAX_FILES} files more")
    return "\n".join(text)


def _how_to_run_the_copies(workdir: Path) -> str:
    folder = workdir / layout.CODE
    for file in sorted(folder.rglob("*.py")):
        if _is_recipe(file.read_bytes()):
            return f"nfnet train {file} --workdir {workdir} continues with the copies of the run"
    return f"the copies of the run are in {folder}"


def change_of_code(workdir: Path, config: object) -> str | None:
    """A message for a reader of a run whose code changed since it was trained; None if it did not change."""
    changes = changed_files(workdir, code_of(config))
    if not changes:
        return None
    return (
        f"the code of the run in {str(workdir)!r} changed since it began; the present code is used "
        f"(copies of the old code are in {workdir / layout.CODE}):\n{describe(changes)}"
    )
