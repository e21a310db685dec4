"""Ensures that only one process at a time owns a run's folder: the lease in `owner/`.

Two processes that train in the same folder would delete each other's files. So process 0 of a run owns the folder while
it runs, and a second start ends with a message that names the owner.

Each owner has a number, one more than that of the previous owner, and two files. `00000007.json` is written once and
describes the owner; `00000007.beat.json` is rewritten every few seconds as its sign of life. Creating the first file
fails if the file already exists, so if several processes start at once, one of them becomes the owner. No lock and no
rename is needed, so an object store with conditional writes could hold a lease, too.

An owner that was killed does not block a new start for long. On its own host, the new process sees at once that the
owner no longer runs; on another host, when its sign of life has not changed for `ELSEWHERE_TIMEOUT_S`. An owner that
was only suspended for so long, and is continued later, finds a higher number than its own: then the folder belongs to
another process, and this one ends.
"""

import contextlib
import dataclasses
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nfnet_flax.config import ConfigError
from nfnet_flax.messages import warn
from nfnet_flax.storage import Folder
from nfnet_flax.training.storage import StorageFailed, storage_errors

BEAT_INTERVAL_S = 5.0
"""Interval at which an owner gives a sign of life."""
ELSEWHERE_TIMEOUT_S = 60.0
"""Time without a sign of life after which an owner on another host or in another container is considered ended."""
_LOOK_INTERVAL_S = 0.5


class LeaseLost(RuntimeError):  # noqa: N818 - it names what happened, as KeyboardInterrupt does
    """The folder has another owner now, because this process was suspended for so long that it was considered ended."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Owner:
    """The process that owns a folder."""

    host: str
    """Name of the host."""
    boot_id: str
    """The host's boot id, which changes at each start of the host; empty: not known."""
    pid_namespace: str
    """Namespace of `pid`: that of the host, or of a container."""
    pid: int
    process_start: str
    """Start time of the process, as the kernel reports it, because a later process may get the same `pid`."""
    folder_id: str
    """`Folder.identity` of the folder `owner`, which is different for a copy of the folder."""
    since: str
    """When the process became the owner, in UTC."""

    def is_of_this_host(self) -> bool:
        """Whether the owner would be visible to this process: same host, same start of the host, same namespace."""
        here = _this_process("")
        return self.boot_id != "" and (self.boot_id, self.pid_namespace) == (here.boot_id, here.pid_namespace)

    def is_running(self) -> bool:
        """Whether the owner's process exists; only valid for an owner of this host."""
        return self.process_start != "" and _process_start(self.pid) == self.process_start


class Lease:
    """The ownership of a run's folder by this process; made by `owning`."""

    def __init__(self, folder: Folder, number: int) -> None:
        self._folder = folder
        self._number = number
        self._num_beats = 0

    def check(self) -> None:
        """Checks that this process still owns the folder; to be called before anything is written there.

        Raises:
          LeaseLost: it has another owner.
          StorageFailed: it cannot be read, or was deleted or moved.
        """
        with storage_errors(self._folder, OSError):
            numbers = _numbers(self._folder)
            newest = max(numbers, default=0)
            owner = _read(self._folder, newest)[0] if newest > self._number else None
        if newest > self._number:
            raise LeaseLost(
                f"{_run_of(self._folder)} belongs to {_describe(owner)} now: this process gave no sign of life for "
                f"more than {ELSEWHERE_TIMEOUT_S:g} s (was it suspended?), so another one took over. This process "
                "ends, and the other one continues"
            )
        if self._number not in numbers:
            raise StorageFailed(f"{self._folder} was deleted or moved while this run was training")

    def beat(self, *, is_released: bool = False) -> None:
        """Gives a sign of life, or records that the folder is free."""
        self._num_beats += 1
        beat = {"number": self._num_beats, "at": _now(), "is_released": is_released}
        self._folder.put(_beat_name(self._number), json.dumps(beat).encode())


@contextlib.contextmanager
def owning(folder: Folder, on_lost: Callable[[LeaseLost], None]) -> Iterator[Lease]:
    """Makes this process the owner of a run's folder until the end of the context.

    Args:
      folder: the folder `owner` of the run; made where it does not exist.
      on_lost: called in a thread if the folder has another owner. It must end the process.

    Raises:
      ConfigError: another process owns the folder and is alive; the message says which. Or it cannot be written.
      StorageFailed: the folder is in a bucket that fails.
    """
    try:
        folder.make()
        lease = Lease(folder, _take(folder))
        lease.beat()
    except OSError as error:
        raise ConfigError(
            f"workdir {_run_of(folder)!r} cannot be written ({error.strerror}): give another one"
        ) from error
    is_over = threading.Event()

    def give_signs_of_life() -> None:
        while not is_over.wait(BEAT_INTERVAL_S):
            try:
                lease.check()
                lease.beat()
            except LeaseLost as error:
                on_lost(error)
                return
            except (StorageFailed, OSError):  # the run itself reports it when it writes
                continue

    thread = threading.Thread(target=give_signs_of_life, name="lease", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        is_over.set()
        thread.join()
        with contextlib.suppress(StorageFailed, OSError):  # a failing disk must not raise another error here
            lease.check()
            lease.beat(is_released=True)


def owner_of(folder: Folder) -> tuple[Owner, str] | None:
    """The owner of a run's folder and the time of its last sign of life (UTC); None: there is no owner. Only reads.

    An owner on another host may have ended: finding that out takes `ELSEWHERE_TIMEOUT_S`, for which this does not wait.
    """
    number = max(_numbers(folder), default=0)
    if number == 0:
        return None
    owner, beat = _read(folder, number)
    is_free = owner is None or beat.get("is_released") is True or _is_gone(owner, folder)
    return None if is_free or owner is None else (owner, beat.get("at", owner.since))


def _take(folder: Folder) -> int:
    """Becomes the owner; returns the number."""
    while True:
        newest = max(_numbers(folder), default=0)
        if newest != 0:
            _wait_until_free(folder, newest)
        number = newest + 1
        # A random text, as two starts at the same time must not write the same (`Folder.create`).
        me = dataclasses.asdict(_this_process(folder.identity)) | {"start": secrets.token_hex(8)}
        if folder.create(_owner_name(number), json.dumps(me).encode()):
            old = [other for other in _numbers(folder) if other < number]  # only the newest owner is needed
            with contextlib.suppress(StorageFailed):  # they do no harm
                folder.delete([name for other in old for name in (_owner_name(other), _beat_name(other))])
            return number


def _wait_until_free(folder: Folder, number: int) -> None:
    """Waits until it is known that the owner `number` has ended; on the same host this is known at once.

    Raises:
      ConfigError: the owner is alive.
    """
    owner, beat = _read(folder, number)
    if beat.get("is_released") is True or (owner is not None and _is_gone(owner, folder)):
        return
    if owner is not None and owner.is_of_this_host():
        raise _in_use(folder, owner, beat)
    alive_at = beat.get("at", "(none yet)")
    warn(
        f"{_run_of(folder)} belongs to {_describe(owner)}, whose last sign of life is of {alive_at}: "
        f"waiting for up to {ELSEWHERE_TIMEOUT_S:g} s for another one"
    )
    deadline = time.monotonic() + ELSEWHERE_TIMEOUT_S
    while time.monotonic() < deadline:
        time.sleep(_LOOK_INTERVAL_S)
        found = _read(folder, number)
        if found[1].get("is_released") is True or max(_numbers(folder), default=0) != number:
            return
        if found != (owner, beat):
            raise _in_use(folder, *found)


def _in_use(folder: Folder, owner: Owner | None, beat: dict[str, Any]) -> ConfigError:
    here = owner is not None and owner.is_of_this_host()
    stop = f" (kill {owner.pid} lets it save and stop)" if owner is not None and here else ""
    if owner is not None and here and owner.pid == os.getpid():
        return ConfigError(
            f"workdir {_run_of(folder)!r} is in use by this very process {owner.pid} on host {owner.host!r} (since "
            f"{owner.since}): another call of train, in another thread, is running in it. Wait for its end, or give "
            "another workdir"
        )
    return ConfigError(
        f"workdir {_run_of(folder)!r} is in use: {_describe(owner)} trains in it and gave its last sign of life at "
        f"{beat.get('at', '(none yet)')}. Wait for its end, stop it{stop}, or give another workdir"
    )


def _describe(owner: Owner | None) -> str:
    if owner is None:
        return "a process that has not yet recorded who it is"
    return f"process {owner.pid} on host {owner.host!r} (since {owner.since})"


def _is_gone(owner: Owner, folder: Folder) -> bool:
    """Whether it is known that an owner no longer runs; this is only known for an owner on this host."""
    if not owner.is_of_this_host():
        return False
    return owner.folder_id != folder.identity or not owner.is_running()


def _this_process(folder_id: str) -> Owner:
    pid = os.getpid()
    return Owner(
        host=socket.gethostname(),
        boot_id=_text_of(Path("/proc/sys/kernel/random/boot_id")),
        pid_namespace=_pid_namespace(),
        pid=pid,
        process_start=_process_start(pid),
        folder_id=folder_id,
        since=_now(),
    )


def _process_start(pid: int) -> str:
    """Start time of a process; empty if there is no such process, or if the system does not report it."""
    # The name of the program, in brackets, may contain any character; a zombie, `Z`, has ended.
    fields = _text_of(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] != "Z" else ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _text_of(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _run_of(folder: Folder) -> str:
    """The folder of the run, as text."""
    return str(folder).rpartition("/")[0]


def _owner_name(number: int) -> str:
    return f"{number:08d}.json"


def _beat_name(number: int) -> str:
    return f"{number:08d}.beat.json"


def _numbers(folder: Folder) -> list[int]:
    return [int(name.removesuffix(".json")) for name in folder.files() if re.fullmatch(r"[0-9]+\.json", name)]


def _read(folder: Folder, number: int) -> tuple[Owner | None, dict[str, Any]]:
    """The owner (None while its file is still being written) and its sign of life (empty before the first one)."""
    try:
        about = json.loads(folder.read(_owner_name(number)).decode())
        owner = Owner(**{name: value for name, value in about.items() if name != "start"})
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        owner = None
    try:
        beat = json.loads(folder.read(_beat_name(number)).decode())
    except (FileNotFoundError, ValueError):
        beat = {}
    return owner, beat if isinstance(beat, dict) else {}
