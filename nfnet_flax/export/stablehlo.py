"""Writes a network as a StableHLO program by `jax.export`, with a loader that needs only JAX.

The weights are arguments of the program, in a file of NumPy's beside it: constants would be limited to 2 GiB, compilers
take long to fold them, and each platform's part of the program would be searched for them.
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from nfnet_flax.export.options import ExportedNetwork, ExportOptions, rounded_arrays
from nfnet_flax.export.verify import Call
from nfnet_flax.models.convolution import for_platform
from nfnet_flax.models.params import Params, merge, split
from nfnet_flax.weights.entries import arrays_of

PLATFORMS = ("cpu", "cuda", "tpu")
_LOADER = '''\
"""Loads the program that lies beside this file, as `predict`: images -> {output}. It needs only JAX."""
from pathlib import Path
import jax, numpy as np
from jax import export

_path = Path(__file__).parent / {file!r}
_program = export.deserialize(bytearray(_path.read_bytes()))
_weights = jax.device_put(dict(np.load(f"{{_path}}.npz")))
_call = jax.jit(_program.call)

def predict(images):  # {shape} {dtype}: {values}
    return _call(_weights, images)
'''


def write_stablehlo(
    folder: Path, name: str, exported: ExportedNetwork, options: ExportOptions, facts: dict[str, dict[str, object]]
) -> list[str]:
    """Writes `NAME.stablehlo`, its weights `NAME.stablehlo.npz` and its loader `NAME_stablehlo.py`; returns the
    names."""
    arrays = rounded_arrays(arrays_of(exported.folded), options.dtype)
    empty = {key: value for key, value in arrays_of(exported.folded).items() if not value.size}
    graphdef, _, _ = split(exported.folded)
    mean, std = exported.channel_statistics if options.input == "uint8" else (None, None)

    def run(weights: Params, images: jax.Array) -> jax.Array:
        images = images.astype(jnp.float32)
        if mean is not None and std is not None:
            images = (images - mean) / std
        wide = {key: value.astype(jnp.float32) for key, value in weights.items()}
        everything = wide | {key: jnp.asarray(value) for key, value in empty.items()}
        result: jax.Array = merge(graphdef, everything, {})(images)
        return result

    def for_each_platform(weights: Params, images: jax.Array) -> jax.Array:
        # The forms of convolutions for CPUs and for accelerators differ (`models/convolution.py`).
        def on(platform: str) -> jax.Array:
            with for_platform(platform):
                return run(weights, images)

        result: jax.Array = jax.lax.platform_dependent(cpu=lambda: on("cpu"), default=lambda: on("gpu"))
        return result

    (batch,) = export.symbolic_shape("batch")
    size, channels = exported.image_size, exported.info.model.in_channels
    images = jax.ShapeDtypeStruct((batch, size, size, channels), jnp.dtype(str(facts["input"]["dtype"])))
    shapes = {key: jax.ShapeDtypeStruct(value.shape, value.dtype) for key, value in arrays.items()}
    program = export.export(jax.jit(for_each_platform), platforms=PLATFORMS)(shapes, images)
    path = folder / f"{name}.stablehlo"
    path.write_bytes(program.serialize())
    np.savez(folder / f"{path.name}.npz", **arrays)  # type: ignore[arg-type]
    given = facts["input"]
    loader = folder / f"{_module_name(name)}_stablehlo.py"
    loader.write_text(
        _LOADER.format(
            file=path.name,
            output=facts["output"]["name"],
            shape=str(given["shape"]).replace("'", ""),
            dtype=given["dtype"],
            values=given["values"],
        )
    )
    return [f"{path.name}.npz", loader.name, path.name]


def _module_name(name: str) -> str:
    """A name that Python can import."""
    known = re.sub(r"\W", "_", name)
    return f"_{known}" if known[:1].isdecimal() else known


def call_stablehlo(path: Path) -> Call:
    """The exported program on the default device, loaded as its loader does."""
    program = export.deserialize(bytearray(path.read_bytes()))
    weights = jax.device_put(dict(np.load(f"{path}.npz")))
    compiled = jax.jit(program.call)
    return lambda images: np.asarray(compiled(weights, images))
