"""`nfnet export`."""

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Literal

import tyro

from nfnet_flax.cli.ahead import Code, load_given_code
from nfnet_flax.cli.options import CHECKPOINT, DIR, NAME, PIXELS, parsed
from nfnet_flax.config import ConfigError
from nfnet_flax.exit_codes import EXIT_DONE
from nfnet_flax.progress import COMPUTING_LINE_S, tracking
from nfnet_flax.weights.entries import HostArrays
from nfnet_flax.weights.portable import WeightsInfo


@dataclasses.dataclass(frozen=True)
class Export:
    """Writes a network for use without this package, and compares it with the trained one on random images.

    Everything that can be computed once is folded into plain convolutions. The size of a batch is free, that of the
    images is fixed. Preprocessing and class names are in NAME.onnx.json (or .stablehlo.json, ...), and in ONNX also in
    the file.
    """

    to: Literal["stablehlo", "onnx", "safetensors"]
    """onnx: NAME.onnx (extra `export`). stablehlo: the program NAME.stablehlo for CPU, CUDA and TPU, its weights, and
    NAME_stablehlo.py, which loads both and needs only JAX. safetensors: the folded weights alone, as
    NAME.folded.safetensors."""
    out: Annotated[str, DIR]
    """Folder for the result."""
    weights: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="[FILE|FOLDER|NAME]")]] = None
    """A .safetensors file that `nfnet convert` wrote, a folder with timm's config.json, or a name in a model hub; or
    give --workdir."""
    workdir: Annotated[str | None, DIR] = None
    """Folder of a run whose weights are exported."""
    checkpoint: Annotated[Literal["newest", "best"] | int, CHECKPOINT] = "newest"
    """Which checkpoint of the run: the newest or the best one with undamaged parameters, or the number of a step."""
    parameters: Literal["raw", "ema"] = "ema"
    """Which parameters of the run: as trained, or their moving average."""
    name: Annotated[str | None, NAME] = None
    """Beginning of the names of the files; by default that of the weight file, and `weights` for a run."""
    image_size: Annotated[int | None, PIXELS] = None
    """Height and width of the images, in pixels; by default those of the evaluation that the weights record."""
    input: Literal["normalised", "uint8"] = "normalised"
    """normalised: floats, as `nfnet_flax.preprocess` makes them. uint8: grey levels from 0 to 255, which the exported
    network normalises itself."""
    layout: Literal["nhwc", "nchw"] = "nhwc"
    """Order of the axes of the images. nchw is possible for onnx, and spares its only Transpose."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the weights. onnx also computes in it; stablehlo computes in float32. Results are float32."""
    overwrite: bool = False
    """Replace existing files."""
    code: Code = ()


def run(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    options = parsed(Export, argv, "nfnet export")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the comparison of a few images needs no accelerator
    from nfnet_flax.export import ExportOptions, export_arrays

    load_given_code(argv)
    how = ExportOptions(
        to=options.to,
        image_size=options.image_size,
        input=options.input,
        layout=options.layout,
        dtype=options.dtype,
    )
    source, name, info, arrays = _source(options)
    with tracking(f"exporting to {options.to}", first_line_s=COMPUTING_LINE_S):
        written = export_arrays(
            source,
            info,
            arrays,
            options.out,
            name=name if options.name is None else options.name,
            options=how,
            overwrite=options.overwrite,
        )
    print(f"{options.to}: {written.comparison}")
    for path in written.files:
        print(f"written: {path}")
    return EXIT_DONE


def _source(options: Export) -> tuple[str, str, WeightsInfo, HostArrays]:
    """The weights that the options name: description for messages, name, and what is known of them."""
    if (options.weights is None) == (options.workdir is None):
        raise ConfigError("what to export: give either weights, or --workdir DIR for a run")
    if options.workdir is not None:
        from nfnet_flax.training.reading import Run, stored_weights

        info, arrays = stored_weights(Run(options.workdir), options.parameters, options.checkpoint)
        return info.source, "weights", info, arrays
    from nfnet_flax.weights import open_weights

    assert options.weights is not None
    if (options.checkpoint, options.parameters) != ("newest", "ema"):
        raise ConfigError("checkpoint and parameters choose weights of a run: give them together with --workdir")
    info, arrays = open_weights(options.weights)
    return f"weights {options.weights!r}", Path(options.weights).name.removesuffix(".safetensors"), info, arrays
