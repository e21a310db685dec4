"""A folder in a bucket. All of the object stores' retries, time limits and errors are here."""

import contextlib
import functools
import importlib
import logging
import os
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from nfnet_flax.config import ConfigError
from nfnet_flax.json_files import StorageFailed
from nfnet_flax.storage.google_login import google_file_system
from nfnet_flax.storage.url import SCHEMES, BucketUrl

RETRY_S = 90.0
"""Time after which an operation that fails again and again is given up, in seconds. The libraries themselves repeat a
request for up to half a minute, so an operation fails after at most two minutes: before the watchdog's limit."""
REQUEST_TIMEOUT_S = 30.0
"""Longest time of one request, in seconds."""
_PART_BYTES = 16 << 20
"""Number of bytes that one request reads or writes: at 0.6 MB/s it is done within the time limit."""
_NUM_THREADS = 8
"""Number of requests at the same time."""
_PERMISSIONS = {
    "gs": {
        "list": "storage.objects.list",
        "read": "storage.objects.get",
        "write": "storage.objects.create (and storage.objects.delete, to replace an object)",
        "delete": "storage.objects.delete",
    },
    "s3": {"list": "s3:ListBucket", "read": "s3:GetObject", "write": "s3:PutObject", "delete": "s3:DeleteObject"},
}
_RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}
"""Status codes of HTTP that pass. S3 answers 409 if two writers create one object at the same time."""

T = TypeVar("T")


class BucketFolder:
    """A `Folder` in a bucket of Google Cloud Storage or of a store that speaks S3.

    Credentials, endpoint and region come from where each provider's own tools take them.
    """

    def __init__(self, url: BucketUrl, *, retry_s: float = RETRY_S, fence: Callable[[], None] | None = None) -> None:
        """Connects at the first operation.

        Args:
          url: place of the folder.
          retry_s: time after which an operation that fails again and again is given up, in seconds.
          fence: called before each attempt to write or delete; it raises an error if this process must not do that.

        Raises:
          ConfigError: the package for this kind of bucket is not installed.
        """
        _imported(url)
        self.url = url
        self._root = f"{url.bucket}/{url.key}".rstrip("/")
        self._retry_s = retry_s
        self._fence = fence

    @property
    def identity(self) -> str:
        """The URL."""
        return str(self.url)

    def __str__(self) -> str:
        return str(self.url)

    def make(self) -> None:
        """Does nothing: a bucket has no folders."""

    def fenced(self, fence: Callable[[], None]) -> "BucketFolder":
        """The same folder, with a `fence`."""
        return BucketFolder(self.url, retry_s=self._retry_s, fence=fence)

    def files(self, under: str = "") -> dict[str, int]:
        """See `Folder`."""
        start = f"{self._root}/{under}".rstrip("/")

        def find() -> dict[str, int]:
            fs = _file_system(self.url.scheme)
            try:
                found = fs.find(start, detail=True)
            except FileNotFoundError:
                self._check_bucket(fs)
                return {}
            if not found:
                self._check_bucket(fs)
            inside = {path[len(self._root) + 1 :]: int(about["size"]) for path, about in found.items()}
            return {name: size for name, size in inside.items() if name and not name.endswith("/")}

        return self._repeated("list", under, find)

    def _check_bucket(self, fs: Any) -> None:
        """Raises `FileNotFoundError` if there is no such bucket: then a list is empty for another reason."""
        fs.ls(self.url.bucket, detail=False)

    def read(self, name: str) -> bytes:
        """See `Folder`."""
        return self._repeated("read", name, lambda: bytes(_file_system(self.url.scheme).cat_file(self._path(name))))

    def put(self, name: str, content: bytes) -> None:
        """See `Folder`."""

        def pipe() -> None:
            _file_system(self.url.scheme).pipe_file(self._path(name), content)

        self._repeated("write", name, pipe)

    def create(self, name: str, content: bytes) -> bool:
        """See `Folder`. The content must differ between callers, as it tells whether an attempt succeeded whose answer
        was lost."""

        def pipe() -> bool:
            fs = _file_system(self.url.scheme)
            try:
                fs.pipe_file(self._path(name), content, mode="create")
            except FileExistsError:
                return bytes(fs.cat_file(self._path(name))) == content
            return True

        return self._repeated("write", name, pipe)

    def upload(self, source: Path, name: str) -> None:
        """See `Folder`."""

        def put() -> None:
            _file_system(self.url.scheme).put_file(str(source), self._path(name), chunksize=_PART_BYTES)

        self._repeated("write", name, put)

    def download(
        self, name: str, target: Path, *, size: int | None = None, on_bytes: Callable[[int], object] = lambda _: None
    ) -> None:
        """See `Folder`. Parts are read at the same time; for each that has come, `on_bytes` gets its size."""
        if size is None:
            size = self._repeated(
                "read", name, lambda: int(_file_system(self.url.scheme).info(self._path(name))["size"])
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.partial")
        try:
            with partial.open("wb") as file:
                file.truncate(size)
                starts = range(0, size, _PART_BYTES)
                with ThreadPoolExecutor(max(1, min(_NUM_THREADS, len(starts)))) as readers:
                    for done in [
                        readers.submit(self._download_part, name, file.fileno(), start, min(start + _PART_BYTES, size))
                        for start in starts
                    ]:
                        on_bytes(done.result())
            partial.replace(target)
        except BaseException:  # also if the user stops it: half a file is never left
            with contextlib.suppress(OSError):
                partial.unlink()
            raise

    def _download_part(self, name: str, file: int, start: int, end: int) -> int:
        return os.pwrite(file, self.read_part(name, start, end), start)

    def read_part(self, name: str, start: int, end: int) -> bytes:
        """Bytes `start` to `end` (not included) of a file.

        Raises:
          FileNotFoundError: there is no such file.
          StorageFailed: it cannot be read, or is shorter.
        """

        def cat() -> bytes:
            found = bytes(_file_system(self.url.scheme).cat_file(self._path(name), start=start, end=end))
            if len(found) != end - start:
                raise TimeoutError(f"{len(found)} of {end - start} bytes came")
            return found

        return self._repeated("read", name, cat)

    def delete(self, names: Iterable[str]) -> None:
        """See `Folder`."""

        def delete(name: str) -> None:
            fs = _file_system(self.url.scheme)

            def remove() -> None:
                with contextlib.suppress(FileNotFoundError):
                    fs.rm_file(self._path(name))

            self._repeated("delete", name, remove)

        with ThreadPoolExecutor(_NUM_THREADS) as deleters:
            list(deleters.map(delete, names))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _repeated(self, action: str, name: str, call: Callable[[], T]) -> T:
        """The result of a call, which is repeated as long as its error may pass."""
        started = time.monotonic()
        pause_s = 0.2
        while True:
            if self._fence is not None and action in ("write", "delete"):
                self._fence()
            try:
                return call()
            except FileNotFoundError as error:
                if action == "write" or _names_bucket(error, self.url.bucket):
                    raise StorageFailed(
                        f"{self.url}: there is no bucket {self.url.bucket!r}, or it may not be seen: make it, correct "
                        "its name, or ask for the permission"
                    ) from error
                raise
            except Exception as error:
                failure = error
            code = status_of(failure)
            place = f"{self.url}/{name}" if name else str(self.url)
            if not _may_pass(failure, code):
                raise StorageFailed(_explained(place, self.url.scheme, action, failure, code)) from failure
            waited_s = time.monotonic() - started
            if waited_s + pause_s > self._retry_s:
                text = f"{place}: cannot {action}: {_brief(failure)}; repeated for {waited_s:.0f} s"
                raise StorageFailed(text) from failure
            time.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, 10.0)


def status_of(error: BaseException) -> int | None:
    """Status code of HTTP in an error of a storage library; None if there is none."""
    if type(error).__module__.startswith("aiohttp.http_exceptions"):
        return None  # an answer that was cut: the code is not the store's
    for name in ("code", "status", "status_code"):
        code = getattr(error, name, None)
        if isinstance(code, int):
            return code
        if isinstance(code, str) and code.isdecimal():
            return int(code)
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        code = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return code if isinstance(code, int) else None
    if str(error).startswith("Forbidden"):  # `gcsfs` raises a plain OSError
        return 403
    cause = error.__cause__
    return status_of(cause) if cause is not None and cause is not error else None


def _may_pass(error: Exception, code: int | None) -> bool:
    if isinstance(error, StorageFailed | ConfigError | PermissionError | FileExistsError | IsADirectoryError):
        return False
    if code is not None:
        return code in _RETRIED
    if _is_about_login(error):
        return False
    named = type(error).__name__
    from aiohttp import ClientError

    # The libraries raise their own kinds for a connection that was cut or an answer that was too short.
    connection = ("Connection", "Timeout", "Incomplete", "Checksum", "EndpointConnection", "HTTPClient", "Payload")
    return isinstance(error, OSError | TimeoutError | ClientError) or any(word in named for word in connection)


def _is_about_login(error: Exception) -> bool:
    return any(word in type(error).__name__ for word in ("Credential", "Auth", "Token"))


def _explained(place: str, scheme: str, action: str, error: Exception, code: int | None) -> str:
    text = f"{place}: cannot {action}: {_brief(error)}"
    if code == 401 or _is_about_login(error):
        login = {"gs": "gcloud auth application-default login", "s3": "aws configure, or AWS_ACCESS_KEY_ID and others"}
        return f"{text}: log in ({login[scheme]}), or give this machine a service account"
    if code == 403 or isinstance(error, PermissionError):
        return f"{text}: the permission is missing: {_PERMISSIONS[scheme][action]}"
    return text


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _names_bucket(error: FileNotFoundError, bucket: str) -> bool:
    text = str(error)
    return (
        "bucket does not exist" in text or text.rstrip("/").endswith((f"b/{bucket}/o", f"b/{bucket}")) or text == bucket
    )


def _imported(url: BucketUrl) -> None:
    module = {"gs": "gcsfs", "s3": "s3fs"}[url.scheme]
    # Read when `gcsfs` is imported. Otherwise each call first asks Google whether the bucket has folders of its own.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{str(url)!r}: {url.scheme}:// needs the package {module} ({error}): "
            f"pip install nfnet_flax[{SCHEMES[url.scheme]}]"
        ) from error


@functools.cache
def _file_system(scheme: str) -> Any:
    """The file system of a kind of bucket, one for a process."""
    import fsspec

    for name in ("gcsfs", "s3fs", "aiobotocore", "botocore", "fsspec"):  # errors are reported here, once
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # A part is sent by the thread of the libraries, which does nothing else meanwhile.
    warnings.filterwarnings("ignore", "Sending a large body directly", ResourceWarning)
    # Listings must not be kept: other processes write, too.
    shared: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if scheme == "gs":
        return google_file_system(requests_timeout=REQUEST_TIMEOUT_S, **shared)
    limits = {"connect_timeout": 10, "read_timeout": REQUEST_TIMEOUT_S, "retries": {"max_attempts": 3}}
    return fsspec.filesystem("s3", config_kwargs=limits, **shared)
