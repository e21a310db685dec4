"""Paths that users give to commands, to the Python API and in recipes: checked and resolved here, once."""

import contextlib
import dataclasses
import glob
import os
import re
from pathlib import Path

from nfnet_flax.config import ConfigError, require
from nfnet_flax.storage.url import bucket_url

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""Beginning of a URL such as `gs://bucket/run`; `Path` turns this one into `gs:/bucket/run`."""
_HUB = re.compile(r"(?:hf[-_]hub:(?P<any>[\w.-]+/[\w.-]+)|(?P<timm>timm/[\w.-]+))(?:@(?P<revision>[\w./-]+))?")
"""Names of weights in a model hub."""


@dataclasses.dataclass(frozen=True)
class HubName:
    """Name of weights in a model hub, such as `timm/eca_nfnet_l0.ra2_in1k` or `hf-hub:ORGANIZATION/NAME@REVISION`."""

    repository: str
    """Organization and name."""
    revision: str | None = None
    """Branch, tag or commit; None: the newest."""

    def __str__(self) -> str:
        name = self.repository if self.repository.startswith("timm/") else f"hf-hub:{self.repository}"
        return name if self.revision is None else f"{name}@{self.revision}"


def hub_name(value: str | os.PathLike[str]) -> HubName | None:
    """The weights in a model hub that a value names; None if it names a file or folder.

    These are `timm/NAME`, unless it is the path of a file or folder that exists or ends in `.safetensors`, and
    `hf-hub:ORGANIZATION/NAME`, both optionally with `@REVISION`.
    """
    found = _HUB.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        return None
    if found["timm"] is not None and (found["timm"].endswith(".safetensors") or os.path.lexists(str(value))):
        return None
    return HubName(found["any"] or found["timm"], found["revision"])


def check_path(field: str, value: str | os.PathLike[str]) -> None:
    """Refuses a value that cannot be the path of a local file or folder; does not access the disk.

    Raises:
      ConfigError: it is not a text, is empty, is a URL, or contains a NUL character; the message names the field, the
        value and the remedy.
    """
    require(isinstance(value, str | os.PathLike), field, value, "give a path, as text or as pathlib.Path")
    text = os.fspath(value)
    if not text:
        raise ConfigError(f"{field} = '': is empty (a variable that is not set?): give a path; . is the current folder")
    if "\0" in text:
        raise ConfigError(f"{field} = {text!r}: contains a NUL character, which no path can")
    if _URL.match(text):
        raise ConfigError(
            f"{field} = {text!r}: is a URL, and this must be a path of this machine: copy the files here, or mount the "
            f"bucket (a folder that is really named so: ./{text})"
        )


def check_place(field: str, value: str | os.PathLike[str]) -> None:
    """Refuses a value that can neither be a path of this machine nor a URL of a bucket; accesses neither.

    Raises:
      ConfigError: as for `check_path`, or a URL of a kind that is not supported.
    """
    if bucket_url(field, value) is None:
        check_path(field, value)


def local_path(field: str, value: str | os.PathLike[str]) -> Path:
    """The absolute path that a user means, without `~`, `..` and symbolic links; it need not exist.

    Args:
      field: name of the value in a message, such as `workdir`.
      value: the path as the user gave it.

    Raises:
      ConfigError: as for `check_path`; or the home folder is unknown, or symbolic links form a loop.
    """
    check_path(field, value)
    try:
        path = Path(value).expanduser().resolve()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):  # it need not exist
            path.stat()  # raises for a loop of symbolic links, which `resolve` does not do from Python 3.13 on
        return path
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder; before Python 3.13 also for a loop
        raise ConfigError(f"{field} = {os.fspath(value)!r}: {error}: give another path") from error


def is_missing(path: Path) -> bool:
    """Whether there is certainly nothing at a path; false also if the system does not say it (no permission)."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def escaped(pattern: Path) -> str:
    """A pattern whose folders are taken literally where a folder of exactly that name exists, such as `data [v2]`."""
    place, *names = pattern.parts
    while names and os.path.lexists(os.path.join(place, names[0])):
        place = os.path.join(place, names.pop(0))
    return os.path.join(glob.escape(place), *names)


def user_cache(kind: str) -> Path:
    """Folder in which the package keeps files of a kind that can be made again.

    Raises:
      RuntimeError: the user has no home folder.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nfnet_flax" / kind


def check_not_input(field: str, target: Path, given: str | os.PathLike[str]) -> None:
    """Raises `ConfigError` if a file that is to be written is an input of the same command, or lies directly in it.

    Args:
      field: name of the output in the message.
      target: the output, as `local_path` gives it.
      given: the input as the user gave it: a file, a folder, the URL of a bucket, or a name in a model hub.
    """
    is_local = hub_name(given) is None and bucket_url(field, given) is None
    if is_local and local_path(field, given) in (target, target.parent):
        place = "is also" if local_path(field, given) == target else "lies in the folder of"
        raise ConfigError(f"{field} = {str(target)!r}: {place} what the command reads: give another place")


def check_target(field: str, value: str, *, overwrite: bool) -> Path:
    """The path of a file that may be written, checked before any work is done.

    Raises:
      ConfigError: it is a folder, exists and must not be replaced (`overwrite`), or there is no folder for it.
    """
    path = local_path(field, value)
    if path.is_dir():
        raise ConfigError(f"{field} = {value!r}: is a folder: give the name of a file")
    if path.exists() and not overwrite:
        raise ConfigError(f"{field} = {value!r}: exists already: give another name, or replace it by --overwrite")
    if not path.parent.is_dir():
        raise ConfigError(f"{field} = {value!r}: there is no folder {str(path.parent)!r}: make it, or give another one")
    return path


def made_folder(field: str, value: str) -> Path:
    """The path of a folder for results, which is made if it is not there.

    Raises:
      ConfigError: as for `local_path`; or it is a file, or cannot be made.
    """
    path = local_path(field, value)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{field} = {value!r}: cannot be made ({error.strerror}): give another folder") from error
    return path


def run_folder(field: str, value: str | os.PathLike[str]) -> Path:
    """`local_path` of the folder of a run, whose arrays TensorStore writes and reads.

    Raises:
      ConfigError: as for `local_path`; or TensorStore would use another folder: it takes a backslash for a slash, on
        every system, and supports only names in UTF-8.
    """
    path = local_path(field, value)
    given = os.fspath(value)
    where = "" if str(path) == given else f" (which is {str(path)!r})"
    if "\\" in str(path):
        raise ConfigError(
            f"{field} = {given!r}{where}: holds a backslash, which the library that stores arrays takes for a slash: "
            "rename the folder, or give another one"
        )
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{field} = {given!r}{where}: is not UTF-8, so the library that stores arrays cannot name it: rename the "
            "folder, or give another one"
        ) from error
    return path
