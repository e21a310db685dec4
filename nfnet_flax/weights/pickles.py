"""Reads the published weight files, pickles of `{module: {name: array}}`, without running code in them."""

import collections
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from nfnet_flax.config import ConfigError
from nfnet_flax.paths import local_path
from nfnet_flax.weights.files import recognize
from nfnet_flax.weights.haiku import Tree


class _FromBuffer:
    """NumPy's function that reads protocol-5 buffers. A pickle cannot set attributes on this object, as it could on the
    function itself."""

    __slots__ = ()

    def __call__(self, *arguments: Any) -> Any:
        return np._core.numeric._frombuffer(*arguments)  # type: ignore[attr-defined]


class _EncodeLatin1:
    """Bytes as pickle protocols before 3 write them: `_codecs.encode(text, "latin1")`; no other codec is allowed."""

    __slots__ = ()

    def __call__(self, text: str, encoding: str) -> bytes:
        if not isinstance(text, str) or encoding != "latin1":
            raise ConfigError(f"it asks for _codecs.encode({text!r:.40}, {encoding!r}), which is not needed for arrays")
        return text.encode("latin1")


# The only names that arrays and plain containers need. Any other name in a pickle could run code.
_ADMITTED: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _EncodeLatin1(),
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
for _module in ("numpy.core", "numpy._core"):  # before and after NumPy 2
    _ADMITTED[f"{_module}.multiarray", "_reconstruct"] = np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    _ADMITTED[f"{_module}.multiarray", "scalar"] = np._core.multiarray.scalar  # type: ignore[attr-defined]
    _ADMITTED[f"{_module}.numeric", "_frombuffer"] = _FromBuffer()


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in _ADMITTED:
            raise ConfigError(
                f"it asks for {module_name}.{global_name}: only NumPy arrays and plain containers are read, "
                "because anything else could run code. Nothing was executed. Do not load this file by other means"
            )
        return _ADMITTED[module_name, global_name]

    def persistent_load(self, pid: Any) -> Any:
        raise ConfigError(f"it refers to an object outside the file ({pid!r}): only arrays and containers are read")


def load_haiku_file(path: str | Path) -> Tree:
    """Reads a published file such as `F0_haiku.npz`.

    Raises:
      ConfigError: the file cannot be read, is damaged, holds something else than `{module: {name: array}}`, or asks for
        any name outside NumPy's arrays and plain containers (it would run code); nothing in it was executed.
    """

    def refuse(reason: str) -> ConfigError:
        return ConfigError(f"weights file {str(path)!r} is refused: {reason}")

    file_path = local_path("weights file", path)
    try:
        with file_path.open("rb") as file:
            if file.read(4) == b"PK\x03\x04":
                raise refuse("it is a real .npz archive, not a pickle as the published files are")
            file.seek(0)
            tree = _ArraysOnly(file).load()
    except OSError as error:
        raise refuse(f"it cannot be read ({error.strerror})") from error
    except ConfigError as error:
        raise error if str(error).startswith("weights file") else refuse(str(error)) from error
    except Exception as error:  # a damaged pickle raises almost anything
        reason = f"it is damaged or not a pickle ({type(error).__name__}: {error})"
        kind = recognize(file_path)
        raise refuse(reason if kind is None or "pickle" in kind else f"it {kind}") from error
    if not isinstance(tree, dict) or not tree or not all(_is_module(leaves) for leaves in tree.values()):
        raise refuse("it holds something else than {module: {name: array}}")
    return {
        str(module): {str(name): np.asarray(value) for name, value in leaves.items()} for module, leaves in tree.items()
    }


def _is_module(leaves: Any) -> bool:
    return isinstance(leaves, dict) and all(isinstance(value, np.ndarray | np.generic) for value in leaves.values())
