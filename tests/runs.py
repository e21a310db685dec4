"""Real `nfnet train` processes on the digits recipe."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from nfnet_flax.parallel.processes import current
from nfnet_flax.recipe import Recipe
from nfnet_flax.training.identity import claim
from nfnet_flax.training.metrics import MetricsLog
from nfnet_flax.training.mirror import fetch_state
from nfnet_flax.training.record import fixed_class_names
from nfnet_flax.training.run_folder import RunFolder, reading
from nfnet_flax.training.setup import assemble

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "recipes" / "digits.py"
STEPS = 60
NUM_HELD_OUT = 240
OPTIONS = [
    f"--num-steps={STEPS}",
    "--log-every-steps=1",
    "--eval-every-steps=20",
    "--checkpoint.every-steps=20",
    "--no-tensorboard",
]
SMALL = ["--model.widths=32", "--model.depths=1"]
"""The recipe's NFNet, smaller."""
FEW_IMAGES = [
    "--data.batch-size=16",
    f"--data.num-held-out={NUM_HELD_OUT}",
    "--data.image-size=16",
    "--data.eval-image-size=16",
]
"""Options that make a step and an evaluation of the digits recipe small. Its own images have 32 px."""
OPTIMIZED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}
"""Environment of a run that is compiled as users' runs are; `conftest.py` has the suite's."""


def with_devices(count: int) -> dict[str, str]:
    """Environment of a process that has so many CPU devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}".strip()
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def recipe_with(model: str, folder: Path) -> Path:
    """The digits recipe with another network, given in one line."""
    text = DIGITS.read_text()
    start = text.index("        model=NFNetConfig(")
    end = text.index("        num_classes=")
    path = folder / "mine.py"
    text = text[:start] + f"        model={model},\n" + text[end:]
    path.write_text(text.replace("import NFNetConfig\n", "import *\n"))
    return path


def command(
    workdir: Path | str, *options: str, recipe: Path = DIGITS, program: Sequence[str] = ("-m", "nfnet_flax.cli")
) -> list[str]:
    """The command line of a short run; `program` is what Python runs in place of the command `nfnet`."""
    small = [*SMALL, *FEW_IMAGES] if recipe == DIGITS else []
    words = [word for option in [*OPTIONS, *small, *options] for word in option.replace("=", " ").split(" ")]
    return [sys.executable, *program, "train", str(recipe), "--workdir", str(workdir), *words]


def start(
    workdir: Path | str,
    *options: str,
    recipe: Path = DIGITS,
    environment: dict[str, str] | None = None,
    output: int | IO[str] = subprocess.PIPE,
    program: Sequence[str] = ("-m", "nfnet_flax.cli"),
) -> subprocess.Popen[str]:
    """Starts a run in a process group of its own; it prints into `output`."""
    return subprocess.Popen(
        command(workdir, *options, recipe=recipe, program=program),
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1", **(environment or {})},
        start_new_session=True,
    )


def start_all(
    workdir: Path | str,
    num_processes: int,
    *options: str,
    recipe: Path = DIGITS,
    of_last: tuple[str, ...] = (),
    outputs: Sequence[int | IO[str]] | None = None,
    environment: dict[str, str] | None = None,
    environment_of_last: dict[str, str] | None = None,
    program_of_last: Sequence[str] = ("-m", "nfnet_flax.cli"),
) -> list[subprocess.Popen[str]]:
    """Starts a run of several processes on this machine; what is `of_last` only the last one gets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    joined = (f"--distributed.coordinator-address={address}", f"--distributed.num-processes={num_processes}")
    return [
        start(
            workdir,
            *options,
            *joined,
            f"--distributed.process-id={index}",
            *(of_last if is_last else ()),
            recipe=recipe,
            output=subprocess.PIPE if outputs is None else outputs[index],
            environment={**(environment or {}), **(environment_of_last or {})} if is_last else environment,
            program=program_of_last if is_last else ("-m", "nfnet_flax.cli"),
        )
        for index in range(num_processes)
        for is_last in (index == num_processes - 1,)
    ]


def claimed(workdir: Path, recipe: Recipe, initial: dict[str, str] | None = None, *, logs: bool = True) -> list[str]:
    """Records a run in a folder, or checks that it is the same, as every start does; returns what is said.

    With `logs`, there is a metric of a step afterwards, as if the run had been killed before its first checkpoint.
    """
    setup = assemble(recipe, fixed_class_names(workdir))
    said = claim(current(), RunFolder(workdir), setup.identity(initial), 60.0)
    if logs:
        with contextlib.closing(MetricsLog(workdir, resume_step=0, evaluated=False, tensorboard=False)) as log:
            log.write(1, {"train/loss": 1.0})
    return said


def finish(process: subprocess.Popen[str]) -> str:
    """Waits for the end of a run; returns what it has printed that was not read yet."""
    timer = threading.Timer(300, lambda: os.killpg(process.pid, signal.SIGKILL))
    timer.start()
    try:
        # Not `communicate`, which leaves out lines that are in the buffer of a stream that was read line by line.
        printed = ""
        if process.stdout is not None and not process.stdout.closed:
            printed = process.stdout.read()
            process.stdout.close()
        process.wait()
    finally:
        timer.cancel()
    return printed


def signal_at(
    process: subprocess.Popen[str],
    step: int,
    number: signal.Signals,
    saved: Path | None = None,
    to: subprocess.Popen[str] | None = None,
) -> str:
    """Sends a signal to the whole process group once the run reports `step`; returns all that it printed.

    Where `saved` is given, it waits for that checkpoint, too: it is written in the background, beside the steps.
    With `to`, the signal goes to the group of that process instead.
    """
    assert process.stdout is not None
    printed = []
    for line in process.stdout:
        printed.append(line)
        if re.match(rf"step +{step}/", line):
            while saved is not None and not saved.exists() and process.poll() is None:
                time.sleep(0.001)
            os.killpg((to or process).pid, number)
            break
    return "".join(printed) + finish(process)


def saved_arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, by name, read without the package's own code."""
    folder = (workdir / "checkpoints" / str(step) / "state").absolute()
    with ocp.PyTreeCheckpointer() as reader:
        as_numpy = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(folder).item_metadata
        )
        tree = reader.restore(folder, restore_args=as_numpy)
    leaves: list[tuple[Any, Any]] = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def copied(url: str, step: int) -> Path:
    """A copy of a run in a bucket, with the arrays of one checkpoint."""
    folder = reading("workdir", url)
    _COPIES.append(folder)
    fetch_state(folder.path / "checkpoints" / str(step))
    return folder.path


_COPIES: list[RunFolder] = []
"""What `copied` returned, as a copy is deleted with its value."""


def damage(checkpoint: Path) -> None:
    """Flips bits all over the arrays of a checkpoint: those of weights, and those that only training reads."""
    for path in checkpoint.glob("state/ocdbt.process_0/d/*"):
        content = bytearray(path.read_bytes())
        for position in range(50, len(content), 100):
            content[position] ^= 1
        path.write_bytes(content)
