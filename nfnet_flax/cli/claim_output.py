"""What the commands of `nfnet claim` have in common: how they end."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from nfnet_flax.config import ConfigError
from nfnet_flax.json_files import write_named
from nfnet_flax.output import only_results_follow

if TYPE_CHECKING:
    from pathlib import Path

    from nfnet_flax.claims.evidence import Evidence


class Picture(NamedTuple):
    """A picture of the evidence."""

    name: str
    """Name of its file."""
    draw: Callable[[], bytes]
    """Makes the content of the file."""


def check_picture() -> None:
    """Checks, before any work is done, that Matplotlib can draw.

    Raises:
      ConfigError: it is missing, or cannot be imported.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise _cannot_draw(error) from error


def conclude(found: "Evidence", folder: "Path", text: str, picture: Picture | None = None) -> None:
    """Writes the evidence, prints the text and then draws: a picture that fails takes nothing else with it.

    Raises:
      ConfigError: a file cannot be written, or Matplotlib cannot be imported.
    """
    from nfnet_flax.claims.evidence import write_evidence

    written = [write_evidence(found, folder)]
    only_results_follow()
    print(f"{text}\n", flush=True)
    try:
        if picture is not None:
            write_named("out", folder / picture.name, _drawn(picture))
            written.append(folder / picture.name)
    finally:
        print("\n".join(f"written: {path}" for path in written), flush=True)


def _drawn(picture: Picture) -> bytes:
    try:
        return picture.draw()
    except ImportError as error:
        raise _cannot_draw(error) from error


def _cannot_draw(error: ImportError) -> ConfigError:
    reason = " ".join(str(error).split())
    remedy = "pip install 'nfnet_flax[plots]', or give --no-picture"
    return ConfigError(f"picture = True: Matplotlib cannot be imported ({reason}): {remedy}")
