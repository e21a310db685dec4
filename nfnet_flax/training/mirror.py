"""Copies the folder of a run between this machine and a bucket.

Objects have the names of the files (`layout.py`), and are written whole. In addition:

    checkpoints/STEP/commit.json    written after all other objects of the checkpoint, which it lists with sizes and
                                    digests
    checkpoints/STEP/begun.json     written before all other objects, and deleted at the end: what has it, and no
                                    commit.json, is incomplete. A checkpoint that somebody copied here has neither, and
                                    is taken as it is
    checkpoints/STEP/damaged.json   marks a checkpoint that was found damaged; its objects are kept

The same for `best/STEP`. Records (the run's files besides checkpoints and `owner/`) are put before the checkpoint that
relies on them. Only the owner of the run writes; before each attempt it makes sure that it still is.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nfnet_flax.json_files import write_json, write_whole
from nfnet_flax.messages import warn
from nfnet_flax.progress import BYTES, track, tracking
from nfnet_flax.storage import BucketFolder, BucketUrl, bucket_url
from nfnet_flax.storage.bucket import RETRY_S
from nfnet_flax.storage.scratch import scratch_errors
from nfnet_flax.training.layout import (
    AGC,
    CHECKPOINT_KINDS,
    CLASSES,
    CODE,
    COMMIT,
    ENVIRONMENT,
    EVENTS,
    INITIAL,
    INPUT,
    LOG,
    METRICS,
    NOTES,
    NOTES_FILE,
    PROFILES,
    RECIPE,
    SET_ASIDE,
    TENSORBOARD,
    TRACKER_FILES,
    TRACKERS,
    Damaged,
    steps_in,
)
from nfnet_flax.training.storage import StorageFailed

BEGUN = "begun.json"
DAMAGED = "damaged.json"
_IN_BUCKET = ".in_bucket.json"
"""File in the folder of a checkpoint on this machine whose arrays are still only in the bucket: it says where."""
_SMALL = (f"{NOTES}/{NOTES_FILE}", "_CHECKPOINT_METADATA")
"""Files of a checkpoint that are copied at once: the notes, and one that Orbax reads when it looks for checkpoints."""
_RECORD_FOLDERS = (CODE, TENSORBOARD, TRACKER_FILES, SET_ASIDE, LOG)
_FOR_THE_OWNER = (f"{TENSORBOARD}/", f"{TRACKER_FILES}/")
_RECORD = re.compile(
    rf"{RECIPE}|{INPUT}|{CLASSES}|{INITIAL}|{ENVIRONMENT}|environment-until-step-[0-9]+\.json|{METRICS}|{AGC}|{EVENTS}"
    rf"|{TRACKERS}|(?!{TENSORBOARD}/{PROFILES}/)({'|'.join(_RECORD_FOLDERS)})/.+"
)
"""Names of records. Whatever else is in the folder, such as another run, is not touched. Profiles are no records: they
are large, and each process puts its own into the bucket."""
_STEP = re.compile(rf"(?P<kind>{'|'.join(CHECKPOINT_KINDS)})/(?P<step>[0-9]+)/(?P<name>.+)")
_CHECK_INTERVAL_S = 5.0
"""Time for which it is taken for granted that this process still owns the run: less than another one would wait."""
_NUM_THREADS = 8
"""Number of files that are copied at the same time."""


class Mirror:
    """Copies the folder of one run.

    Each method raises `StorageFailed` if the bucket fails.
    """

    def __init__(self, url: BucketUrl, path: Path, *, is_owner: bool) -> None:
        """Copies nothing yet.

        Args:
          url: the folder in the bucket.
          path: the folder on this machine.
          is_owner: whether this process will write to the run. Others need no files of TensorBoard and of trackers.
        """
        self.url = url
        self.path = path
        self._is_owner = is_owner
        self._bucket = BucketFolder(url)
        self._known: dict[str, tuple[int, int]] = {}
        """Name of a record that is equal here and in the bucket -> size and time of change of the file here."""
        self._lock = threading.Lock()

    def own(self, check: Callable[[], None]) -> None:
        """Called when this process owns the run; `check` raises an error if it does not any more."""
        self._bucket = self._bucket.fenced(_at_most_every(_CHECK_INTERVAL_S, check))

    def pull(self) -> None:
        """Copies records, and the notes of complete checkpoints; what the bucket does not hold is removed here."""
        with self._lock, scratch_errors():
            found = self._bucket.files()
            records = {name for name in found if _is_record(name) and not _is_log(name)}
            if not self._is_owner:
                records = {name for name in records if not name.startswith(_FOR_THE_OWNER)}
            steps = _steps_of(found)
            for name in {name for name in _records_of(self.path) if not _is_log(name)} - records:
                (self.path / name).unlink(missing_ok=True)
                self._known.pop(name, None)
            self._download_all(records)
            for kind in CHECKPOINT_KINDS:
                for step in set(steps_in(self.path / kind)) - steps[kind].keys():
                    shutil.rmtree(self.path / kind / str(step), ignore_errors=True)
            wanted = [(kind, step) for kind, ones in steps.items() for step, is_good in ones.items() if is_good]
            with ThreadPoolExecutor(_NUM_THREADS) as readers:
                list(readers.map(lambda one: self._pull_notes(one[0], one[1], found), wanted))
            if any(not is_good for ones in steps.values() for is_good in ones.values()):
                (self.path / SET_ASIDE).mkdir(exist_ok=True)

    def _download_all(self, names: set[str]) -> None:
        def download(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                # Read whole, as the owner may replace it by a longer one meanwhile.
                write_whole(self._made(name), self._bucket.read(name))
                self._known[name] = _state_of(self.path / name)

        with ThreadPoolExecutor(_NUM_THREADS) as readers:
            copied = readers.map(download, sorted(names))
            list(track(copied, f"copying the records of {self.url}", "files", len(names)))

    def _made(self, name: str) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _pull_notes(self, kind: str, step: int, found: dict[str, int]) -> None:
        checkpoint = self.path / kind / str(step)
        if checkpoint.exists():
            return
        prefix = f"{kind}/{step}/"
        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
            files = self._files_of(prefix, found)
            partial = checkpoint.parent / f".{step}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for name in _SMALL:
                if name in files:
                    (partial / name).parent.mkdir(exist_ok=True)
                    with contextlib.suppress(FileNotFoundError):  # then it is damaged, as its reader will find
                        (partial / name).write_bytes(self._bucket.read(prefix + name))
            write_json(partial / _IN_BUCKET, {"files": files, "url": str(self.url / kind / str(step))})
            partial.rename(checkpoint)

    def _files_of(self, prefix: str, found: dict[str, int]) -> dict[str, Any]:
        """Name of each file of a checkpoint -> its size and digest; there is no digest if somebody copied it here."""
        if prefix + COMMIT not in found:
            inside = [name for name in found if name.startswith(prefix)]
            return {name.removeprefix(prefix): [found[name], None] for name in inside}
        try:
            files = json.loads(self._bucket.read(prefix + COMMIT).decode())["files"]
        except (ValueError, KeyError, TypeError):  # then the notes are missing, too, and its reader will say so
            return {}
        return files if isinstance(files, dict) else {}

    def push(self) -> None:
        """Copies records that changed, and deletes those in the bucket that were deleted here."""
        with self._lock:
            now = {name: _state_of(self.path / name) for name in _records_of(self.path)}
            for name in sorted(now):
                if self._known.get(name) != now[name]:
                    with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                        # Read at once, as a file that grows while it is sent would be refused.
                        self._bucket.put(name, (self.path / name).read_bytes())
                        self._known[name] = now[name]
            gone = [name for name in self._known if name not in now]
            for name in gone:
                del self._known[name]
            try:
                self._bucket.delete(gone)
            except StorageFailed as error:
                warn(f"files that are no longer needed could not be deleted: {error}")

    def commit(self, kind: str, step: int) -> None:
        """Copies a complete checkpoint; it counts from the moment at which its last object is there."""
        checkpoint = self.path / kind / str(step)
        names = sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
        old = [name for name in self._bucket.files(f"{kind}/{step}") if name]
        begun = f"{kind}/{step}/{BEGUN}"
        self._bucket.put(begun, b"{}")
        # What says that the old objects are a checkpoint goes first.
        last = [f"{kind}/{step}/{name}" for name in (COMMIT, DAMAGED)]
        self._bucket.delete(name for name in last if name in old)
        with contextlib.suppress(StorageFailed):  # what the new list does not name does no harm
            self._bucket.delete(name for name in old if name not in (*last, begun))

        def upload(name: str) -> tuple[str, list[Any]]:
            self._bucket.upload(checkpoint / name, f"{kind}/{step}/{name}")
            return name, [(checkpoint / name).stat().st_size, _digest(checkpoint / name)]

        with ThreadPoolExecutor(_NUM_THREADS) as writers:
            files = dict(writers.map(upload, names))
        self._bucket.put(f"{kind}/{step}/{COMMIT}", json.dumps({"files": files}, indent=1).encode())
        with contextlib.suppress(StorageFailed):  # as above
            self._bucket.delete([begun])

    def clean(self, kind: str) -> None:
        """Deletes checkpoints in the bucket that are not kept here any more, and objects of incomplete ones.

        If that fails, a warning says so, and the next call tries again.
        """
        try:
            found = self._bucket.files(kind)
            kept = set(steps_in(self.path / kind))
            steps = _steps_of(found)[kind]
            for step in {int(match["step"]) for name in found if (match := _STEP.fullmatch(name))} - kept:
                if steps.get(step) is False:  # marked as damaged
                    continue
                names = [name for name in found if name.startswith(f"{kind}/{step}/")]
                begun = f"{kind}/{step}/{BEGUN}"  # so that what is left is not taken for a checkpoint
                self._bucket.put(begun, b"{}")
                self._bucket.delete(name for name in names if name.endswith(f"/{COMMIT}"))
                self._bucket.delete(name for name in names if name != begun)
                self._bucket.delete([begun])
        except StorageFailed as error:
            warn(f"old checkpoints could not be deleted, which does no harm but takes room: {error}")

    def set_aside(self, checkpoint: Path) -> None:
        """Marks a checkpoint as damaged, and removes it here; does nothing if it was deleted meanwhile."""
        if not checkpoint.exists():
            return
        kind, step = checkpoint.parent.name, checkpoint.name
        self._bucket.put(f"{kind}/{step}/{DAMAGED}", b"{}")
        shutil.rmtree(checkpoint)
        (self.path / SET_ASIDE).mkdir(exist_ok=True)
        warn(
            f"{checkpoint} is marked as damaged by {DAMAGED} and kept until the run saves this step again: copy it "
            "elsewhere if you want to look at it, or delete it"
        )


def fetch_state(checkpoint: Path) -> None:
    """Copies the arrays of a checkpoint from its bucket, if they are not here yet; does nothing for other checkpoints.

    Raises:
      Damaged: an object is missing or differs from what was saved; or the checkpoint was deleted meanwhile: then there
        is no folder any more.
      StorageFailed: the bucket cannot be read.
    """
    path = checkpoint / _IN_BUCKET
    if not path.exists():
        return
    commit = json.loads(path.read_bytes().decode())
    url = bucket_url("checkpoint", commit["url"])
    assert url is not None
    bucket = BucketFolder(url)

    def download(name: str) -> None:
        size, digest = commit["files"][name]
        target = checkpoint / name
        if name not in there:
            raise Damaged(f"{name} is missing")
        if there[name] != size:
            raise Damaged(f"{name} has {there[name]} bytes instead of {size}")
        try:
            bucket.download(name, target, size=size, on_bytes=task.advance)
        except FileNotFoundError as error:
            raise Damaged(f"{name} is missing") from error
        if digest is not None and _digest(target) != digest:
            raise Damaged(f"{name} is not what was saved")

    there = bucket.files()
    try:
        num_bytes = sum(size for size, _ in commit["files"].values())
        with (
            tracking(f"copying {url}", num_bytes, BYTES) as task,
            scratch_errors(),
            ThreadPoolExecutor(_NUM_THREADS) as readers,
        ):
            list(readers.map(download, commit["files"]))
    except Damaged:
        if not bucket.files():
            shutil.rmtree(checkpoint, ignore_errors=True)
        raise
    path.unlink()


def _at_most_every(interval_s: float, check: Callable[[], None]) -> Callable[[], None]:
    """A function that calls `check`, unless it was called a short time ago, by each of the clocks: one of them may stop
    while the machine sleeps."""
    last: list[tuple[float, float]] = []

    def call() -> None:
        now = started = time.monotonic(), time.time()
        while not last or any(abs(after - before) > interval_s for before, after in zip(last[0], now, strict=True)):
            try:
                check()
                last[:] = [now]
            except StorageFailed:
                if time.monotonic() - started[0] > RETRY_S:
                    raise
                time.sleep(1.0)
            now = time.monotonic(), time.time()

    return call


def _is_record(name: str) -> bool:
    is_partial = any(part.startswith(".") or part.endswith(".partial") for part in name.split("/"))
    return _RECORD.fullmatch(name) is not None and not is_partial


def _is_log(name: str) -> bool:
    """Whether a record is a log, which nobody reads here: those of earlier starts stay in the bucket."""
    return name.startswith(f"{LOG}/")


def _records_of(path: Path) -> list[str]:
    found = []
    for folder, folders, files in os.walk(path):
        if Path(folder) == path:  # other threads make and delete files in the folders of checkpoints
            folders[:] = [name for name in folders if name in _RECORD_FOLDERS]
        found += [Path(folder, name).relative_to(path).as_posix() for name in files]
    return [name for name in found if _is_record(name)]


def _state_of(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except FileNotFoundError:
        return (-1, -1)
    return status.st_size, status.st_mtime_ns


def _steps_of(names: dict[str, int]) -> dict[str, dict[int, bool]]:
    """Kind -> step of a complete checkpoint -> whether it is not marked as damaged."""
    of_step: dict[tuple[str, int], set[str]] = defaultdict(set)
    for name in names:
        if (match := _STEP.fullmatch(name)) is not None:
            of_step[match["kind"], int(match["step"])].add(match["name"])
    found: dict[str, dict[int, bool]] = {kind: {} for kind in CHECKPOINT_KINDS}
    for (kind, step), ones in of_step.items():
        if COMMIT in ones or DAMAGED in ones or BEGUN not in ones:
            found[kind][step] = DAMAGED not in ones
    return found


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
