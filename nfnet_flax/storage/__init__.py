"""Places that hold files: folders of this machine, and folders in buckets (`gs://`, `s3://`), with one set of
operations.

    url.py      what a URL means
    folder.py   the operations; a folder of this machine
    bucket.py   a folder in a bucket: retries, time limits and errors of the object stores
    fetching.py, scratch.py   copies on this machine

Objects are read, written and deleted whole. The libraries are fsspec's (`gcsfs`, `s3fs`): both can create an object
only if it does not exist, which decides who owns a run, and both work with the emulators that the tests start.
`obstore` would be faster at reading parts of objects, but cannot write to the emulator of Google's store, so nothing of
it would be tested.
"""

from nfnet_flax.storage.bucket import BucketFolder
from nfnet_flax.storage.fetching import copy_of
from nfnet_flax.storage.folder import Folder, LocalFolder
from nfnet_flax.storage.url import BucketUrl, bucket_url

__all__ = ["BucketFolder", "BucketUrl", "Folder", "LocalFolder", "bucket_url", "copy_of"]
