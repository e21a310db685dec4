"""Writes, compares and publishes an export: files get their names only when all of them are complete and compared."""

import dataclasses
import os
import shutil
from pathlib import Path

from nfnet_flax.config import ConfigError, require
from nfnet_flax.export.description import description, write_description
from nfnet_flax.export.folded_weights import SUFFIX, call_folded, write_folded
from nfnet_flax.export.options import ExportOptions, Target, check_installed, network_for
from nfnet_flax.export.verify import Comparison, compare
from nfnet_flax.paths import local_path
from nfnet_flax.weights.entries import HostArrays
from nfnet_flax.weights.portable import WeightsInfo

_TOLERANCES: dict[tuple[Target, str], float] = {
    ("onnx", "float32"): 1e-4,
    ("stablehlo", "float32"): 1e-5,
    ("safetensors", "float32"): 1e-5,
    ("onnx", "float16"): 2e-2,
    ("stablehlo", "float16"): 1e-2,
    ("safetensors", "float16"): 1e-2,
}
"""Largest difference from the trained network, as a share of the largest result."""
_ENDINGS: dict[Target, str] = {"onnx": ".onnx", "stablehlo": ".stablehlo", "safetensors": SUFFIX}
"""Ending of the main file."""


@dataclasses.dataclass(frozen=True)
class Export:
    """What an export wrote."""

    path: Path
    """The main file."""
    files: tuple[Path, ...]
    """All files, the main one included."""
    comparison: Comparison
    """How far it is from the trained network."""


def export_arrays(
    source: str,
    info: WeightsInfo,
    arrays: HostArrays,
    out: str | os.PathLike[str],
    *,
    name: str,
    options: ExportOptions,
    overwrite: bool,
) -> Export:
    """Exports a network of given weights; see `export_model`.

    Args:
      source: description of where the weights come from, for the message of an error.
      info: description of the weights.
      arrays: our name -> array.
      out: folder for the files.
      name: beginning of their names.
      options: how the network is exported.
      overwrite: whether to replace existing files.
    """
    folder = local_path("out", out)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out = {os.fspath(out)!r}: is a file: give the folder for the result")
    require(name == Path(name).name and name not in ("", ".", ".."), "name", name, "give the name of a file")
    main = f"{name}{_ENDINGS[options.to]}"
    _check_free(folder / main, overwrite=overwrite)
    if options.to == "onnx":
        check_installed("onnx", "onnxruntime")
    exported = network_for(source, info, arrays, options)
    partial = folder / f".{main}.{os.getpid()}.partial"
    try:
        partial.mkdir(parents=True)
        facts = description(exported, options)
        if options.to == "onnx":
            from nfnet_flax.export.onnx_file import call_onnx, write_onnx

            names = write_onnx(partial, name, exported, options, facts)
            call, with_what = call_onnx(partial / main), "onnxruntime"
        elif options.to == "stablehlo":
            from nfnet_flax.export.stablehlo import call_stablehlo, write_stablehlo

            names = write_stablehlo(partial, name, exported, options, facts)
            call, with_what = call_stablehlo(partial / main), "JAX"
        else:
            names = write_folded(partial, name, exported, options, facts)
            call, with_what = call_folded(partial / main), "JAX"
        tolerance = _TOLERANCES[options.to, options.dtype]
        comparison = compare(call, exported, options, tolerance=tolerance, with_what=with_what)
        write_description(partial / f"{main}.json", facts | {"compared": str(comparison)})
        files = _publish(partial, folder, [*(n for n in names if n != main), f"{main}.json", main], overwrite)
    except OSError as error:
        raise ConfigError(f"{folder / main} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Export(files[-1], tuple(files), comparison)


def _check_free(path: Path, *, overwrite: bool) -> None:
    """Raises `ConfigError` unless a file may be written at a path."""
    if path.is_dir() or (path.exists() and not overwrite):
        raise ConfigError(
            f"{str(path)!r} exists already: give another folder or name (--name, in Python name=), or replace it "
            "(--overwrite, in Python overwrite=True; a folder is never replaced)"
        )


def _publish(partial: Path, folder: Path, names: list[str], overwrite: bool) -> list[Path]:
    """Moves complete files to their place, the main one last."""
    paths = [folder / name for name in names]
    for path in paths:
        _check_free(path, overwrite=overwrite)
    for path in paths:
        with (partial / path.name).open("rb") as file:
            os.fsync(file.fileno())
        (partial / path.name).replace(path)
    return paths
