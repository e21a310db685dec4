"""URLs of folders and files in buckets, such as `gs://BUCKET/FOLDER`."""

import dataclasses
import os
import re

from nfnet_flax.config import ConfigError

SCHEMES = {"gs": "gcs", "s3": "s3"}
"""Scheme of a URL -> extra of this package that supports it."""
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/(?P<rest>.*)", re.DOTALL)
"""A URL, also with a single slash, which `pathlib.Path` makes of two."""
_NO_SLASHES = re.compile(rf"(?P<scheme>{'|'.join(SCHEMES)}):[^/]", re.IGNORECASE)
"""A URL whose slashes were forgotten: as a path it would be a folder of this machine."""
_MAX_KEY_BYTES = 850
"""Longest name of a folder: the stores take 1024 bytes, and the names of the files in it come after it."""
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")


@dataclasses.dataclass(frozen=True)
class BucketUrl:
    """A place in a bucket."""

    scheme: str
    """`gs` or `s3`."""
    bucket: str
    """Name of the bucket."""
    key: str
    """Name within the bucket, without slashes at the ends; empty: the whole bucket."""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}" + (f"/{self.key}" if self.key else "")

    def __truediv__(self, name: str) -> "BucketUrl":
        return dataclasses.replace(self, key=f"{self.key}/{name}" if self.key else name)

    @property
    def parent(self) -> "BucketUrl":
        """The folder that contains this place."""
        return dataclasses.replace(self, key=self.key.rpartition("/")[0])

    @property
    def name(self) -> str:
        """The last part of the name."""
        return self.key.rpartition("/")[2]


def is_url(value: str | os.PathLike[str]) -> bool:
    """Whether a text is a URL of any scheme, and not the path of a file or folder of this machine."""
    return _URL.match(os.fspath(value)) is not None


def bucket_url(field: str, value: str | os.PathLike[str]) -> BucketUrl | None:
    """The place in a bucket that a value names; None if the value is a path of this machine.

    Args:
      field: name of the value in messages, such as `workdir`.
      value: what the user gave. Slashes at the end and double slashes are ignored.

    Raises:
      ConfigError: it is a URL that is not supported, or that names no valid bucket.
    """
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else ""
    if (short := _NO_SLASHES.match(text)) is not None:
        scheme = short["scheme"].lower()
        raise ConfigError(
            f"{field} = {text!r}: looks like a URL without its slashes: write {scheme}://BUCKET/FOLDER (a folder that "
            f"is really named so: ./{text})"
        )
    found = _URL.match(text)
    if found is None:
        return None
    scheme = found["scheme"].lower()
    if scheme not in SCHEMES:
        supported = ", ".join(f"{name}://BUCKET/FOLDER" for name in SCHEMES)
        raise ConfigError(
            f"{field} = {text!r}: is a URL of a kind that is not supported: give a path of this machine, or one of "
            f"{supported} (a folder that is really named so: ./{text})"
        )
    if not isinstance(value, str):
        raise ConfigError(f"{field} = {text!r}: is a URL in a pathlib.Path, which removes slashes: give it as text")
    if not found["rest"].startswith("/"):
        raise ConfigError(f"{field} = {text!r}: has one slash after the colon: write {scheme}://BUCKET/FOLDER")
    bucket, _, rest = found["rest"][1:].partition("/")
    parts = [part for part in rest.split("/") if part]
    if not _BUCKET.fullmatch(bucket):
        raise ConfigError(f"{field} = {text!r}: {bucket!r} is no name of a bucket: write {scheme}://BUCKET/FOLDER")
    if any(part in (".", "..") for part in parts):
        raise ConfigError(f"{field} = {text!r}: holds . or .., which have no meaning in a bucket: give the full name")
    if bad := sorted({character for character in rest if ord(character) < 32 or character in "\x7f"}):
        raise ConfigError(f"{field} = {text!r}: holds {bad[0]!r}, which names in a bucket cannot: rename the folder")
    if len("/".join(parts).encode()) > _MAX_KEY_BYTES:
        raise ConfigError(
            f"{field} = {text!r}: the name in the bucket is longer than {_MAX_KEY_BYTES} bytes: shorten it"
        )
    return BucketUrl(scheme, bucket, "/".join(parts))
