"""Checks of a bucket: what a run needs to be allowed there. They write a small object and delete it again."""

import secrets
import time

from nfnet_flax.config import ConfigError
from nfnet_flax.doctor.findings import Finding, seen, wrong
from nfnet_flax.storage import BucketFolder, BucketUrl
from nfnet_flax.training.storage import StorageFailed

_RETRY_S = 20.0


def check_bucket(url: BucketUrl) -> list[Finding]:
    """Whether a folder in a bucket can be listed, written, read and deleted, and whether an object that exists is not
    written again where it is to be new, which decides who owns a run."""
    folder = BucketFolder(url, retry_s=_RETRY_S)
    name = f"owner/doctor-{secrets.token_hex(8)}"
    started = time.perf_counter()
    num_requests = 5
    try:
        folder.files("owner")
        first = folder.create(name, b"first")
        try:
            second = folder.create(name, b"second")
            content = folder.read(name)
        finally:
            folder.delete([name])
    except (StorageFailed, ConfigError) as error:  # its message says what to do
        return [Finding(text=str(error), is_wrong=True)]
    if not first or second or content != b"first":
        remedy = "use a store that has them; without them two runs could write to one folder"
        return [wrong(f"{url}: the store has no conditional writes", remedy)]
    each_ms = 1e3 * (time.perf_counter() - started) / num_requests
    return [seen(f"{url} can be listed, written, read and deleted; about {each_ms:.0f} ms per request")]
