"""`nfnet convert`."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Literal

import tyro

from nfnet_flax.cli.usage import USAGE
from nfnet_flax.exit_codes import EXIT_BAD_INPUT, EXIT_DONE


def run(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""

    @dataclasses.dataclass(frozen=True)
    class Haiku:
        file: tyro.conf.Positional[Path]
        """A published file, such as F0_haiku.npz. Nothing in it is executed."""
        model: str
        """Name of the network (`nfnet models`)."""
        out: Path
        """Folder of the result."""
        parameters: Literal["raw", "ema", "unknown"] = "unknown"
        """What the file holds; recorded."""

    @dataclasses.dataclass(frozen=True)
    class Timm:
        file: tyro.conf.Positional[Path]
        """A .safetensors file of timm's dm_nfnet_f0 ... dm_nfnet_f6."""
        model: str
        """Name of the network (`nfnet models`)."""
        out: Path
        """Folder of the result."""
        parameters: Literal["raw", "ema", "unknown"] = "unknown"
        """What the file holds; recorded."""
        timm_form: bool = False
        """The weights were trained with timm: record its exact gelu and its standardization."""

    @dataclasses.dataclass(frozen=True)
    class Run:
        workdir: tyro.conf.Positional[Path]
        """Folder of a run; its newest checkpoint is read."""
        out: Path
        """Folder of the result."""
        parameters: Literal["raw", "ema"] = "ema"
        """Which of the two to write."""

    kinds: dict[str, type[Haiku | Timm | Run]] = {"haiku": Haiku, "timm": Timm, "run": Run}
    if not argv or argv[0] not in kinds:
        helped = bool(argv) and argv[0] in ("-h", "--help")
        print(USAGE, end="", file=sys.stdout if helped else sys.stderr)
        return EXIT_DONE if helped else EXIT_BAD_INPUT
    options = tyro.cli(kinds[argv[0]], args=argv[1:], prog=f"nfnet convert {argv[0]}", description="Convert weights.")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed
    from nfnet_flax.weights.convert import convert_haiku, convert_timm

    match options:
        case Haiku():
            path = convert_haiku(options.file, options.model, options.out, parameters=options.parameters)
        case Timm():
            path = convert_timm(
                options.file,
                options.model,
                options.out,
                parameters=options.parameters,
                timm_form=options.timm_form,
            )
        case Run():
            from nfnet_flax.training.reading import export_weights

            path = export_weights(options.workdir, options.out, parameters=options.parameters)
    print(f"weights: {path}")
    return EXIT_DONE
