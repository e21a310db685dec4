"""The log of a run: what each start of it printed, and the tracebacks of its errors, in `WORKDIR/log`.

Each process writes a file of its own, so that their lines do not mix; it makes it with the first line, and processes
other than the first print hardly anything. Only commands keep a log: in Python code, errors are raised.
"""

import contextlib
import datetime
import secrets
from collections.abc import Iterator

from nfnet_flax import session_log
from nfnet_flax.parallel.processes import Processes
from nfnet_flax.training.layout import LOG
from nfnet_flax.training.lease import LeaseLost
from nfnet_flax.training.run_folder import RunFolder
from nfnet_flax.training.storage import StorageFailed


@contextlib.contextmanager
def logged(folder: RunFolder, processes: Processes) -> Iterator[None]:
    """From now on, what this process prints is written to a file in the run's folder; so is the traceback of an error
    that is raised within the context.

    For a run in a bucket, the file is closed at the end of the context; the caller sends it with the other records
    then.
    """
    log = session_log.current()
    in_bucket = folder.mirror is not None
    if log is None or (in_bucket and not processes.is_first):  # whose files would be sent nowhere
        yield
        return
    time = datetime.datetime.now(datetime.UTC)
    name = f"{time:%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}-process-{processes.index}.log"
    log.open(folder.path / LOG / name, f"{folder}/{LOG}/{name}")
    try:
        yield
    except BaseException as error:
        log.keep_traceback(error)
        if in_bucket and isinstance(error, StorageFailed | LeaseLost):  # then the file will not get there
            log.forget_traceback()
        raise
    finally:
        if in_bucket:
            log.close()
