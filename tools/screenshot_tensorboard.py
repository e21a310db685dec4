"""Screenshots of TensorBoard: `python tools/screenshot_tensorboard.py RUN FOLDER`; needs Chromium.

Starts TensorBoard on the folder `tensorboard` of a run, opens its tabs in a headless Chromium, and writes a PNG file
for each of them into FOLDER.
"""

import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

_TABS = ("timeseries", "custom_scalars", "images", "histograms", "text", "hparams")
_SIZE = (1280, 900)
_START_TIMEOUT_S = 60
_PAGE_MS = 30_000
"""Time that a page gets to load and to draw its data, by its own clock, which runs ahead while nothing happens."""


@contextlib.contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """The URL of a TensorBoard that shows the event files of a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder)]
    with subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            _wait_for(f"{url}data/runs", server)
            yield url
        finally:
            server.terminate()


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    """Waits until TensorBoard has loaded runs."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            if answer.read().strip() not in (b"", b"[]"):
                return
        time.sleep(0.2)
    raise SystemExit("TensorBoard does not start, or finds no event files")


def shoot(browser: str, url: str, picture: Path) -> None:
    """Writes a picture of a page."""
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, "--headless", "--no-sandbox", "--hide-scrollbars"]
        command += ["--disable-3d-apis"]  # charts are then drawn by the page itself, which the picture waits for
        command += [f"--user-data-dir={profile}", f"--window-size={_SIZE[0]},{_SIZE[1]}"]
        command += [f"--virtual-time-budget={_PAGE_MS}", f"--screenshot={picture.absolute()}", url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if not picture.exists():
        raise SystemExit(f"{browser} has written no picture: {done.stderr}")


def main(run: Path, folder: Path) -> None:
    """Writes the pictures of all tabs."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("neither chromium nor google-chrome is installed")
    folder.mkdir(parents=True, exist_ok=True)
    with tensorboard(run / "tensorboard") as url:
        for tab in _TABS:
            shoot(browser, f"{url}#{tab}", folder / f"{tab}.png")
            print(folder / f"{tab}.png")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
