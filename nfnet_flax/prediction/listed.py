"""Text files that name images: a file, folder or pattern in each line."""

import codecs
import glob
import itertools
import os
import stat
import sys
from pathlib import Path

from nfnet_flax.config import ConfigError, require
from nfnet_flax.data.decode import is_image_name
from nfnet_flax.paths import check_path

STANDARD_INPUT = "-"
_REMEDY = "give a UTF-8 text with a file, folder or pattern in each line"
_START_BYTES = 4096
"""How much of a file is read to find out whether it is a list."""


def read_list(file: str) -> list[tuple[str, str]]:
    """The places in a list, each with what names it in a message, such as `images_from = 'list.txt': line 3`.

    Blank lines are left out. Spaces at the ends of a line, and the line ends of Windows, belong to a name only if there
    is such a file. Names need not be UTF-8, as files may have any bytes as names.

    Args:
      file: path of the text file; `-` is the standard input.

    Raises:
      ConfigError: it cannot be read, is no text or has no names, or a name that is not UTF-8 does not exist.
    """
    content = _content(file)
    require(b"\0" not in content, "images_from", file, f"is not a text of this form: {_REMEDY}")
    places: list[tuple[str, str]] = []
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        text = os.fsdecode(line)  # as Python decodes the command line: other bytes than UTF-8 stay as they are
        if not text.strip():
            continue
        where, place = f"images_from = {file!r}: line {number}", _place(text)
        if not (_is_utf8(line) or os.path.lexists(place) or glob.has_magic(place)):
            raise ConfigError(f"{where} = {place!r}: does not exist, and is not UTF-8: {_REMEDY}")
        places.append((where, place))
    require(bool(places), "images_from", file, f"names no images: {_REMEDY}")
    return places


def check_no_lists(images: tuple[str, ...]) -> None:
    """Raises `ConfigError` if one of the images is a text whose first line names a file or folder that exists. Files
    with the name of an image are not opened for this, as there can be many of them."""
    for path in itertools.filterfalse(is_image_name, images):
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                continue
            with open(path, "rb") as file:
                start = file.read(_START_BYTES)
        except (OSError, ValueError):  # a pattern, or nothing that can be read: found and reported later
            continue
        first = start.removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")[0]
        if b"\0" not in start and first.strip() and os.path.lexists(_place(os.fsdecode(first))):
            raise ConfigError(f"images = {path!r}: is a list of images: give it by --images-from {path}")


def _content(file: str) -> bytes:
    check_path("images_from", file)
    try:
        if file == STANDARD_INPUT:
            return sys.stdin.buffer.read() if sys.stdin is not None else b""
        # Not the resolved path: that of a pipe, as of <(...) in a shell, cannot be opened.
        return Path(file if os.path.lexists(file) else os.path.expanduser(file)).read_bytes()
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
        raise ConfigError(f"images_from = {file!r}: {reason}: {_REMEDY}, or - for the standard input") from error


def _place(line: str) -> str:
    """What a line names: the line itself if that exists, otherwise without the spaces at its ends."""
    return next(filter(os.path.lexists, (line, line.removesuffix("\r"))), line.strip())


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True
