"""Objects in a bucket of which one version is read: how it is recognized, and compared with a copy."""

import base64
import dataclasses
import hashlib
import re
from pathlib import Path
from typing import Any

from nfnet_flax.storage.bucket import BucketFolder, _file_system, status_of

_MD5 = re.compile(r"[0-9a-f]{32}")
_PRECONDITION_FAILED = 412
_BLOCK_BYTES = 1 << 20


class ObjectChanged(Exception):  # noqa: N818 - it names what happened, as KeyboardInterrupt does
    """An object has been replaced or deleted since it was listed. The message names it."""


@dataclasses.dataclass(frozen=True)
class StoredObject:
    """One version of an object, as its store describes it."""

    size: int
    """Number of bytes."""
    checksum: str
    """`md5:HEX`, `crc32c:HEX`, or `etag:TEXT`: a text of which only the store knows how it is computed."""
    generation: str
    """The store's own name of this version. A read that names it fails if the object has been replaced."""

    def has_content_of(self, other: "StoredObject") -> bool:
        """Whether another version has the same content, as far as the store says it."""
        return (self.size, self.checksum) == (other.size, other.checksum)


class ObjectFolder(BucketFolder):
    """A folder in a bucket whose objects are read by their versions."""

    def listing(self) -> tuple[dict[str, StoredObject], list[str]]:
        """Names of the files directly in the folder -> what the store says about them, and the names of the folders
        there; both empty if there is no such folder.

        Raises:
          StorageFailed: they cannot be listed.
        """
        start = len(self._root) + 1

        def ls() -> tuple[dict[str, StoredObject], list[str]]:
            fs = _file_system(self.url.scheme)
            try:
                found = fs.ls(self._root, detail=True)
            except FileNotFoundError:
                self._check_bucket(fs)
                return {}, []
            inside = [(about["name"][start:].rstrip("/"), about) for about in found if about["name"][start:]]
            files = {
                name: _described(self.url.scheme, about)
                for name, about in inside
                if about["type"] == "file" and not about["name"].endswith("/")
            }
            return files, [name for name, about in inside if about["type"] == "directory"]

        return self._repeated("list", "", ls)

    def object(self, name: str) -> StoredObject:
        """What the store says about a file.

        Raises:
          FileNotFoundError: there is no such file.
          StorageFailed: it cannot be read.
        """

        def info() -> StoredObject:
            about = _file_system(self.url.scheme).info(self._path(name))
            if about["type"] != "file":
                raise FileNotFoundError(self._path(name))
            return _described(self.url.scheme, about)

        return self._repeated("read", name, info)

    def read_version(self, name: str, of: StoredObject, start: int, end: int) -> bytes:
        """Bytes `start` to `end` (not included) of one version of a file.

        Raises:
          ObjectChanged: there is not that version of it.
          StorageFailed: it cannot be read, or is shorter.
        """

        def cat() -> bytes | None:
            fs = _file_system(self.url.scheme)
            try:
                found = _read_version(fs, self.url.scheme, self._path(name), of, start, end)
            except Exception as error:
                if status_of(error) == _PRECONDITION_FAILED:
                    return None
                raise
            if len(found) != end - start:
                raise TimeoutError(f"{len(found)} of {end - start} bytes came")
            return found

        try:
            content = self._repeated("read", name, cat)
        except FileNotFoundError:
            content = None
        if content is None:
            raise ObjectChanged(f"{self.url}/{name} has been replaced or deleted")
        return content


def _described(scheme: str, about: dict[str, Any]) -> StoredObject:
    size = int(about["size"])
    if scheme == "s3":
        etag = str(about["ETag"]).strip('"')
        return StoredObject(size, f"{'md5' if _MD5.fullmatch(etag) else 'etag'}:{etag}", etag)
    for name, field in (("md5", "md5Hash"), ("crc32c", "crc32c")):  # composed objects have no MD5
        if about.get(field):
            checksum = f"{name}:{base64.b64decode(about[field]).hex()}"
            break
    else:
        checksum = f"etag:{about.get('etag', '')}"
    return StoredObject(size, checksum, str(about.get("generation", "")))


def _read_version(fs: Any, scheme: str, path: str, of: StoredObject, start: int, end: int) -> bytes:
    if scheme == "gs":
        return bytes(fs.cat_file(path, start=start, end=end, generation=of.generation))
    from fsspec.asyn import sync

    bucket, key, _ = fs.split_path(path)

    async def get() -> bytes:
        limits = {"Range": f"bytes={start}-{end - 1}", "IfMatch": f'"{of.generation}"'}
        answer = await fs._call_s3("get_object", Bucket=bucket, Key=key, **limits)
        async with answer["Body"] as body:
            return bytes(await body.read())

    return bytes(sync(fs.loop, get))


def digests(path: Path, of: StoredObject) -> tuple[str, str]:
    """Checksum of a file in the form that the checksum of an object has, and its hexadecimal BLAKE2b.

    The first is the object's own if only the store knows how it is computed.
    """
    kind, _, _ = of.checksum.partition(":")
    blake2b, other = hashlib.blake2b(), _hash(kind)
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            blake2b.update(block)
            if other is not None:
                other.update(block)
    return of.checksum if other is None else f"{kind}:{other.digest().hex()}", blake2b.hexdigest()


def _hash(kind: str) -> Any:
    if kind == "md5":
        return hashlib.md5(usedforsecurity=False)
    if kind == "crc32c":
        import google_crc32c  # of which gcsfs depends

        return google_crc32c.Checksum()
    return None
