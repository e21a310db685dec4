"""A text about a problem to paste into a public issue: versions, machine, settings, findings, fields of the recipe."""

import dataclasses
import importlib.metadata
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nfnet_flax
from nfnet_flax.config import field_hints, members_of
from nfnet_flax.doctor import describe
from nfnet_flax.doctor.findings import Finding
from nfnet_flax.doctor.machine import usable_cpus
from nfnet_flax.doctor.private import is_public, without_private
from nfnet_flax.open_config import is_own, type_name
from nfnet_flax.units import human_size

if TYPE_CHECKING:
    from nfnet_flax.recipe import Recipe

_PACKAGES = (
    *("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "clu", "numpy"),
    *("tensorflow", "tensorflow-cpu", "tensorflow-datasets", "tensorboard", "tensorstore", "array-record"),
    *("opencv-python-headless", "pillow", "simplejpeg", "pyarrow", "gcsfs", "s3fs", "safetensors", "tyro"),
)
_ACCELERATOR = re.compile(
    r"jax-(?:cuda|rocm|metal)[\w-]*|nvidia-(?:cudnn|nccl|cublas|cuda-nvcc|cuda-runtime)(?:-cu\d+)?"
)
"""Packages that let JAX use GPUs; their names have the version of CUDA."""
_VARIABLE = re.compile(
    r"(?:JAX|XLA|LIBTPU|NFNET|TF)_\w+|SLURM_(?:NTASKS|NNODES|NPROCS|PROCID|LOCALID|NODEID|CPUS_PER_TASK|GPUS_ON_NODE"
    r"|NTASKS_PER_NODE)|OMPI_COMM_WORLD_(?:RANK|SIZE)|TPU_(?:WORKER_ID|ACCELERATOR_TYPE)|CUDA_VISIBLE_DEVICES"
    r"|NVIDIA_TF32_OVERRIDE|(?:PJRT_)?NPROC|OMP_NUM_THREADS"
)
_FLAG = re.compile(r"(--?\w+)(?:=(.*))?", re.DOTALL)
_BEGINNING = """<!-- made by nfnet doctor --report. Private things were replaced by placeholders such as <path 1>; the
same placeholder stands for the same thing. Read it before you publish it: no rule finds everything. -->"""


def report(
    found: Sequence[tuple[str, list[Finding]]],
    verdict: str,
    recipe: "Recipe | None",
    *,
    given: Sequence[str | None] = (),
) -> str:
    """The text, in Markdown.

    Args:
      found: what `examine` yielded.
      verdict: the last line of what the doctor says.
      recipe: the recipe that was examined, if there is one.
      given: paths that the user gave, which are replaced wherever they are named.
    """
    versions, settings = _versions(), _settings(os.environ)
    fields, chosen = ([], []) if recipe is None else _fields(recipe)
    findings = [describe(topic, lines) for topic, lines in found]
    text = "\n".join(
        [
            *(_BEGINNING, "", "### Versions", "", *_block(f"{name} {version}" for name, version in versions.items())),
            *("### Machine", "", *_block(_machine())),
            *("### Environment variables", "", *_block(settings or ["none that matter here"])),
            *("### What nfnet doctor says", "", *_block([*findings, verdict])),
            *("### Recipe", "", *_block(fields or ["none was given or found"])),
        ]
    )
    words = {word for line in fields for word in re.findall(r"[A-Za-z_]\w+", line.partition(" = ")[0])}
    words |= {line.partition(" = ")[2] for line in fields if line[-1:].isalpha()}  # names of the package's own classes
    places = [place for place in (*given, os.getcwd()) if place]
    return without_private(text, places=places, names=chosen, keep={*versions.values(), *words}).rstrip()


def _block(lines: Iterator[str] | Sequence[str]) -> list[str]:
    # A message that quotes Markdown must not end the block.
    return ["```text", *(line.replace("```", "'''") for line in lines), "```", ""]


def _versions() -> dict[str, str]:
    """Name -> version of everything that is installed and may matter; nothing is imported for it."""
    installed: dict[str, str] = {}
    for package in importlib.metadata.distributions():
        installed.setdefault(str(package.name).lower().replace("_", "-"), str(package.version))
    names = [*_PACKAGES, *sorted(name for name in installed if _ACCELERATOR.fullmatch(name))]
    own = {"nfnet_flax": nfnet_flax.__version__, "Python": platform.python_version()}
    return own | {name: installed[name] for name in names if name in installed}


def _machine() -> Iterator[str]:
    # Of the kernel's name only the numbers: what follows may be chosen by its owner.
    kernel = re.match(r"[\d.]*\d", platform.release())
    library = " ".join(filter(None, platform.libc_ver()))
    yield f"{platform.system()} {kernel[0] if kernel else ''} {platform.machine()}, {library or 'unknown C library'}"
    yield f"{usable_cpus()} of {os.cpu_count()} CPUs, {human_size(_memory_bytes())} of memory"


def _memory_bytes() -> int:
    """Memory of the machine, or what its container may use, if that is less."""
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(size, int(text)) if text.isdecimal() else size


def _settings(environment: Mapping[str, str]) -> list[str]:
    """Variables on which a run may depend; values only where they are numbers, common words, or flags with these."""
    return [f"{name}={_shown(environment[name])}" for name in sorted(environment) if _VARIABLE.fullmatch(name)]


def _shown(value: str) -> str:
    words = []
    for word in value.split():
        flag = _FLAG.fullmatch(word)
        name, content = (flag[1], flag[2]) if flag else ("", word)
        is_shown = content is None or (is_public(content) and "/" not in content)
        words.append(
            name + ("=" if flag and content is not None else "") + ((content or "") if is_shown else "<value>")
        )
    return " ".join(words)


def _fields(recipe: "Recipe") -> tuple[list[str], list[str]]:
    """Lines with the fields of a recipe, and the texts in it that the user chose freely."""
    lines: list[str] = []
    chosen: list[str] = []

    def add(path: str, value: Any, hint: Any, default: Any) -> None:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            kind = type_name(type(value))
            if is_own(type(value)):
                chosen.extend([kind, *kind.split(":")])
            if path:
                lines.append(f"{path} = {kind!r} (own code)" if is_own(type(value)) else f"{path} = {kind}")
            hints = field_hints(type(value))
            for field in dataclasses.fields(value):
                inner = getattr(value, field.name)
                add(f"{path}.{field.name}".lstrip("."), inner, hints.get(field.name), field.default)
        elif isinstance(value, tuple) and any(
            isinstance(item, str) or dataclasses.is_dataclass(item) for item in value
        ):
            for index, item in enumerate(value):
                add(f"{path}.{index}", item, None, default[index] if _has(default, index) else None)
        elif isinstance(value, str) and value != default and not _is_choice(value, hint):
            chosen.append(value)
            lines.append(f"{path} = {value!r}")
        else:
            lines.append(f"{path} = {value}")

    add("", recipe, None, None)
    return lines, chosen


def _has(default: Any, index: int) -> bool:
    return isinstance(default, tuple) and index < len(default)


def _is_choice(value: str, hint: Any) -> bool:
    """Whether a value is one of those that the type of its field lists, so that nobody made it up."""
    return any(value in getattr(member, "__args__", ()) for member in members_of(hint))
