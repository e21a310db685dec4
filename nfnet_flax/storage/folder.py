"""The operations on a folder, wherever it is; and a folder of this machine."""

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from nfnet_flax.json_files import write_whole


class Folder(Protocol):
    """A folder. Names are relative to it, with slashes; each file is read and written whole.

    If the storage fails, each method raises `StorageFailed` in a bucket, and `OSError` on a disk (`download`: also for
    the disk that it writes to). `FileNotFoundError` means that a file that is to be read does not exist.
    """

    @property
    def identity(self) -> str:
        """A text that differs between this folder and a copy of it in another place."""

    def __str__(self) -> str: ...

    def make(self) -> None:
        """Makes the folder, in places where that is needed."""

    def files(self, under: str = "") -> dict[str, int]:
        """Names of all files below the folder `under` -> size in bytes; empty if there is no such folder."""

    def read(self, name: str) -> bytes:
        """The content of a file."""

    def put(self, name: str, content: bytes) -> None:
        """Writes or replaces a file. Readers see the old or the new content, nothing else."""

    def create(self, name: str, content: bytes) -> bool:
        """Writes a new file; returns False if it already exists. Of several callers, exactly one gets True."""

    def upload(self, source: Path, name: str) -> None:
        """Copies a file of this machine into the folder, like `put`."""

    def download(self, name: str, target: Path, *, size: int | None = None) -> None:
        """Copies a file to this machine; `target` appears when it is complete.

        Args:
          name: the file.
          target: path of the copy.
          size: its size in bytes, if it is known from `files`: that saves a request.
        """

    def delete(self, names: Iterable[str]) -> None:
        """Deletes files; those that do not exist are ignored."""


class LocalFolder:
    """A `Folder` of this machine.

    Each method raises `OSError` if the file system fails.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @property
    def identity(self) -> str:
        """Device and inode, which differ for a copy."""
        status = self.path.stat()
        return f"{status.st_dev}:{status.st_ino}"

    def __str__(self) -> str:
        return str(self.path)

    def make(self) -> None:
        """See `Folder`."""
        self.path.mkdir(parents=True, exist_ok=True)

    def files(self, under: str = "") -> dict[str, int]:
        """See `Folder`."""
        found = {}
        for folder, _, names in os.walk(self.path / under):
            for name in names:
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                    found[path.relative_to(self.path).as_posix()] = path.stat().st_size
        return found

    def read(self, name: str) -> bytes:
        """See `Folder`."""
        return (self.path / name).read_bytes()

    def put(self, name: str, content: bytes) -> None:
        """See `Folder`."""
        write_whole(self._made(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """See `Folder`."""
        try:
            descriptor = os.open(self._made(name), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return True

    def upload(self, source: Path, name: str) -> None:
        """See `Folder`."""
        partial = self._made(f"{name}.{os.getpid()}.partial")
        shutil.copyfile(source, partial)
        partial.replace(self.path / name)

    def download(self, name: str, target: Path, *, size: int | None = None) -> None:
        """See `Folder`."""
        LocalFolder(target.parent).upload(self.path / name, target.name)

    def delete(self, names: Iterable[str]) -> None:
        """See `Folder`."""
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def _made(self, name: str) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path
