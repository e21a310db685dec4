"""Places that hold files: folders of this machine, and folders in buckets (`gs://`, `s3://`), with one set of
operations.

    url.py      what a URL means
    folder.py   the operations; a folder of this machine
    bucket.py   a folder in a bucket: retries, time limits and errors of the object stores
    objects.py  versions of objects: their checksums, and reading parts of one version
    cache.py    copies of objects on a disk, which all processes of a host share; cache_room.py, file_locks.py
    fetching.py, scratch.py   copies that one process uses
    background.py   threads that do not keep a process from ending

The libraries are fsspec's (`gcsfs`, `s3fs`): both can create an object only if it does not exist, which decides who
owns a run, and both work with the emulators that the tests start. `obstore` would be faster at reading parts of
objects, but cannot write to the emulator of Google's store, so nothing of it would be tested.
"""

from pathlib import Path

from nfnet_flax.storage.bucket import BucketFolder
from nfnet_flax.storage.fetching import copy_of
from nfnet_flax.storage.folder import Folder, LocalFolder
from nfnet_flax.storage.url import BucketUrl, bucket_url

__all__ = ["BucketFolder", "BucketUrl", "Folder", "LocalFolder", "bucket_url", "copy_of", "folder_at"]


def folder_at(place: BucketUrl | Path | str) -> Folder:
    """The folder of a URL, or of a path of this machine.

    Raises:
      ConfigError: the package for this kind of bucket is not installed.
    """
    return BucketFolder(place) if isinstance(place, BucketUrl) else LocalFolder(place)
