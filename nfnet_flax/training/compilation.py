"""Settings of XLA: the compilation cache, a thread pool of the same size everywhere, and the memory of CPUs."""

import ctypes
import functools
import importlib.util
import os
import platform
import sys
from pathlib import Path

import jax


def fix_thread_pool() -> None:
    """Gives XLA's thread pool on CPUs a size that does not depend on the machine; call it before JAX's backend starts.

    The pool's size decides where long sums are split, and with it how they are rounded. `NPROC` chooses another size.
    """
    os.environ.setdefault("NPROC", "8")


@functools.cache
def _memory_is_glibcs() -> bool:
    # Where an accelerator's plugin is installed and may be used, it allocates in its own way.
    plugins = [name for name in ("libtpu", "jax_plugins") if importlib.util.find_spec(name)]
    return platform.libc_ver()[0] == "glibc" and (not plugins or jax.config.values["jax_platforms"] == "cpu")


def keep_freed_memory() -> bool:
    """Lets a process that computes on CPUs keep what a step has freed; call it before JAX's backend starts.

    XLA allocates a step's temporary memory, hundreds of megabytes, anew in each step; glibc takes such blocks from the
    operating system and gives them back, and the page faults took 15% of NFNet-F0's step on two cores
    (`tools/bench_step.py`). From here on all threads share one heap, which is given back when the process ends, or by
    `return_freed_memory`.

    Returns:
      False, and nothing has changed, where an accelerator's plugin is installed and `JAX_PLATFORMS` does not leave it
      out, as those allocate in their own way, and where the C library is not glibc.
    """
    if not _memory_is_glibcs():
        return False
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # of malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(trim_threshold, -1), mallopt(mmap_max, 0), mallopt(arena_max, 1)])  # -1: the largest there is


def return_freed_memory() -> None:
    """Gives back once what is free now, where `keep_freed_memory` keeps it.

    Call it from time to time, between steps: compilation, checkpoints and evaluations leave gaps between small blocks
    that no step can use, and without it NFNet-F0's process grew from 3.5 to 5.9 GB.
    """
    if _memory_is_glibcs():
        ctypes.CDLL(None).malloc_trim(0)


def default_folder() -> Path:
    """Where compiled programs are kept unless JAX was told another place.

    Raises:
      RuntimeError: the user has no home folder.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nfnet_flax" / "compiled"


def use_compilation_cache() -> Path | None:
    """Keeps compiled programs in the user's cache folder, unless JAX was told another place.

    `JAX_COMPILATION_CACHE_DIR` chooses another folder and `JAX_ENABLE_COMPILATION_CACHE=false` turns it off. A folder
    that cannot be used is said once on stderr and costs nothing but time.

    Returns:
      The folder; None where there is no cache.
    """
    settings = jax.config.values
    if not settings["jax_enable_compilation_cache"]:
        return None
    if settings["jax_compilation_cache_dir"] is not None:
        return Path(settings["jax_compilation_cache_dir"])
    try:
        folder = default_folder()
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        print(f"no compilation cache ({error}): set JAX_COMPILATION_CACHE_DIR to a writable folder", file=sys.stderr)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return folder
