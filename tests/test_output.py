"""What is printed is not the run: readers go away, disks are full, streams closed; and the API gives the same bits."""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nfnet_flax.output import OutputLost, guarded_output
from tests import runs

RECIPE = '''"""A few steps of a small network."""

from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.source_config import DigitsSource
from nfnet_flax.models import NFNetConfig
from nfnet_flax.optim import OptimConfig
from nfnet_flax.recipe import Recipe


def recipe() -> Recipe:
    model = NFNetConfig(
        widths=(32,), depths=(1,), group_width=8
    )
    data = DataConfig(
        source=DigitsSource(), image_size=16, eval_image_size=16, batch_size=16,
        num_held_out=24, eval_batch_size=24
    )
    optim = OptimConfig(learning_rate_per_256=1.6, warmup_epochs=0.0)
    return Recipe(
        name="tiny", num_classes=10, model=model, data=data, optim=optim, num_steps=3, log_every_steps=1,
        eval_every_steps=3, tensorboard=False,
    )
'''
API = """
import asyncio, sys, threading
import nfnet_flax
recipe = nfnet_flax.load_recipe(sys.argv[1])
rows = {}
def keep(step, metrics):
    rows.setdefault(step, {"step": step}).update(metrics)
result = nfnet_flax.train(recipe, "plain", on_metrics=keep)
assert result.finished and set(result.metrics.items()) <= set(rows[3].items())
assert nfnet_flax.Run("plain").metrics() == [rows[step] for step in (1, 2, 3)]
thread = threading.Thread(target=nfnet_flax.train, args=(recipe, "thread"))
thread.start()
thread.join()
async def main():
    nfnet_flax.train(recipe, "loop")
asyncio.run(main())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the recipe, and the run of a command whose reader went away, on a terminal that knows ASCII only."""
    folder = tmp_path_factory.mktemp("größe")
    (folder / "tiny.py").write_text(RECIPE)
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = nfnet("train", "tiny.py", "--workdir", str(folder / "command"), cwd=folder, stdout=write_end)
    os.close(write_end)
    assert done.returncode == 0, done.stderr
    assert "stdout cannot be written ([Errno 32] Broken pipe); the run goes on without it" in done.stderr
    assert "Exception ignored" not in done.stderr
    return folder


def nfnet(*words: str, cwd: Path, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    """Runs the command as users do, with the size of the thread pool that they get."""
    return python("-m", "nfnet_flax.cli", *words, cwd=cwd, stdout=stdout)


def python(*words: str, cwd: Path, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    """Runs Python on a machine that gives XLA's thread pool another size than `nfnet` does."""
    environment = {name: value for name, value in os.environ.items() if name != "NPROC"}
    environment |= {"PYTHONIOENCODING": "ascii", "JAX_COMPILATION_CACHE_DIR": str(cwd / "compiled")}
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**environment, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(runs.ROOT)},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )


def test_the_api_gives_the_bits_of_the_command(folder: Path) -> None:
    done = python("-c", API, str(folder / "tiny.py"), cwd=folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    wanted = runs.saved_arrays(folder / "command", 3)
    for run in ("plain", "thread", "loop"):
        found = runs.saved_arrays(folder / run, 3)
        assert found.keys() == wanted.keys()
        assert all(np.array_equal(found[name], wanted[name]) for name in wanted), run


def test_a_listing_ends_quietly_when_nobody_reads_on(tmp_path: Path) -> None:
    for words in (["--help"], ["train", "--help"], ["models", "--help"], ["doctor", "--timeout-s", "20"]):
        read_end, write_end = os.pipe()
        os.close(read_end)
        done = nfnet(*words, cwd=tmp_path, stdout=write_end)
        os.close(write_end)
        assert done.stderr == "", words
        assert done.returncode == 141, words
    with open("/dev/full", "w") as full:
        done = nfnet("--help", cwd=tmp_path, stdout=full.fileno())
    assert done.returncode == 2
    assert done.stderr == "nfnet: error: stdout cannot be written ([Errno 28] No space left on device)\n"


def test_a_command_without_standard_streams_does_not_print_into_its_files(tmp_path: Path) -> None:
    program = """
import os, sys
from nfnet_flax import cli
assert sys.stdout is None
assert cli.main(["--help"]) == 0
with open("file", "w") as file:  # gets the smallest number that is free
    os.write(1, b"a message of a C++ library")
"""
    command = f"exec {sys.executable} -c '{program}' >&- <&-"
    environment = {**os.environ, "PYTHONPATH": str(runs.ROOT)}
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "file").read_text() == ""


@contextlib.contextmanager
def stdout_is(stream: io.TextIOBase | None) -> Iterator[None]:
    """Replaces stdout as a notebook does."""
    before, sys.stdout = sys.stdout, stream
    try:
        yield
    finally:
        sys.stdout = before


def test_output_that_cannot_be_written_is_dropped_or_told() -> None:
    told = io.StringIO()
    closed = io.StringIO()
    closed.close()
    full = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")
    for stream, reason in ((full, "No space left"), (closed, "closed file")):
        with stdout_is(stream), contextlib.redirect_stderr(told), guarded_output(goes_on=True):
            print("one", flush=True)
            print("two", flush=True)
        assert told.getvalue().count("stdout cannot be written") == told.getvalue().count(reason) == 1
        told.truncate(0)
        with stdout_is(stream), pytest.raises(OutputLost), guarded_output(goes_on=False):
            print("one", flush=True)
        with contextlib.suppress(OSError):
            stream.close()


def test_output_goes_where_the_caller_wants_it() -> None:
    with stdout_is(None), guarded_output(goes_on=True):
        print("nowhere")
        assert not sys.stdout.isatty()
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with stdout_is(ascii_only), guarded_output(goes_on=False):
        print("größe")
        assert sys.stdout.encoding == "ascii"
    assert ascii_only.buffer.getvalue() == b"gr\\xf6\\xdfe\n"
