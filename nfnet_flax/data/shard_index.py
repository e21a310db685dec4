"""The index of a shard: place, name and label of each example in it. It is made once and kept in a file."""

import dataclasses
import hashlib
import io
import json
import zipfile
from typing import Any, NamedTuple, Self

import numpy as np

from nfnet_flax import python_parser
from nfnet_flax.config import ConfigError

_FORMAT = 1
_MAX_NAME_BYTES = 200
_ARRAYS = ("names", "offsets", "sizes", "labels")


class NotUsed(NamedTuple):
    """Rows or members of a shard that are not used, all for the same reason."""

    num: int
    """Their number."""
    reason: str
    """What they are, in the plural."""
    example: str
    """The name of one of them."""


class DamagedIndex(ValueError):  # noqa: N818 - it names what is the case, as KeyboardInterrupt does
    """The bytes are not those of an index as it was written."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ShardIndex:
    """The examples of a shard, in the order in which they are stored."""

    names: np.ndarray
    """(N,) bytes: name of each image, `short_name`; empty if it has none."""
    offsets: np.ndarray
    """(N,) int64: position of the image's first byte in its file; the number of the row if it has no such position."""
    sizes: np.ndarray
    """(N,) int64: number of bytes of the image; 0 if it is not known."""
    labels: np.ndarray
    """(N,) int64: number of the class, or position of its name in `label_names`."""
    label_names: tuple[str, ...] | None
    """Names of the classes that occur in the shard, sorted; None: labels are numbers."""
    facts: dict[str, Any]
    """What else the kind of set has to know about the shard, as JSON."""
    unused: tuple[NotUsed, ...] = ()
    """What is in the shard and not used."""

    def __len__(self) -> int:
        return len(self.labels)

    def to_bytes(self, stamp: str) -> bytes:
        """The contents of the file that keeps the index; `stamp` is that of the shard."""
        about = {
            "format": _FORMAT,
            "stamp": stamp,
            "label_names": self.label_names,
            "facts": self.facts,
            "unused": self.unused,
        }
        file = io.BytesIO()
        np.savez(file, **{name: getattr(self, name) for name in _ARRAYS}, about=_as_array(json.dumps(about).encode()))
        content = file.getvalue()
        return hashlib.blake2b(content, digest_size=16).digest() + content

    @classmethod
    def from_bytes(cls, content: bytes, stamp: str) -> Self | None:
        """The inverse of `to_bytes`; None if the index is that of another state of the shard, or of another version.

        Raises:
          DamagedIndex: the bytes were changed since they were written.
        """
        checksum, content = content[:16], content[16:]
        if hashlib.blake2b(content, digest_size=16).digest() != checksum:
            raise DamagedIndex("its checksum differs")
        try:
            with python_parser.alone(), np.load(io.BytesIO(content), allow_pickle=False) as stored:
                about = json.loads(stored["about"].tobytes())
                if (about["format"], about["stamp"]) != (_FORMAT, stamp):
                    return None
                arrays = {name: stored[name] for name in _ARRAYS}
        except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
            raise DamagedIndex(str(error)) from error
        names = about["label_names"]
        return cls(
            **arrays,
            label_names=None if names is None else tuple(names),
            facts=about["facts"],
            unused=tuple(NotUsed(*found) for found in about["unused"]),
        )


def _as_array(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint8)


def short_name(name: bytes) -> bytes:
    """A name for an index: one that is very long is cut off and made unique again, as arrays have the width of the
    longest name."""
    if len(name) <= _MAX_NAME_BYTES:
        return name
    return name[: _MAX_NAME_BYTES - 17] + b"~" + hashlib.blake2b(name, digest_size=8).hexdigest().encode()


def labels_of(texts: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Positions of class names in the sorted list of those that occur, (N,) int64, and that list."""
    names = tuple(sorted(set(texts)))
    number_of = {name: number for number, name in enumerate(names)}
    return np.array([number_of[text] for text in texts], np.int64), names


def as_numbers(shard: str, labels: list[int]) -> np.ndarray:
    """Labels as (N,) int64.

    Raises:
      ConfigError: one is too large for that.
    """
    try:
        return np.array(labels, np.int64)
    except OverflowError as error:
        raise ConfigError(f"{shard}: label {max(labels, key=abs)} is the number of no class: correct it") from error
