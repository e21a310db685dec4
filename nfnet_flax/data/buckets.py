"""Files of a set of images, on a disk or in a bucket: which there are; and the errors of a store as a source's."""

import contextlib
import contextvars
import fnmatch
import glob
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from nfnet_flax.config import ConfigError
from nfnet_flax.json_files import StorageFailed
from nfnet_flax.paths import escaped
from nfnet_flax.storage import BucketFolder, BucketUrl
from nfnet_flax.storage.cache import DamagedObject
from nfnet_flax.storage.objects import ObjectFolder, StoredObject
from nfnet_flax.storage.url import is_url

Place = Path | BucketUrl
"""A file or folder of a set of images."""
T = TypeVar("T")
_answers: contextvars.ContextVar[dict[object, Any] | None] = contextvars.ContextVar("answers", default=None)


@contextlib.contextmanager
def asking_once() -> Iterator[None]:
    """Within the context, no folder of a bucket is listed twice, and no manifest is read twice: all checks of a set see
    the same state of it, and a start needs few requests."""
    if _answers.get() is not None:
        yield
        return
    token = _answers.set({})
    try:
        yield
    finally:
        _answers.reset(token)


def _asked(question: object, ask: Callable[[], T]) -> T:
    answers = _answers.get()
    if answers is None:
        return ask()
    if question not in answers:
        answers[question] = ask()
    found: T = answers[question]
    return found


def listing(folder: BucketUrl) -> tuple[dict[str, StoredObject], list[str]]:
    """What is directly in a folder of a bucket: the files, with what the store says about them, and the folders.

    Raises:
      OSError: they cannot be listed.
    """
    with failing():
        return _asked(folder, ObjectFolder(folder).listing)


def in_order(place: Place) -> tuple[str, ...]:
    """The key by which files are sorted: alike for a folder of this machine and for a bucket."""
    return Path(str(place)).parts


def matching(pattern: BucketUrl) -> list[BucketUrl]:
    """The files in a bucket whose names match a shell-style pattern; the folder is taken literally.

    Raises:
      OSError: they cannot be listed.
    """
    names, _ = listing(pattern.parent)
    if pattern.name in names:
        return [pattern]
    return [pattern.parent / name for name in names if fnmatch.fnmatchcase(name, pattern.name)]


def names_in(folder: Place) -> tuple[list[str], list[str]]:
    """Names of the files and of the folders directly in a folder, sorted; none if there is no such folder. Hidden ones
    are left out.

    Raises:
      OSError: they cannot be listed.
    """
    if isinstance(folder, BucketUrl):
        objects, folders = listing(folder)
        files = list(objects)
    else:
        try:
            with os.scandir(folder) as entries:
                found = [(entry.name, entry.is_dir()) for entry in entries]
        except (FileNotFoundError, NotADirectoryError):
            return [], []
        files, folders = ([name for name, is_dir in found if is_dir == wanted] for wanted in (False, True))
    return (
        sorted(name for name in files if not name.startswith(".")),
        sorted(name for name in folders if not name.startswith(".")),
    )


def is_folder(place: Place) -> bool:
    """Whether there is such a folder; in a bucket, whether there is anything in it."""
    return place.is_dir() if isinstance(place, Path) else any(names_in(place))


def is_file(place: Place) -> bool:
    """Whether there is such a file."""
    return place.is_file() if isinstance(place, Path) else place.name in names_in(place.parent)[0]


def found_by(pattern: Place) -> list[str]:
    """The files and folders of a disk, or the files of a bucket, whose paths match a shell-style pattern, sorted. In a
    bucket the folder is taken literally."""
    if isinstance(pattern, BucketUrl):
        return sorted(map(str, matching(pattern)))
    return sorted(glob.glob(escaped(pattern)))


def content_of(file: BucketUrl) -> bytes:
    """The content of a small file.

    Raises:
      FileNotFoundError: there is no such file.
      OSError: it cannot be read.
    """
    with failing():
        return _asked((file, "content"), lambda: BucketFolder(file.parent).read(file.name))


def refuse_images(field: str, value: str) -> None:
    """Raises ConfigError for a URL where a folder or a list of single images is wanted.

    Each image would be a request, and nothing known without requests would say whether it was replaced.
    """
    if not is_url(value):
        return
    command = "aws s3 cp --recursive" if value.startswith("s3:") else "gcloud storage cp --recursive"
    raise ConfigError(
        f"{field} = {value!r}: is a URL, and single images are read only from a disk of this machine: copy them by "
        f"{command} {value!r} FOLDER. To read them from a bucket, make shards of that folder by python "
        "tools/prepare_imagenet.py --folder FOLDER --no-expect-imagenet --out gs://BUCKET/SET, and give "
        "--data.source ArrayRecordSource --data.source.train 'gs://BUCKET/SET/train-*' --data.source.eval "
        "'gs://BUCKET/SET/eval-*'"
    )


@contextlib.contextmanager
def failing() -> Iterator[None]:
    """Turns the errors of a store into those that a source raises."""
    try:
        yield
    except DamagedObject as error:
        raise ConfigError(f"{error}: it was changed, or belongs to another set; copy the set again") from error
    except StorageFailed as error:
        raise OSError(str(error)) from error
