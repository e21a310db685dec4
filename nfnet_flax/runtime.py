"""Settings that a process needs before JAX starts, and the facts about it that can change the bits of a result.

The command line and the Python API both call `prepare`, so that the same recipe gives the same bits with both.
"""

import contextlib
import ctypes
import functools
import glob
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
from pathlib import Path

import jax
from jax._src import xla_bridge
from jax._src.hardware_utils import num_available_tpu_chips_and_device_id

import nfnet_flax
from nfnet_flax import python_parser
from nfnet_flax.config import ConfigError
from nfnet_flax.messages import warn
from nfnet_flax.paths import user_cache

_POOL_SIZE = 8
_DETERMINISTIC_GPU = "xla_gpu_deterministic_ops"
_PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "numpy"),  # what computes
    *("grain", "opencv-python-headless", "pillow", "simplejpeg"),  # what makes pixels
)
_SETTINGS = (
    "jax_allow_f16_reductions",
    "jax_compiler_enable_remat_pass",
    "jax_cpu_collectives_implementation",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_disable_jit",
    "jax_disable_most_optimizations",
    "jax_enable_x64",
    "jax_exec_time_optimization_effort",
    "jax_explicit_x64_dtypes",
    "jax_high_dynamic_range_gumbel",
    "jax_memory_fitting_effort",
    "jax_memory_fitting_level",
    "jax_numpy_dtype_promotion",
    "jax_optimization_level",
    "jax_random_seed_offset",
    "jax_softmax_custom_jvp",
    "jax_threefry_partitionable",
    "jax_use_direct_linearize",
    "jax_use_shardy_partitioner",
)
"""Settings of JAX, from `JAX_*` variables or `jax.config`, that change random numbers, types or compiled programs."""
NVIDIA_FILES = ("/dev/nvidia*", "/dev/dxg", "/dev/nvhost*", "/dev/nvgpu*")
"""Device files of NVIDIA's drivers: on servers, in Windows' Linux, and of embedded GPUs."""
_FREE_FLAGS = re.compile(r"xla_force_host_platform_device_count|xla_dump_\w+")
"""Flags of XLA that do not change bits: by design, results do not depend on the number of devices."""
_VARIABLES = ("LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
_INSTRUCTION_SETS = re.compile(
    r"(?!smep)(sse|ssse|avx|amx|vaes|vpclmul|fma|f16c|gfni|bmi|popcnt|asimd|sve|sme|bf16|i8mm)\w*"
)
"""Flags of a processor that name instruction sets for arithmetic, on which compiled programs depend."""


def prepare(*, reproducible: bool = False) -> None:
    """Prepares this process for computing; call it before JAX looks for devices. Repeated calls do no harm.

    On CPUs XLA's thread pool gets a size that does not depend on the machine (`NPROC`, 8 unless set), because this size
    determines how long sums are split, and so how they are rounded. Freed memory is kept, and compiled programs are
    kept on disk. If the call is too late for the thread pool, one warning says so.

    Args:
      reproducible: whether to ask XLA for deterministic operations on GPUs (`XLA_FLAGS`), unless the user has set that
        flag; `check_deterministic` finds out whether this succeeded.
    """
    if not xla_bridge.backends_are_initialized():
        os.environ.setdefault("NPROC", str(_POOL_SIZE))
        _leave_out_absent_devices()
        may_be_gpu = _gpu_plugins() and jax.config.values["jax_platforms"] != "cpu"
        if reproducible and may_be_gpu and _DETERMINISTIC_GPU not in xla_flags():
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{_DETERMINISTIC_GPU}=true".strip()
    elif jax.default_backend() == "cpu":
        found, wanted = _pool_size(), max(_requested_pool_size() or _POOL_SIZE, jax.local_device_count())
        if found != wanted:
            _say_once(
                f"JAX was in use before nfnet_flax prepared the process: its thread pool has {found} threads, not "
                f"{wanted}, so that results differ in their last bits from those of the command nfnet. Set NPROC="
                f"{wanted} in the environment, or call nfnet_flax.runtime.prepare() before JAX computes anything"
            )
    python_parser.protect()
    keep_freed_memory()
    use_compilation_cache()


def check_deterministic() -> None:
    """Checks that the same step gives the same bits twice on the available devices; starts JAX's backend.

    Raises:
      ConfigError: they are GPUs, and XLA is not set to use deterministic operations only.
    """
    if jax.default_backend() == "gpu" and xla_flags().get(_DETERMINISTIC_GPU) not in ("true", "1"):
        raise ConfigError(
            f"execution.reproducible = True: on GPUs it needs XLA_FLAGS=--{_DETERMINISTIC_GPU}=true before JAX looks "
            "for devices; set that, or give --execution.no-reproducible"
        )


def environment() -> dict[str, str]:
    """Facts about this process and its machine that can change the bits of a result, by name; starts JAX's backend.

    The number of devices and processes is not included, as results do not depend on it.
    """
    facts = versions()
    device = jax.local_devices()[0]
    facts |= {"platform": device.platform, "device_kind": device.device_kind}
    if device.platform == "cpu":
        facts |= {"cpu_features": _cpu_features(), "thread_pool_size": str(_pool_size())}
    else:
        facts["platform_version"] = " ".join(device.client.platform_version.split())
    values = jax.config.values
    facts |= {name: str(values[name]) for name in _SETTINGS if name in values}  # not every version of JAX has each
    flags = {name: value for name, value in sorted(xla_flags().items()) if not _FREE_FLAGS.fullmatch(name)}
    facts["XLA_FLAGS"] = " ".join(f"--{name}={value}" for name, value in flags.items())
    return facts | {name: os.environ.get(name, "") for name in _VARIABLES}


def versions() -> dict[str, str]:
    """Name -> version of Python, of this package, and of the packages on which the bits of a result depend."""
    facts = {"nfnet_flax": nfnet_flax.__version__, "python": ".".join(platform.python_version_tuple()[:2])}
    return facts | {name: _version(name) for name in _PACKAGES}


def xla_flags() -> dict[str, str]:
    """Name (without dashes) -> value of each flag in `XLA_FLAGS`, or in the file that this variable names."""
    text = os.environ.get("XLA_FLAGS", "")
    if text and not text.lstrip().startswith("-"):
        with contextlib.suppress(OSError):
            text = Path(text).read_text()
    pairs = (word.partition("=") for word in text.split() if word.startswith("-"))
    return {name.lstrip("-"): value or "true" for name, _, value in pairs}


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """Model and all flags of the first processor of this machine, for which the programs of CPUs are compiled."""
    lines = re.findall(
        r"^(?:vendor_id|cpu family|model|model name|flags|Features|CPU \w+)\s*:.*$", _cpu_info(), re.MULTILINE
    )
    return "\n".join([platform.machine(), platform.processor(), *dict.fromkeys(lines)])


def _cpu_info() -> str:
    """What Linux tells of the first processor; empty on other systems."""
    with contextlib.suppress(OSError):
        return Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    return ""


def _cpu_features() -> str:
    text = _cpu_info()
    if not text:
        return platform.processor() or platform.machine()
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, flags=re.MULTILINE)
    flags = line.group(1).split() if line else []
    return " ".join([platform.machine(), *sorted(flag for flag in flags if _INSTRUCTION_SETS.fullmatch(flag))])


def _requested_pool_size() -> int | None:
    for name in ("PJRT_NPROC", "NPROC"):  # in XLA's order
        with contextlib.suppress(ValueError):
            return int(os.environ.get(name, ""))
    return None


def _pool_size() -> int:
    # The threads that XLA really started: the variable may have been set too late.
    num_threads = 0
    with contextlib.suppress(OSError):
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):  # a thread that has just ended
                num_threads += (task / "comm").read_text().strip() == "tf_XLAEigen"
    return num_threads or max(_requested_pool_size() or os.cpu_count() or 1, jax.local_device_count())


def _leave_out_absent_devices() -> None:
    # If a compiler is installed for planning and there is no device of its kind, JAX would try to use one, and print
    # errors.
    has_libtpu = importlib.util.find_spec("libtpu") is not None
    if jax.config.values["jax_platforms"] or not (has_libtpu or _gpu_plugins()):
        return
    has_tpu = has_libtpu and num_available_tpu_chips_and_device_id()[0] > 0
    if not has_tpu and not (_gpu_plugins() and _may_have_gpu()):
        jax.config.update("jax_platforms", "cpu")


def _gpu_plugins() -> bool:
    return importlib.util.find_spec("jax_plugins") is not None


def _may_have_gpu() -> bool:
    """Whether there is a GPU for one of JAX's plugins, as far as files tell."""
    folders = importlib.import_module("jax_plugins").__path__
    plugins = {path.stem for folder in folders for path in Path(folder).iterdir() if not path.name.startswith("_")}
    of_nvidia = all(name.startswith("xla_cuda") for name in plugins)  # what other plugins need is not known
    return not of_nvidia or any(glob.glob(pattern) for pattern in NVIDIA_FILES)


@functools.cache
def _say_once(text: str) -> None:
    warn(text)


@functools.cache
def _memory_is_glibcs() -> bool:
    # If an accelerator's plugin is installed and may be used, it has its own way of allocating memory.
    has_plugin = importlib.util.find_spec("libtpu") is not None or _gpu_plugins()
    return platform.libc_ver()[0] == "glibc" and (not has_plugin or jax.config.values["jax_platforms"] == "cpu")


def keep_freed_memory() -> bool:
    """Makes a process that computes on CPUs keep freed memory for the next step; call it before JAX's backend starts.

    XLA allocates a step's temporary memory, hundreds of megabytes, anew in each step; glibc gets such blocks from the
    operating system and returns them each time, and the page faults took 15% of NFNet-F0's step on two cores
    (`tools/bench_step.py`). After this call all threads share one heap, which is returned when the process ends, or by
    `return_freed_memory`.

    Returns:
      Whether it is now so. False, and nothing has changed, if an accelerator's plugin is installed and `JAX_PLATFORMS`
      does not exclude it, as plugins have their own way of allocating memory, or if the C library is not glibc.
    """
    if not _memory_is_glibcs():
        return False
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # of malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(trim_threshold, -1), mallopt(mmap_max, 0), mallopt(arena_max, 1)])  # -1: the largest there is


def return_freed_memory() -> None:
    """Returns the memory that is free now to the operating system, if `keep_freed_memory` keeps it.

    Call it from time to time, between steps: compilation, checkpoints and evaluations leave gaps between small blocks
    that no step can use. Without these calls NFNet-F0's process grew from 3.5 to 5.9 GB.
    """
    if _memory_is_glibcs():
        ctypes.CDLL(None).malloc_trim(0)


def default_folder() -> Path:
    """Folder of compiled programs, unless JAX is set to another one.

    Raises:
      RuntimeError: the user has no home folder.
    """
    return user_cache("compiled")


def use_compilation_cache() -> Path | None:
    """Keeps compiled programs in the user's cache folder, unless JAX is set to another one.

    `JAX_COMPILATION_CACHE_DIR` chooses another folder and `JAX_ENABLE_COMPILATION_CACHE=false` turns the cache off. If
    the folder cannot be used, one warning says so, and programs are compiled at each start.

    Returns:
      The folder; None if there is no cache.
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
        _say_once(f"no compilation cache ({error}): set JAX_COMPILATION_CACHE_DIR to a writable folder")
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return folder
