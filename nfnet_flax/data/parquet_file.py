"""What one Parquet file of images says, by pyarrow: its columns, the labels and the names of the classes."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from nfnet_flax.config import ConfigError
from nfnet_flax.data.shard_files import check_is_no_pointer, read_bytes, shard_size, shard_source

_MAGIC = b"PAR1"
_ENDS_BYTES = 8
_LABELS_AT_ONCE = 1 << 16
_READ_BYTES = 1 << 20
AGAIN = "copy or download it again"
"""What a user can do about a damaged file."""


def library() -> Any:
    """The package pyarrow, with `parquet`.

    Raises:
      ConfigError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"ParquetSource needs the package pyarrow: pip install 'nfnet_flax[parquet]' ({error})"
        ) from error
    return pyarrow


class DamagedFile(ConfigError):  # noqa: N818 - it names what is the case, as KeyboardInterrupt does
    """A file that can be read is no complete Parquet file."""


@contextlib.contextmanager
def opened(shard: str) -> Iterator[Any]:
    """An open `pyarrow.parquet.ParquetFile`; turns the errors that pyarrow raises in the context into errors of ours.

    Raises:
      ConfigError: pyarrow is missing, or the file is a pointer of Git LFS.
      DamagedFile: the file is cut off, damaged, or of another kind.
      OSError: it cannot be read.
    """
    pyarrow = library()
    check_is_no_pointer(shard)
    footer_bytes(shard)
    try:
        with pyarrow.parquet.ParquetFile(shard_source(shard), pre_buffer=False, buffer_size=_READ_BYTES) as file:
            yield file
    except MemoryError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DamagedFile(f"{shard!r} is damaged ({str(error).splitlines()[0]}): {AGAIN}") from error


def footer_bytes(shard: str) -> bytes:
    """The metadata at the end of a file: sizes, positions and statistics of all columns.

    Raises:
      DamagedFile: the file does not begin and end like a Parquet file.
      OSError: it cannot be read.
    """
    size = shard_size(shard)
    start, end = read_bytes(shard, 0, len(_MAGIC)), read_bytes(shard, max(0, size - _ENDS_BYTES), _ENDS_BYTES)
    length = int.from_bytes(end[:4], "little")
    if start != _MAGIC:
        raise DamagedFile(f"{shard!r} is no Parquet file: it begins with {start!r}, not with {_MAGIC!r}: {AGAIN}")
    if end[4:] != _MAGIC or length + _ENDS_BYTES + len(_MAGIC) > size:
        raise DamagedFile(f"{shard!r} is cut off: its {size} bytes do not end like a Parquet file: {AGAIN}")
    return read_bytes(shard, size - _ENDS_BYTES - length, length)


def footer_digest(shard: str) -> str:
    """Hexadecimal BLAKE2b of `footer_bytes`."""
    return hashlib.blake2b(footer_bytes(shard), digest_size=16).hexdigest()


class Columns(NamedTuple):
    """The columns of a file that are read."""

    image: str
    """Path of the column with the bytes of the images, such as `image.bytes`."""
    path: str | None
    """Path of the column with the names of their files; None: there is none."""
    label: str
    """Name of the column with the labels."""
    has_numbers: bool
    """Whether labels are numbers; if not, they are texts."""
    class_names: tuple[str, ...] | None
    """Names of the classes by number, from the metadata of the Hugging Face hub; None: there are none."""


def columns_of(shard: str, schema: Any, image: str, label: str) -> Columns:
    """Finds the columns in the schema of a file.

    Raises:
      ConfigError: a column is missing or of another type.
    """
    types = library().types
    for field, name in (("image", image), ("label", label)):
        if name not in schema.names:
            raise ConfigError(
                f"{shard!r}: there is no column {name!r}; there are {', '.join(map(repr, schema.names))}: name the "
                f"column by --data.source.{field}"
            )
    kind, path = schema.field(image).type, None
    leaf = image
    if types.is_struct(kind):
        inner = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        leaf, path = f"{image}.bytes", f"{image}.path" if "path" in inner else None
        kind = inner.get("bytes")
    if kind is None or not (types.is_binary(kind) or types.is_large_binary(kind)):
        raise ConfigError(
            f"{shard!r}: column {image!r} is of type {schema.field(image).type}: must have the bytes of image files, "
            "or structures of `bytes` and `path` as the Hugging Face hub has them: name another one by "
            "--data.source.image"
        )
    kind = schema.field(label).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    if not (types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)):
        raise ConfigError(
            f"{shard!r}: column {label!r} is of type {kind}: must have one class for each image, as a number or a "
            "text: name another one by --data.source.label"
        )
    return Columns(leaf, path, label, types.is_integer(kind), _hub_names(shard, schema.metadata, label))


def _hub_names(shard: str, metadata: dict[bytes, bytes] | None, label: str) -> tuple[str, ...] | None:
    content = (metadata or {}).get(b"huggingface")
    if content is None:
        return None
    try:
        feature = json.loads(content)["info"]["features"].get(label)
        names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{shard!r}: its metadata `huggingface` is damaged ({error!r}): write the file again"
        ) from error
    if names is None:
        return None
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ConfigError(f"{shard!r}: the class names {names!r} in its metadata must be texts, each of them once")
    return tuple(names)


def read_labels(shard: str, file: Any, columns: Columns) -> tuple[list[Any], list[bytes]]:
    """Label and name of each image, in the order of the rows; an image without a name has an empty one.

    Raises:
      ConfigError: a label is null.
    """
    labels: list[Any] = []
    names: list[bytes] = []
    wanted = [columns.label, *([columns.path] if columns.path is not None else [])]
    for batch in file.iter_batches(batch_size=_LABELS_AT_ONCE, columns=wanted, use_threads=False):
        found = batch.column(columns.label).to_pylist()
        if None in found:
            raise ConfigError(
                f"{shard} row {len(labels) + found.index(None)}: column {columns.label!r} is null: give a label, or "
                "remove the row"
            )
        labels += found
        paths: list[str | None] = [None] * len(found)
        if columns.path is not None:
            paths = batch.column(columns.path.removesuffix(".path")).field("path").to_pylist()
        names += [(path or "").encode(errors="surrogateescape") for path in paths]
    return labels, names
