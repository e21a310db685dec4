"""Fetches weights from a model hub (https://huggingface.co, or the one that `HF_ENDPOINT` names).

`huggingface_hub` does the work: its cache (`HF_HOME`), its offline mode (`HF_HUB_OFFLINE=1`) and its token are used.
"""

import dataclasses
import hashlib
import io
import re
from pathlib import Path
from typing import Any

from nfnet_flax.config import ConfigError
from nfnet_flax.paths import HubName
from nfnet_flax.progress import BYTES, Task, tracking

CONFIG, WEIGHTS = "config.json", "model.safetensors"
"""Names of the two files of a repository that are read. Pickles are never fetched."""
_CHUNK_BYTES = 1 << 24


class HubUnreachable(RuntimeError):  # noqa: N818 - it names what happened, as KeyboardInterrupt does
    """The hub does not answer, or its answer broke off; trying again later may help."""


@dataclasses.dataclass(frozen=True)
class Fetched:
    """A repository's files on this machine."""

    folder: Path
    """Folder with `config.json` and `model.safetensors`."""
    source: str
    """Name of the repository, its revision, and the SHA-256 of the weights."""


def fetch(name: HubName) -> Fetched:
    """The files of a repository, downloaded unless they are in the cache, and compared with their checksums.

    Raises:
      ConfigError: the library is not installed; the repository does not exist, needs a token, or holds no such file; it
        is not in the cache in offline mode; or the cached file is damaged.
      HubUnreachable: the hub cannot be reached.
    """
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HFValidationError,
            LocalEntryNotFoundError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        raise ConfigError(f"weights {str(name)!r}: pip install 'nfnet_flax[hub]' ({error})") from error
    try:
        with tracking(f"fetching {name}", unit=BYTES) as task:
            config, weights = (
                Path(hf_hub_download(name.repository, file, revision=name.revision, tqdm_class=_bar_of(task)))
                for file in (CONFIG, WEIGHTS)
            )
    except HFValidationError as error:
        raise ConfigError(f"weights {str(name)!r}: {error}") from error
    except GatedRepoError as error:
        raise ConfigError(
            f"weights {str(name)!r}: the hub gives them only to known users: accept the terms on the hub's page of the "
            "repository, and set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"weights {str(name)!r}: the hub has no repository {name.repository!r}, or it is private (set HF_TOKEN)"
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigError(f"weights {str(name)!r}: there is no revision {name.revision!r}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, EntryNotFoundError) as error:
        raise _failure(name, error) from error
    revision = weights.parent.name[:12]
    return Fetched(config.parent, f"{name}, revision {revision}, SHA-256 {_checked(weights)}")


def _bar_of(task: Task) -> type:
    """A class that the hub's library uses to show its progress: it prints nothing, and sets that of a task."""
    from tqdm.std import tqdm

    class Bar(tqdm):
        monitor_interval = 0  # there is nothing to draw, and so nothing for a thread to do

        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **(options | {"file": io.StringIO(), "disable": False}))

        def update(self, n: float | None = 1) -> bool | None:
            found = super().update(n)
            if self.total:  # a file may have a bar for what comes, and one for what is written
                task.total, task.done = int(self.total), max(task.done, int(self.n))
            return found

    return Bar


def _failure(name: HubName, error: Exception) -> Exception:
    """What a failed download means for the user."""
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    if constants.is_offline_mode():
        return ConfigError(
            f"weights {str(name)!r}: are not in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE forbids to "
            "fetch them: unset it, or fetch them on a machine with a network and copy the cache"
        )
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return ConfigError(
            f"weights {str(name)!r}: the repository lacks {CONFIG} or {WEIGHTS}: only safetensors files of timm's "
            f"networks and of this package are read ({error})"
        )
    cause = error.__cause__ or error
    text = " ".join(str(cause).split()) or type(cause).__name__
    remedy = "check the network and HF_ENDPOINT, and try again"
    if isinstance(cause, HfHubHTTPError | OSError) and "No space left" in text:
        return ConfigError(f"weights {str(name)!r}: {text}: make room for the cache ({constants.HF_HUB_CACHE})")
    return HubUnreachable(f"weights {str(name)!r} cannot be fetched: {text}: {remedy}")


def _checked(file: Path) -> str:
    """SHA-256 of a cached file. The cache names a file by its SHA-256, or, for small files, by Git's hash of it.

    Raises:
      ConfigError: the content has another one.
    """
    blob = file.resolve()
    digest, git = hashlib.sha256(), hashlib.sha1(f"blob {blob.stat().st_size}\0".encode(), usedforsecurity=False)
    with tracking(f"checksum of {blob}", blob.stat().st_size, BYTES) as task, blob.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            git.update(chunk)
            task.advance(len(chunk))
    named_by_content = re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", blob.name)
    if named_by_content and blob.name not in (digest.hexdigest(), git.hexdigest()):
        raise ConfigError(f"weights file {str(blob)!r} is damaged: its checksum differs from its name; delete it")
    return digest.hexdigest()
