"""The login for Google Cloud Storage: that of `gcloud`, of the file of a service account, or of the machine."""

import os
import socket
from typing import Any

_STORE = ("storage.googleapis.com", 443)
_CONNECT_S = 3.0
"""Longest time in which the store must answer to who has no login, in seconds."""


def google_file_system(**options: Any) -> Any:
    """The file system of `gcsfs`; `options` are its own. Without a login, only public buckets can be used.

    `gcsfs` looks for a login by itself, but asks for that of the machine several times, and repeats requests to a store
    that cannot be reached for minutes. Waiting does not help a machine that has neither a login nor the store.

    Raises:
      GoogleAuthError: the file that GOOGLE_APPLICATION_CREDENTIALS names is no login; or there is no login, and
        without one the store cannot be reached.
    """
    import fsspec
    from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError

    if "STORAGE_EMULATOR_HOST" in os.environ:
        return fsspec.filesystem("gs", token="anon", **options)
    try:
        return fsspec.filesystem("gs", token="google_default", **options)
    except GoogleAuthError:
        if os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):  # a login was given, and cannot be used
            raise
    try:
        socket.create_connection(_STORE, timeout=_CONNECT_S).close()
    except OSError as error:
        raise DefaultCredentialsError(
            f"there is no login for Google Cloud, and {_STORE[0]} cannot be reached without one ({error})"
        ) from error
    return fsspec.filesystem("gs", token="anon", **options)
