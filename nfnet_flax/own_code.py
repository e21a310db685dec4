"""Code of a user's own: recipe files, and modules that define networks, sources, objectives and the like.

Only code that the user names is run: a recipe, or what `--code` gives. A file becomes a module of its own name
(`my_net.py` is `my_net`), so that its classes are stored as `my_net:MyNetConfig` however it was loaded, and can be
pickled.
"""

import contextlib
import dataclasses
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import re
import sys
import traceback
import types
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from nfnet_flax.config import ConfigError, nearest
from nfnet_flax.paths import local_path

_FILES: dict[str, Path] = {}
"""Name in `sys.modules` -> file that was run under this name, because a user named the file."""
_OF_FAILED = weakref.WeakSet[type]()
"""Classes of files that ended with an error; Python keeps them for a while."""
_UNKNOWN_FIELD = re.compile(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'")


def load_code(code: str | os.PathLike[str]) -> types.ModuleType:
    """Loads code that defines classes that a run, a weight file or a command names.

    Args:
      code: path of a `.py` file, which may import modules from its own folder, or the name of a module that can be
        imported. Code that is already loaded is not loaded again.

    Raises:
      ConfigError: there is no such file or module, or it cannot be run; the message names the file and the line.
    """
    text = os.fspath(code)
    if text.endswith(".py"):
        file = python_file("code", text)
        with running(f"code {text!r}:", file):
            return _loaded_from(file) or run_file(file)
    try:
        with _importable(Path.cwd()):
            return importlib.import_module(text)
    except Exception as error:
        raise ConfigError(
            f"code {text!r} cannot be imported ({type(error).__name__}: {error}): give the path of a .py file, or the "
            "name of a module as in an import statement"
        ) from error


def python_file(field: str, value: str | os.PathLike[str]) -> Path:
    """The absolute path of an existing Python file.

    Raises:
      ConfigError: it does not exist, or is not a `.py` file.
    """
    file = local_path(field, value)
    if file.suffix == ".py" and file.is_file():
        return file
    if file.exists():
        problem, others = "is not a .py file", []
    elif file.parent.is_dir():
        problem, others = "does not exist", nearest(file.name, (other.name for other in file.parent.glob("*.py")))
    else:
        problem, others = f"does not exist, as there is no folder {str(file.parent)!r}", []
    remedy = f"perhaps you mean {' or '.join(others)} in the same folder" if others else "give the path of a .py file"
    raise ConfigError(f"{field} {os.fspath(value)!r} {problem}: {remedy}")


def run_file(file: Path) -> types.ModuleType:
    """Runs a file as a module, again if it was run before; to be called within `running`."""
    name = _free_name(file)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(name), _FILES.get(name)
    sys.modules[name] = module  # dataclasses look up the names in their annotations there
    _FILES[name] = file
    try:
        spec.loader.exec_module(module)
    except BaseException:
        _OF_FAILED.update(
            value for value in vars(module).values() if isinstance(value, type) and value.__module__ == name
        )
        sys.modules.pop(name, None)
        del _FILES[name]
        match before:  # what an older version of the file defined stays in use
            case types.ModuleType() as older, Path() as its_file:
                sys.modules[name], _FILES[name] = older, its_file
        raise
    return module


def is_in_use(kind: type) -> bool:
    """Whether a class is one of a module that is loaded, and not of a file that ended with an error."""
    return kind.__module__ in sys.modules and kind not in _OF_FAILED


def _free_name(file: Path) -> str:
    """A module name for a file: its own name, or another one if a different module has that name."""
    stem = file.stem
    if stem in sys.modules:
        is_free = stem in _FILES  # an older version of it, or a file of the same name in another folder
    else:
        elsewhere = [entry for entry in sys.path if entry != str(file.parent)]
        found = importlib.machinery.PathFinder.find_spec(stem, elsewhere) if stem.isidentifier() else None
        is_same = found is not None and found.origin is not None and Path(found.origin).resolve() == file
        is_free = stem.isidentifier() and stem not in sys.stdlib_module_names and (found is None or is_same)
    return stem if is_free else f"own_code_{stem}"


def _loaded_from(file: Path) -> types.ModuleType | None:
    """The module that a file was loaded as."""
    for name, module in list(sys.modules.items()):
        if name != "__main__" and file_of(module) == file:
            return module
    return None


def file_of(module: types.ModuleType) -> Path | None:
    """The Python file of a module; None where it has none."""
    file = vars(module).get("__file__")
    return Path(file).resolve() if isinstance(file, str) and file.endswith(".py") else None


def public_name(module: str) -> str:
    """A module's name as its author would write it: that of its file, also if the file runs as a program."""
    if module in _FILES:
        return _FILES[module].stem
    if module == "__main__":
        main = sys.modules[module]
        spec, file = vars(main).get("__spec__"), file_of(main)
        return spec.name if spec is not None else module if file is None else file.stem
    return module


@contextlib.contextmanager
def running(what: str, file: Path) -> Iterator[None]:
    """Lets the code of a file import modules from its folder, and adds the file and line to its errors.

    Raises:
      ConfigError: any exception was raised; the message begins with `what` and names the line.
    """
    try:
        with _importable(file.parent):
            yield
    except Exception as error:
        raise ConfigError(f"{what} {_location(file, error)}: {_explanation(error)}") from error


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Lets modules be imported from a folder, as Python does for the folder of a script.

    Afterwards the folder is the last in which modules are looked for, as functions may import modules when called.
    """
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the code has removed it
            sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))


def loaded_files() -> dict[str, str]:
    """Name -> file of each module that was loaded from a file that a user named, or from the folder of such a file.

    Another process that passes these to `find_modules_in` runs the same files, whatever its import path is.
    """
    folders = {str(file.parent) for file in _FILES.values()}
    found = {}
    for name, module in list(sys.modules.items()):
        given = vars(module).get("__file__")
        if not isinstance(given, str) or "." in name or name == "__main__":
            continue
        folder, base = os.path.split(given)
        if name in _FILES or (os.path.dirname(folder) if base == "__init__.py" else folder) in folders:
            found[name] = given
    return found


def find_modules_in(files: Mapping[str, str]) -> None:
    """Makes modules of the given names load from the given files, as in the process that called `loaded_files`."""
    _FILES.update({name: Path(file) for name, file in files.items() if Path(file).name != "__init__.py"})
    sys.meta_path.insert(0, _GivenFiles(dict(files)))


class _GivenFiles(importlib.abc.MetaPathFinder):
    """Finds modules by name in a table of files."""

    def __init__(self, files: dict[str, str]) -> None:
        self._files = files

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        del path, target
        if fullname not in self._files:
            return None
        file = self._files[fullname]
        inside = [os.path.dirname(file)] if os.path.basename(file) == "__init__.py" else None
        return importlib.util.spec_from_file_location(fullname, file, submodule_search_locations=inside)


def _location(file: Path, error: Exception) -> str:
    """The innermost line, in a file or in a module from its folder, that led to an error."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{error.filename!r}, line {error.lineno}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if Path(frame.filename).parent == file.parent and frame.filename != __file__:
            return f"{frame.filename!r}, line {frame.lineno}"
    return repr(str(file))


def _explanation(error: Exception) -> str:
    if isinstance(error, ConfigError):
        return str(error)
    text = f"{type(error).__name__}: {error}"
    unknown = _UNKNOWN_FIELD.search(str(error))
    kind = _imported(unknown.group(1)) if isinstance(error, TypeError) and unknown is not None else None
    if unknown is not None and kind is not None:
        moved = vars(kind).get("moved_fields", {})
        if unknown.group(2) in moved:
            field, part = moved[unknown.group(2)]
            return f"{text}: it is part of {field}={part}(...) now"
        fields = [field.name for field in dataclasses.fields(kind)]
        near = nearest(unknown.group(2), fields)
        question = f"; did you mean {' or '.join(near)}?" if near else ""
        return f"{text}{question or '.'} Its fields are {', '.join(fields)}"
    return text


def _imported(class_name: str) -> type | None:
    """A configuration class that code has imported."""
    for name, module in list(sys.modules.items()):
        if name.startswith("nfnet_flax.") or name in _FILES:
            found = vars(module).get(class_name)
            if isinstance(found, type) and dataclasses.is_dataclass(found):
                return found
    return None
