"""The folder of a run, on this machine or in a bucket, as one type that is made once from what the user gave.

All code of a run reads and writes files of this machine, in `path`. For a run in a bucket that is a temporary folder,
and a `Mirror` (`mirror.py`) copies: records and checkpoints come from the bucket at a start, and each checkpoint goes
there when Orbax has completed it.
"""

import contextlib
import errno
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

from nfnet_flax.json_files import StorageFailed
from nfnet_flax.messages import renamed
from nfnet_flax.paths import run_folder
from nfnet_flax.storage import BucketFolder, BucketUrl, Folder, LocalFolder, bucket_url
from nfnet_flax.storage.scratch import no_scratch_text, scratch_folder
from nfnet_flax.training.layout import OWNER
from nfnet_flax.training.mirror import Mirror

_LEASE_RETRY_S = 5.0
"""Time after which a sign of life that fails is given up, in seconds: the next one follows soon, and the end of a run
must not wait for it."""


class RunFolder:
    """The folder of a run; made by `opened` or `reading`."""

    def __init__(self, path: Path, mirror: Mirror | None = None) -> None:
        self.path = path
        """Its files on this machine."""
        self.mirror = mirror
        """Copies them to and from a bucket; None: they are the run's own."""

    def __str__(self) -> str:
        return str(self.path if self.mirror is None else self.mirror.url)

    @property
    def owner_folder(self) -> Folder:
        """The folder of the lease."""
        if self.mirror is None:
            return LocalFolder(self.path / OWNER)
        return BucketFolder(self.mirror.url / OWNER, retry_s=_LEASE_RETRY_S)

    @property
    def place(self) -> Folder:
        """The folder itself, for files that are no records: they are not copied when the run continues."""
        return LocalFolder(self.path) if self.mirror is None else BucketFolder(self.mirror.url)

    def pull(self) -> None:
        """Makes the files on this machine those of the bucket; the arrays of checkpoints come when they are read."""
        if self.mirror is not None:
            self.mirror.pull()

    def push(self) -> None:
        """Makes the records in the bucket those on this machine. For the owner of the folder."""
        if self.mirror is not None:
            self.mirror.push()

    def own(self, check: Callable[[], None]) -> None:
        """To be called when this process owns the folder.

        Args:
          check: raises an error if the folder has another owner; called before each attempt to write there.
        """
        if self.mirror is not None:
            self.mirror.own(check)
            self.mirror.pull()


def place_of(field: str, value: str | os.PathLike[str]) -> Path | BucketUrl:
    """The folder of a run that a user gave, as an absolute path or a URL; does not access it.

    Raises:
      ConfigError: it can be neither.
    """
    return bucket_url(field, value) or run_folder(field, value)


@contextlib.contextmanager
def opened(field: str, value: str | os.PathLike[str], *, is_first: bool) -> Iterator[RunFolder]:
    """The folder of a run that is to be trained. Errors that are raised within the context name the user's place.

    Args:
      field: name of the value in messages.
      value: what the user gave.
      is_first: whether this process will own the run.

    Raises:
      ConfigError: it is no path and no URL, or the package for this kind of bucket is not installed.
      StorageFailed: the bucket cannot be read.
    """
    place = place_of(field, value)
    if isinstance(place, Path):
        yield RunFolder(place)
        return
    with scratch_folder() as path, renamed(str(path), str(place)):
        folder = RunFolder(path, Mirror(place, path, is_owner=is_first))
        folder.pull()
        try:
            yield folder
        except StorageFailed as error:  # Orbax and the metrics write to this machine, too
            if os.strerror(errno.ENOSPC) not in str(error):
                raise
            raise StorageFailed(f"{no_scratch_text()} ({error})") from error


def reading(field: str, value: str | os.PathLike[str]) -> RunFolder:
    """The folder of a run that is only read; for a run in a bucket, the copy is deleted with the value.

    Raises: as for `opened`.
    """
    place = place_of(field, value)
    if isinstance(place, Path):
        return RunFolder(place)
    with contextlib.ExitStack() as opened:
        path = opened.enter_context(scratch_folder())
        opened.enter_context(renamed(str(path), str(place)))
        folder = RunFolder(path, Mirror(place, path, is_owner=False))
        folder.pull()
        weakref.finalize(folder, opened.pop_all().close)
        return folder
