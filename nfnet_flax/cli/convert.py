"""`nfnet convert`."""

import dataclasses
import os
import sys
from typing import Annotated, Literal

import tyro

from nfnet_flax.cli.ahead import Code, load_given_code
from nfnet_flax.cli.options import CHECKPOINT, DIR, FILE, NAME, WEIGHTS, parsed
from nfnet_flax.config import ConfigError
from nfnet_flax.exit_codes import EXIT_DONE


@dataclasses.dataclass(frozen=True)
class Haiku:
    """Converts a published pickle file to MODEL.safetensors."""

    file: tyro.conf.Positional[Annotated[str, FILE]]
    """A published file, such as F0_haiku.npz. Code in it is not executed."""
    model: Annotated[str, NAME]
    """Name of the network, as `nfnet models` lists it."""
    out: Annotated[str, DIR]
    """Folder for the result."""
    parameters: Literal["raw", "ema", "unknown"] = "unknown"
    """Which parameters the file holds: as trained, or their moving average. The result records it."""
    overwrite: bool = False
    """Replace an existing file."""


@dataclasses.dataclass(frozen=True)
class Timm:
    """Converts weights of timm to MODEL.safetensors."""

    file: tyro.conf.Positional[Annotated[str, WEIGHTS]]
    """A .safetensors file of timm's dm_nfnet_f0 ... dm_nfnet_f6, or of its own networks, such as eca_nfnet_l0; a folder
    with config.json and model.safetensors; or a name in a model hub, such as timm/eca_nfnet_l0.ra2_in1k."""
    out: Annotated[str, DIR]
    """Folder for the result."""
    model: Annotated[str | None, NAME] = None
    """Name of the network, as `nfnet models` lists it. A file needs it; a folder and a hub say it themselves."""
    parameters: Literal["raw", "ema", "unknown"] = "unknown"
    """Which parameters the file holds: as trained, or their moving average. The result records it."""
    timm_form: bool = False
    """Record timm's exact gelu and its weight standardization, for weights of dm_nfnet_f0 ... that were trained with
    timm."""
    overwrite: bool = False
    """Replace an existing file."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Writes the weights of a run as weights.safetensors, or as a folder for a model hub."""

    workdir: tyro.conf.Positional[Annotated[str, DIR]]
    """Folder of a run."""
    out: Annotated[str, DIR]
    """Folder for the result."""
    parameters: Literal["raw", "ema"] = "ema"
    """Which parameters to write: as trained, or their moving average."""
    checkpoint: Annotated[Literal["newest", "best"] | int, CHECKPOINT] = "newest"
    """Which checkpoint to read: the newest or the best one with undamaged parameters, or the number of a step."""
    to: Literal["file", "hub-folder"] = "file"
    """What to write: weights.safetensors; or model.safetensors with timm's names, a config.json that timm reads, and
    README.md with a description of the run."""
    overwrite: bool = False
    """Replace existing files."""
    code: Code = ()


_KINDS: dict[str, type[Haiku | Timm | Run]] = {"haiku": Haiku, "timm": Timm, "run": Run}


def run(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    if argv and argv[0] in ("-h", "--help"):
        for name in _KINDS:
            _help(name)
        return EXIT_DONE
    if not argv or argv[0] not in _KINDS:
        given = repr(argv[0]) if argv else "missing"
        raise ConfigError(
            f"what to convert is {given}: give {', '.join(_KINDS)}, as in nfnet convert run DIR --out DIR"
        )
    options = parsed(_KINDS[argv[0]], argv[1:], f"nfnet convert {argv[0]}")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed
    from nfnet_flax.weights.convert import convert_haiku, convert_timm

    match options:
        case Haiku():
            path = convert_haiku(
                options.file,
                options.model,
                options.out,
                parameters=options.parameters,
                overwrite=options.overwrite,
            )
        case Timm():
            path = convert_timm(
                options.file,
                options.model,
                options.out,
                parameters=options.parameters,
                timm_form=options.timm_form,
                overwrite=options.overwrite,
            )
        case Run():
            from nfnet_flax.training.reading import export_weights
            from nfnet_flax.training.sharing import write_hub_folder

            load_given_code(argv)
            write = export_weights if options.to == "file" else write_hub_folder
            path = write(
                options.workdir,
                options.out,
                parameters=options.parameters,
                checkpoint=options.checkpoint,
                overwrite=options.overwrite,
            )
    print(f"weights: {path}")
    return EXIT_DONE


def _help(name: str) -> None:
    try:
        parsed(_KINDS[name], ["--help"], f"nfnet convert {name}")
    except SystemExit:  # raised by tyro after it printed help
        sys.stdout.write("\n")
