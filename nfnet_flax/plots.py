"""Files of pictures that Matplotlib draws (extra `plots`)."""

import importlib.util
import io
from pathlib import PurePath
from typing import TYPE_CHECKING, Literal

from nfnet_flax.config import ConfigError, require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Kind = Literal["png", "svg"]
_KINDS: dict[str, Kind] = {".png": "png", ".svg": "svg"}
"""End of a file's name -> kind of picture."""


def check_matplotlib(field: str, value: str) -> None:
    """Checks, before any work is done, that Matplotlib is installed.

    Raises:
      ConfigError: it is not.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f"{field} = {value!r}: pip install 'nfnet_flax[plots]' (Matplotlib)")


def picture_kind(field: str, value: str) -> Kind:
    """The kind of picture that the name of a file asks for.

    Raises:
      ConfigError: it asks for none, or Matplotlib is missing.
    """
    end = PurePath(value).suffix.lower()
    require(end in _KINDS, field, value, f"is no picture: give a name that ends in {' or '.join(_KINDS)}")
    check_matplotlib(field, value)
    return _KINDS[end]


def picture_file(figure: "Figure", kind: Kind) -> bytes:
    """The content of a file with a figure; the same figure is the same file."""
    import matplotlib

    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "nfnet_flax"}):
        figure.savefig(file, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return file.getvalue()
