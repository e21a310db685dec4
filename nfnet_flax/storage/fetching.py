"""Copies of files in buckets on this machine, for what is read as a whole, such as weights."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from nfnet_flax.config import ConfigError
from nfnet_flax.progress import BYTES, tracking
from nfnet_flax.storage.bucket import BucketFolder
from nfnet_flax.storage.scratch import scratch_errors, scratch_folder
from nfnet_flax.storage.url import BucketUrl


@contextlib.contextmanager
def copy_of(field: str, url: BucketUrl, wanted: tuple[str, ...]) -> Iterator[Path]:
    """The path of a copy of a file in a bucket, or of a folder there; it is deleted at the end of the context.

    Args:
      field: name of the value in messages.
      url: place of the file or folder.
      wanted: names of the files in a folder that are copied.

    Raises:
      ConfigError: there is neither a file nor such a folder, or the package for this kind of bucket is not installed.
      StorageFailed: the bucket cannot be read.
    """
    with scratch_folder() as folder:
        with scratch_errors():
            path = _copied(field, url, wanted, folder)
        yield path


def _copied(field: str, url: BucketUrl, wanted: tuple[str, ...], target: Path) -> Path:
    with tracking(f"copying {url}", unit=BYTES) as task:
        if url.key:
            with contextlib.suppress(FileNotFoundError):
                BucketFolder(url.parent).download(url.name, target / url.name, on_bytes=task.advance)
                return target / url.name
        folder = BucketFolder(url)
        sizes = {name: size for name, size in folder.files().items() if name in wanted}
        if not sizes:
            names = " or ".join(wanted)
            raise ConfigError(f"{field} = {str(url)!r}: there is no such file, and no folder with {names}")
        task.total = sum(sizes.values())
        for name, size in sizes.items():
            folder.download(name, target / (url.name or url.bucket) / name, size=size, on_bytes=task.advance)
        return target / (url.name or url.bucket)
