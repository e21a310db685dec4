"""Keeps compiled steps on disk, so that the next start of a run needs neither to trace nor to compile them.

JAX keeps compiled programs, too, but finds one only by what it computes, and so after tracing, which takes longer than
reading the program. Here a program is found by all that decides it: the code of this package and of the libraries that
trace and compile, their settings, the devices and the processor, the recipe, and the shapes and shardings of the
arguments. If any of this has changed, also since the process started, if the file is damaged or belongs to somebody
else, or if anything else fails, the step is compiled as ever. Programs of several processes are not kept, nor are those
of recipes with classes of a user's own, whose code can depend on anything. Several processes wait for each other when
each has compiled: on CPUs the first exchange between them fails after 30 s.

Whoever can write a file of JAX's cache decides what a process computes, and whoever can write one of these can also let
it execute anything, as they are pickled. So only files are read that belong to the user and that nobody else can write,
and they are made so that nobody else can read them either.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import pickle
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh

import nfnet_flax
from nfnet_flax import runtime
from nfnet_flax.config_json import to_json
from nfnet_flax.json_files import write_whole
from nfnet_flax.open_config import own_classes
from nfnet_flax.parallel.processes import current
from nfnet_flax.recipe import Recipe
from nfnet_flax.training.serialized import compile_serialized

_SUFFIX = ".program"
_MAX_BYTES = 2 << 30
"""Largest size of all kept programs together; those that were not used for longest are removed first."""
_PACKAGES = ("nfnet_flax", "jax", "jaxlib", "flax", "optax", "numpy")
"""Packages whose files decide what is traced and compiled."""
_PLUGINS = ("jax", "libtpu", "nvidia", "rocm")
"""Beginnings of the names of packages with compilers and libraries for accelerators."""
_DECIDE_NO_PROGRAM = (
    "name",
    "checkpoint",
    "init_from",
    "log_every_steps",
    "eval_every_steps",
    "tensorboard",
    "telemetry",
    "platform",
)
"""Fields of a recipe that no program depends on. A change of any other field means another program here."""
_DIGEST_BYTES = 32
_COMPILED = itertools.count()
_LONGEST_COMPILATION_S = 24 * 3600.0
"""A process that ends meanwhile is noticed by its heartbeat (`parallel/peers.py`)."""


class KeptPrograms:
    """The programs of a recipe that are kept on disk, for the functions that are made from the recipe."""

    def __init__(self, recipe: Recipe, mesh: Mesh) -> None:
        """Finds out by what they are named.

        Args:
          recipe: recipe that the functions are made from.
          mesh: devices on which they run.
        """
        self._mesh = mesh
        self._folder = None if jax.process_count() > 1 or own_classes(recipe) else _folder()
        if self._folder is not None and not _files_are_those_loaded():
            self._folder = None
        fields = {name: value for name, value in to_json(recipe).items() if name not in _DECIDE_NO_PROGRAM}
        self._made_from = [fields, _devices(mesh), _surroundings()] if self._folder is not None else []
        self._ahead: dict[str, tuple[Path, Future[jax.stages.Compiled | None]]] = {}

    def read_ahead(self, name: str) -> None:
        """Begins to read, in a thread, the program of a function that `kept` gets later, if there is one.

        If there are several, for other numbers of images, it is the one that was used last.
        """
        if self._folder is None or jax.config.values["jax_disable_jit"]:
            return
        with contextlib.suppress(OSError):
            found = self._folder.glob(f"{self._begin_of(name)}-*{_SUFFIX}")
            file = max(found, key=lambda path: path.stat().st_mtime_ns, default=None)
            if file is not None:
                # Python waits for the thread when the process ends: XLA must not be taken down while it reads.
                thread = ThreadPoolExecutor(1, "kept program")
                self._ahead[name] = file, thread.submit(_read, file, self._mesh)
                thread.shutdown(wait=False)

    def kept(self, function: jax.stages.Wrapped, name: str, facts: Sequence[object] | None) -> Callable[..., Any]:
        """A jitted function that is read from disk at its first call if it was compiled before, or else compiled and
        kept.

        Args:
          function: function that always gets arguments of the same shapes, types and shardings. It is returned
            unchanged if its program cannot be kept; with several processes, it is compiled by all before any of them
            runs it.
          name: tells apart the functions of a recipe.
          facts: whatever else the function was made from; None: things that cannot be listed, so that nothing is kept.
        """
        if jax.config.values["jax_disable_jit"]:
            return function
        if jax.process_count() > 1:
            return _compiled_together(function)
        if self._folder is None or facts is None:
            return function
        folder, others = self._folder, [str(fact) for fact in facts]
        programs: list[jax.stages.Compiled] = []

        def first(*args: Any) -> Any:
            end = _short_digest([others, [_form(leaf) for leaf in jax.tree.leaves(args)]])
            file = folder / f"{self._begin_of(name)}-{end}{_SUFFIX}"
            program = self._read(name, file)
            if program is None:
                program = _compile(function.lower(*args), file)
                programs.append(program)
                return program(*args)
            try:
                found = jax.block_until_ready(program(*args))
            except Exception:
                file.unlink(missing_ok=True)  # the next start compiles
                raise
            programs.append(program)
            return found

        def call(*args: Any) -> Any:
            return programs[0](*args) if programs else first(*args)

        return call

    def _begin_of(self, name: str) -> str:
        """Beginning of the names of files, of what is known before the data are opened."""
        return _short_digest([name, *self._made_from])

    def _read(self, name: str, file: Path) -> jax.stages.Compiled | None:
        ahead, reading = self._ahead.pop(name, (None, None))
        return reading.result() if reading is not None and ahead == file else _read(file, self._mesh)


def _compiled_together(function: jax.stages.Wrapped) -> Callable[..., Any]:
    """A jitted function that waits, before its first call runs, until all processes have compiled it."""
    programs: list[jax.stages.Compiled] = []

    def call(*args: Any) -> Any:
        if not programs:
            programs.append(function.lower(*args).compile())
            current().barrier(f"compiled/{next(_COMPILED)}", _LONGEST_COMPILATION_S)
        return programs[0](*args)

    return call


def _folder() -> Path | None:
    settings = jax.config.values
    place = settings["jax_compilation_cache_dir"]
    if not settings["jax_enable_compilation_cache"] or place is None or "://" in str(place):
        return None
    return Path(place) / "steps"


def _short_digest(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _form(leaf: Any) -> str:
    return f"{leaf.shape} {leaf.dtype} {leaf.weak_type} {leaf.sharding}"


def _devices(mesh: Mesh) -> list[str]:
    return [str(mesh), *(f"{device.id} {device.device_kind}" for device in mesh.devices.flat), str(len(jax.devices()))]


def _surroundings() -> dict[str, Any]:
    """What decides programs besides the recipe and the devices. It is never stored: settings can change at any time."""
    return runtime.environment() | {
        "processor": runtime.processor(),
        "plugins": _plugins(),
        "settings": {name: str(value) for name, value in sorted(jax.config.values.items())},
        "flags": dict(sorted(runtime.xla_flags().items())),
        "files": {package: _files_of(package).digest for package in _PACKAGES},
    }


def _plugins() -> dict[str, str]:
    """Versions of the libraries by which JAX uses accelerators. On CPUs they decide nothing."""
    if jax.default_backend() == "cpu":
        return {}
    names = {found.name: found.version for found in importlib.metadata.distributions()}
    return {name: version for name, version in sorted(names.items()) if name.lower().startswith(_PLUGINS)}


class _Files(NamedTuple):
    """The source files and libraries of a package."""

    digest: str
    """Of their paths, sizes and times."""
    newest_ns: int
    """When the newest of them was put there, in nanoseconds since 1970, whatever time of change it shows."""


def _files_of(package: str) -> _Files:
    digest, newest_ns = hashlib.sha256(), 0
    spec = importlib.util.find_spec(package)
    for folder in sorted(spec.submodule_search_locations or []) if spec else []:
        for path, folders, files in os.walk(folder):
            folders[:] = sorted(set(folders) - {"__pycache__", "tests"})
            for name in sorted(files):
                found = os.stat(os.path.join(path, name))
                digest.update(f"{path} {name} {found.st_size} {found.st_mtime_ns}\n".encode())
                newest_ns = max(newest_ns, found.st_ctime_ns)
    return _Files(digest.hexdigest(), newest_ns)


def _files_are_those_loaded() -> bool:
    """Whether no file has changed since this process began to load the packages: a program says what was loaded."""
    return max(_files_of(package).newest_ns for package in _PACKAGES) < nfnet_flax.IMPORTED_NS


def _read(file: Path, mesh: Mesh) -> jax.stages.Compiled | None:
    """The program in a file; None if there is none, or if it is damaged or not the user's own."""
    # Any failure to load is answered by compiling: what libraries raise for a program that does not fit is not known.
    with contextlib.suppress(Exception):
        with file.open("rb") as opened:
            about = os.fstat(opened.fileno())  # of what is read, whatever has the name by now
            if about.st_uid != os.getuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return None
            content = opened.read()
        if _digest(file, content[_DIGEST_BYTES:]) != content[:_DIGEST_BYTES]:
            return None
        program, in_tree, out_tree = pickle.loads(content[_DIGEST_BYTES:])
        devices = list(mesh.devices.flat)
        loaded = serialize_executable.deserialize_and_load(
            program, in_tree, out_tree, backend=devices[0].client, execution_devices=devices
        )
        file.touch()
        return loaded
    return None


def _compile(lowered: jax.stages.Lowered, file: Path) -> jax.stages.Compiled:
    """Compiles a program and keeps it, if that is possible."""
    compiled, serialized = compile_serialized(lowered)
    with contextlib.suppress(Exception):  # as in `_read`; on a full disk, too, the run goes on
        if serialized is not None:
            content = pickle.dumps(serialized)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, _digest(file, content) + content, mode=0o600)
            _remove_oldest(file.parent)
    return compiled


def _digest(file: Path, content: bytes) -> bytes:
    """Digest of a program and of what it was made from, which the name of its file stands for."""
    return hashlib.sha256(file.name.encode() + content).digest()


def _remove_oldest(folder: Path) -> None:
    found = [(path.stat(), path) for path in folder.glob(f"*{_SUFFIX}")]
    left = sum(about.st_size for about, _ in found) - _MAX_BYTES
    for about, path in sorted(found, key=lambda item: item[0].st_mtime):
        if left <= 0:
            break
        path.unlink(missing_ok=True)
        left -= about.st_size
