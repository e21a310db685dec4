"""Networks for use without this package: StableHLO programs, ONNX files, and folded weights alone."""

import os
from pathlib import Path

from nfnet_flax.export.folded_weights import load_folded
from nfnet_flax.export.options import ExportOptions, InputName, LayoutName, StoredDtype, Target
from nfnet_flax.export.writing import Export, export_arrays
from nfnet_flax.weights import open_weights

__all__ = ["Export", "ExportOptions", "export_arrays", "export_model", "load_folded"]


def export_model(
    weights: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    to: Target,
    name: str | None = None,
    image_size: int | None = None,
    input: InputName = "normalised",
    layout: LayoutName = "nhwc",
    dtype: StoredDtype = "float32",
    overwrite: bool = False,
) -> Export:
    """Exports the network of a weight file, folded, and compares the result with the network on random images.

    Args:
      weights: what `open_weights` takes: a weight file, a folder with timm's `config.json`, or a name in a model hub.
      out: folder for the files.
      to: "onnx": NAME.onnx; "stablehlo": NAME.stablehlo with NAME.stablehlo.npz (weights) and NAME_stablehlo.py
        (loader); "safetensors": NAME.folded.safetensors. Each with a .json of the same name that describes it.
      name: beginning of the files' names; None: that of the weight file.
      image_size: height and width of the images, in pixels; None: as the weights record it.
      input: what the images are; see `ExportOptions`.
      layout: order of their axes; see `ExportOptions`.
      dtype: type of the weights; see `ExportOptions`.
      overwrite: whether to replace existing files.

    Raises:
      ConfigError: the weights cannot be read, an option is wrong, the size of the images is not known, a package is
        missing, a file exists already, ONNX is asked for a family of a user's own, or the comparison fails.
      HubUnreachable: the model hub cannot be reached.
    """
    options = ExportOptions(to=to, image_size=image_size, input=input, layout=layout, dtype=dtype)
    info, arrays = open_weights(weights)
    name = Path(weights).name.removesuffix(".safetensors") if name is None else name
    source = f"weights {str(weights)!r}"
    return export_arrays(source, info, arrays, out, name=name, options=options, overwrite=overwrite)
