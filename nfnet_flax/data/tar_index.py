"""The index of one tar file of images and labels in the form of WebDataset.

Members with the same key, which is the name up to the first dot after the last slash, belong together: `KEY.jpg` is the
image, and `KEY.cls`, `KEY.txt` or `KEY.json` its class. The tar is not compressed, so that an image is a range of its
bytes. Its headers are read once, and of its contents only the labels.
"""

import json
import os
import re
import tarfile
from collections.abc import Iterator
from typing import IO, NamedTuple

import numpy as np

from nfnet_flax.config import ConfigError
from nfnet_flax.data.decode import IMAGE_SUFFIXES
from nfnet_flax.data.shard_files import check_is_no_pointer, shard_file
from nfnet_flax.data.shard_index import NotUsed, ShardIndex, as_numbers, labels_of, short_name

LABEL_ENDINGS = ("cls", "txt", "json")
"""Endings of members with a label, the ones that are preferred first."""
_IMAGE_ENDINGS = frozenset(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)
_MAGICS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
_NUMBER = re.compile(r"-?(0|[1-9]\d*)")
_BLOCK_BYTES = 512
_READ_BYTES = 1 << 20
_AGAIN = "copy or download it again"

_LINKS = "links and other things that are no files"
_HIDDEN = "hidden files"
_OTHER = "members whose names end, from the first dot on, neither like an image nor like a label"
_UNREAD = "members with labels of another kind than .{}, which is read"
_WITHOUT_IMAGE = "labels without an image"


class _Sample(NamedTuple):
    """An image of a tar file."""

    name: str
    """Name of the member."""
    offset: int
    size: int


class _Contents(NamedTuple):
    """What is in a tar file."""

    images: dict[str, _Sample]
    """Key -> image, in the order of the file."""
    labels: dict[str, dict[str, bytes]]
    """Ending -> key -> contents of the member."""
    unused: dict[str, tuple[int, str]]
    """Reason -> number of members that are not used for it, and the name of one."""


def tar_index(shard: str, label: str | None, json_key: str) -> ShardIndex:
    """The index of a tar file.

    Args:
      shard: the file.
      label: ending of the members with the labels; None: the first one of `LABEL_ENDINGS` that occurs for an image.
      json_key: name of the entry of a JSON object that is the class.

    Raises:
      ConfigError: the file is compressed, cut off, damaged or no tar file; a member is there twice, or a key has two
        images; or an image has no label, or none that can be understood.
      OSError: it cannot be read.
    """
    check_is_no_pointer(shard)
    with shard_file(shard) as path, open(path, "rb") as file:
        _check_uncompressed(file, shard)
        contents = _contents_of(file, shard, label)
    ending = label or _ending_of(shard, contents)
    texts = [_label_of(shard, contents, key, ending, json_key) for key in contents.images]
    has_numbers = all(map(_NUMBER.fullmatch, texts))
    labels, label_names = (as_numbers(shard, [int(t) for t in texts]), None) if has_numbers else labels_of(texts)
    images = list(contents.images.values())
    return ShardIndex(
        names=np.array([short_name(image.name.encode(errors="surrogateescape")) for image in images], dtype=bytes),
        offsets=np.array([image.offset for image in images], np.int64),
        sizes=np.array([image.size for image in images], np.int64),
        labels=labels,
        label_names=label_names,
        facts={"ending": ending if images else None},
        unused=tuple(_not_used(contents, ending)),
    )


def _check_uncompressed(file: IO[bytes], shard: str) -> None:
    start = file.read(_BLOCK_BYTES)
    file.seek(0)
    for magic, name in _MAGICS.items():
        if start.startswith(magic):
            raise ConfigError(
                f"{shard!r} is compressed by {name}, so that it has no random access: decompress it (images are "
                "compressed themselves, so it hardly grows)"
            )


def _contents_of(file: IO[bytes], shard: str, label: str | None) -> _Contents:
    images: dict[str, _Sample] = {}
    labels: dict[str, dict[str, bytes]] = {ending: {} for ending in LABEL_ENDINGS}
    if label is not None:
        labels = {label: {}}
    unused: dict[str, tuple[int, str]] = {}
    for member in _members(file, shard):
        folder, slash, base = member.name.rpartition("/")
        stem, _, ending = base.partition(".")
        key, ending = f"{folder}{slash}{stem}", ending.lower()
        reason = _LINKS if not member.isreg() or member.issparse() else _HIDDEN if base.startswith(".") else _OTHER
        if reason is _OTHER and ending in _IMAGE_ENDINGS:
            if key in images:
                raise ConfigError(
                    f"{shard!r}: key {key!r} has two images, {images[key].name!r} and {member.name!r}: keys must "
                    "differ, as an image and its label are found by their key"
                )
            images[key] = _Sample(member.name, member.offset_data, member.size)
        elif reason is _OTHER and ending in labels:
            if key in labels[ending]:
                raise ConfigError(f"{shard!r}: holds {member.name!r} twice: keys must differ")
            file.seek(member.offset_data)
            labels[ending][key] = file.read(member.size)
        else:
            count, example = unused.get(reason, (0, member.name))
            unused[reason] = (count + 1, example)
    return _Contents(images, labels, unused)


def _members(file: IO[bytes], shard: str) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file but its folders, after a check that each is complete."""
    end = os.fstat(file.fileno()).st_size
    try:
        # Names are only compared and printed, and nothing is unpacked, so a malicious name can do no harm.
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # `tarfile` would keep every member in memory
                if member.offset_data + member.size > end:
                    raise ConfigError(f"{shard!r} is cut off within {member.name!r}: {_AGAIN}")
                if not member.isdir():
                    yield member
            _check_end(file, shard, tar.offset, end)
    except tarfile.TarError as error:
        raise ConfigError(f"{shard!r} is cut off, damaged or no tar file ({error}): {_AGAIN}") from error


def _check_end(file: IO[bytes], shard: str, position: int, end: int) -> None:
    """Checks that nothing but zeros follows the last member. Without zeros the file may have been cut off between two
    members, and after them more members would be passed over."""
    file.seek(position)
    rest = file.read(_READ_BYTES)
    if len(rest) < _BLOCK_BYTES:
        raise ConfigError(f"{shard!r} is cut off: it lacks the mark at the end of a tar file: {_AGAIN}")
    while rest:
        if rest.strip(b"\0"):
            raise ConfigError(
                f"{shard!r} is damaged after byte {position} of {end}, or several tar files were joined to it, of "
                f"which only the first can be read: {_AGAIN}, or pack the images again"
            )
        rest = file.read(_READ_BYTES)


def _ending_of(shard: str, contents: _Contents) -> str:
    """The ending of the labels: the first one that occurs for an image."""
    for ending, found in contents.labels.items():
        if not contents.images.keys().isdisjoint(found):
            return ending
    if not contents.images:
        return LABEL_ENDINGS[0]
    name = next(iter(contents.images.values())).name
    raise ConfigError(
        f"{shard!r}: {name!r} has no label, as have {len(contents.images)} images: each needs a member with the same "
        f"key and the ending {', '.join(LABEL_ENDINGS)}"
    )


def _label_of(shard: str, contents: _Contents, key: str, ending: str, json_key: str) -> str:
    """The class of an image, as text."""
    found = contents.labels[ending]
    if key not in found:
        missing = [image.name for other, image in contents.images.items() if other not in found]
        raise ConfigError(
            f"{shard!r}: {contents.images[key].name!r} has no label .{ending}, as have {len(missing)} of "
            f"{len(contents.images)} images: add it, or give --data.source.label if another ending has the labels"
        )
    where = f"{shard!r}: {key}.{ending}"
    try:
        text = found[key].decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: is no text in UTF-8 ({error.reason}): pack the label again") from error
    if ending == "json":
        return _json_label(where, text, json_key)
    if not text or "\n" in text:
        raise ConfigError(
            f"{where}: must have one line with a class, not {text[:40]!r}: correct it, or give --data.source.label if "
            "another ending has the labels"
        )
    return text


def _json_label(where: str, text: str, json_key: str) -> str:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: is no JSON ({error}): pack the label again") from error
    if not isinstance(entries, dict) or json_key not in entries:
        known = ", ".join(map(repr, entries)) if isinstance(entries, dict) else type(entries).__name__
        raise ConfigError(
            f"{where}: has no entry {json_key!r} ({known[:200]}): name the entry with the class by "
            "--data.source.json-key"
        )
    value = entries[json_key]
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise ConfigError(
            f"{where}: entry {json_key!r} is {value!r}: must be the number or the name of a class: name another entry "
            "by --data.source.json-key"
        )
    return str(value).strip()


def _not_used(contents: _Contents, ending: str) -> Iterator[NotUsed]:
    for reason, (count, example) in contents.unused.items():
        yield NotUsed(count, reason, repr(example))
    for other, found in contents.labels.items():
        if other == ending:
            alone = [key for key in found if key not in contents.images]
            if alone:
                yield NotUsed(len(alone), _WITHOUT_IMAGE, repr(f"{alone[0]}.{other}"))
        elif found:
            yield NotUsed(len(found), _UNREAD.format(ending), repr(f"{next(iter(found))}.{other}"))
