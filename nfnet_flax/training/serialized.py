"""Compiles a program, and gives the bytes from which another process can load it.

On CPUs a program that JAX has read from its own cache lacks functions when it is serialized again. The bytes are then
those that JAX has read.
"""

import contextlib
import functools
import io
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import compilation_cache
from jax.experimental import serialize_executable

Serialized = tuple[bytes, Any, Any]
"""What `jax.experimental.serialize_executable.deserialize_and_load` takes: bytes, and the structures of arguments and
results."""
_INNER = "extract_executable_and_time"
"""JAX's function through which all that it reads from its cache goes: there is no public one. Where a version of JAX
lacks it, nothing is noted."""
_REQUEST, _HIT = "/jax/compilation_cache/compile_requests_use_cache", "/jax/compilation_cache/cache_hits"


def compile_serialized(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, Serialized | None]:
    """A compiled program, and what it can be loaded from; None if that is not known."""
    events = _cache_events()
    num_before = len(events)
    with _reads_of_cache() as read:
        compiled = lowered.compile()
    new = events[num_before:]
    with contextlib.suppress(Exception):  # what libraries raise for a program that cannot be serialized is not known
        if _HIT not in new:
            return compiled, serialize_executable.serialize(compiled)
        if new == [_REQUEST, _HIT] and len(read) == 1:  # otherwise another program was compiled meanwhile
            return compiled, _serialized(compiled, read[0])
    return compiled, None


@functools.cache
def _cache_events() -> list[str]:
    """The names of what JAX reports, from now on, of its cache."""
    events: list[str] = []

    def listen(event: str, **_: str | int) -> None:
        if event in (_REQUEST, _HIT):
            events.append(event)

    jax.monitoring.register_event_listener(listen)
    return events


@contextlib.contextmanager
def _reads_of_cache() -> Iterator[list[bytes]]:
    """The executables that JAX reads from its cache, in this thread and within the context."""
    found: list[bytes] = []
    thread = threading.get_ident()
    inner = getattr(compilation_cache, _INNER, None)
    if inner is None:
        yield found
        return

    def noting(entry: bytes) -> tuple[bytes, int]:
        executable, compile_time = inner(entry)
        if threading.get_ident() == thread:
            found.append(executable)
        return executable, compile_time

    setattr(compilation_cache, _INNER, noting)
    try:
        yield found
    finally:
        setattr(compilation_cache, _INNER, inner)


def _serialized(compiled: jax.stages.Compiled, executable: bytes) -> Serialized:
    """What `serialize_executable.serialize` gives, but with these bytes for the executable itself."""
    unloaded: Any = compiled._executable._unloaded_executable  # type: ignore[attr-defined]

    class Pickler(serialize_executable._JaxPjrtPickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("exec", executable) if obj is unloaded.xla_executable else super().persistent_id(obj)

    arguments, in_tree = jax.tree.flatten(compiled.args_info)
    if compiled._params.const_args:
        raise NotImplementedError("constants are no part of what is serialized")
    file = io.BytesIO()
    Pickler(file).dump((unloaded, arguments, compiled._no_kwargs))
    return file.getvalue(), in_tree, compiled.out_tree
