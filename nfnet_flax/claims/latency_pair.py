"""Measures the training steps of two networks in turns, on the devices at hand, in a process of its own.

`python -m nfnet_flax.claims.latency_pair FOLDER` times the steps of the networks that `FOLDER/measurement.json` names,
and writes `FOLDER/measured.json`. Compiled programs are kept beside `FOLDER`, so that a second start is quicker. What
it is doing stands in `FOLDER/phase`. When its standard input ends, as it does when the process that started it ends in
any way, it ends.
"""

import dataclasses
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nfnet_flax.claims.child import at_end_of_input, child, last_lines
from nfnet_flax.claims.latency import Form, Step, forms, recipe_of
from nfnet_flax.claims.published import NUM_IMAGES
from nfnet_flax.config import ConfigError
from nfnet_flax.exit_codes import EXIT_DONE, EXIT_STOPPED
from nfnet_flax.garbage import collect_rarely
from nfnet_flax.json_files import read_json, write_json, write_whole
from nfnet_flax.models import IMAGE_SIZES
from nfnet_flax.models.layers import ComputeDtype
from nfnet_flax.paths import made_folder
from nfnet_flax.progress import COMPUTING_LINE_S, tracking
from nfnet_flax.recipe import Recipe
from nfnet_flax.runtime import versions

_MEASUREMENT, _MEASURED, _PHASE = "measurement.json", "measured.json", "phase"
_COMPILED = "compiled"
"""Folder of compiled programs, beside those of the pairs: all pairs have the same reference."""
_POLL_S = 0.2
_TOO_LARGE = "RESOURCE_EXHAUSTED"
"""What JAX's error says if a step does not fit into the memory of a device."""
_REMEDY = "remove this folder; the same command then measures again"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a process is to measure."""

    reference: str
    """The network that it is compared with."""
    network: str
    images: int
    """Number of images of each device."""
    rounds: int
    """Number of timed steps of each of the two networks."""
    compute_dtype: ComputeDtype
    """Type of the computation."""
    image_size: int | None
    """Height and width of the images, in pixels; None: the published training size of each network."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timed:
    """The step of one network."""

    images_at_a_time: int
    rematerialization: str
    peak_bytes: int | None
    """Memory of a device by the compiler; None: it does not tell."""
    seconds: list[float]
    """Time of each timed step; empty: no form of the step fits into the memory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """What a process measured: in each round a step of the reference, then one of the network."""

    place: str
    """Kind and number of the devices."""
    reference: Timed
    network: Timed

    @property
    def ratio(self) -> float | None:
        """Time of the reference divided by that of the network, the median over the rounds; None: one does not fit."""
        pairs = zip(self.reference.seconds, self.network.seconds, strict=False)
        ratios = [reference / network for reference, network in pairs]
        return statistics.median(ratios) if ratios else None


def measured_steps(measurements: Sequence[Measurement], folder: Path) -> list[Step]:
    """The steps of several networks on the devices at hand, each measured in turns with that of its reference;
    what `folder` has already is not measured again.

    Args:
      measurements: what is to be measured.
      folder: has a folder for each network.

    Raises:
      ConfigError: a process failed, or the folder has other measurements.
      StorageFailed: a result cannot be read.
    """
    steps: list[Step] = []
    with tracking("measuring", len(measurements), "networks", at_once=True) as task:
        for measurement in measurements:
            steps.append(_step(measurement, _measured_pair(folder / measurement.network, measurement)))
            task.advance()
    return steps


def _step(measurement: Measurement, pair: Pair) -> Step:
    timed, name = pair.network, measurement.network
    return Step(
        network=name,
        place=pair.place,
        image_size=measurement.image_size or IMAGE_SIZES[name].train,
        images=measurement.images,
        images_at_a_time=timed.images_at_a_time,
        rematerialization=timed.rematerialization,
        peak_bytes=timed.peak_bytes,
        seconds=statistics.median(timed.seconds) if timed.seconds else None,
        cycles=None,
        flops=None,
        ratio=pair.ratio,
        problem="" if timed.seconds else "does not fit",
        operations=[],
    )


def _measured_pair(folder: Path, measurement: Measurement) -> Pair:
    """The kept result of a process; if there is none, runs it."""
    folder = made_folder("out", str(folder))
    given, path = folder / _MEASUREMENT, folder / _MEASURED
    wanted = {"measurement": dataclasses.asdict(measurement), "versions": versions()}
    if given.exists() and read_json(given, _REMEDY) != wanted:
        raise ConfigError(
            f"{folder} has another measurement, or one of other versions: give another --out, or remove this folder"
        )
    write_json(given, wanted)
    if not path.exists():
        (folder / _PHASE).unlink(missing_ok=True)  # of a start before
        with child("nfnet_flax.claims.latency_pair", [str(folder)], folder) as process:
            code = _waited_for(process, folder / _PHASE)
        if code != EXIT_DONE or not path.exists():
            raise ConfigError(
                f"measuring {measurement.network} ended with exit code {code} ({last_lines(folder)}): if the memory "
                "was too small, give fewer --images or a smaller --image-size"
            )
    return _pair_of(read_json(path, _REMEDY), path)


def _waited_for(process: "subprocess.Popen[bytes]", phase: Path) -> int:
    """Shows what a process is doing until it ends; returns its exit code."""
    said = "starting to measure"
    while process.poll() is None:
        with tracking(said, first_line_s=COMPUTING_LINE_S):
            while process.poll() is None and (now := _text_of(phase) or said) == said:
                time.sleep(_POLL_S)
        said = now
    return process.returncode


def _text_of(phase: Path) -> str:
    try:
        return phase.read_text()
    except FileNotFoundError:
        return ""


def _pair_of(content: Any, path: Path) -> Pair:
    try:
        return Pair(
            place=content["place"], reference=Timed(**content["reference"]), network=Timed(**content["network"])
        )
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error}): {_REMEDY}") from error


def main(folder: Path) -> int:
    """Measures; returns an exit code of `exit_codes`."""
    at_end_of_input(lambda: os._exit(EXIT_STOPPED))  # a compiler cannot be interrupted, and there is nothing to save
    import jax

    from nfnet_flax.runtime import prepare

    _keep_programs(folder.parent / _COMPILED)
    prepare()
    measurement = Measurement(**read_json(folder / _MEASUREMENT, _REMEDY)["measurement"])
    runs: list[Callable[[], float]] = []
    timed: list[Timed] = []
    names = (measurement.reference, measurement.network)
    for number, name in enumerate(names, start=1):
        _say(folder, f"compiling {name} ({number} of {len(names)} of its pair)")
        run, found = _first_that_fits(measurement, name)
        timed.append(found)
        runs += [] if run is None else [run]
    if len(runs) == len(timed):
        _say(folder, f"measuring {' and '.join(names)} in turns")
        for _ in range(measurement.rounds):
            for run, found in zip(runs, timed, strict=True):
                found.seconds.append(run())
    devices = jax.devices()
    pair = Pair(place=f"{len(devices)} x {devices[0].device_kind}", reference=timed[0], network=timed[1])
    write_json(folder / _MEASURED, dataclasses.asdict(pair))
    return EXIT_DONE


def _say(folder: Path, phase: str) -> None:
    write_whole(folder / _PHASE, phase.encode())  # as a whole: another process reads it


def _keep_programs(folder: Path) -> None:
    """Keeps all compiled programs in a folder, unless the user has chosen another one for JAX."""
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _first_that_fits(measurement: Measurement, name: str) -> tuple[Callable[[], float] | None, Timed]:
    """A function that runs a step of a network and returns its seconds, after its first step; None: none fits."""
    import jax

    for form in forms(measurement.images):
        recipe = recipe_of(
            name,
            form,
            images=measurement.images,
            num_devices=jax.device_count(),
            compute_dtype=measurement.compute_dtype,
            image_size=measurement.image_size,
        )
        try:
            run, peak_bytes = _ready_step(recipe)
            run()
        except jax.errors.JaxRuntimeError as error:
            if _TOO_LARGE not in str(error):
                raise
            continue
        return run, _timed(form, peak_bytes)
    return None, _timed(form, None)


def _timed(form: Form, peak_bytes: int | None) -> Timed:
    return Timed(
        images_at_a_time=form.images_at_a_time,
        rematerialization=form.rematerialization,
        peak_bytes=peak_bytes,
        seconds=[],
    )


def _ready_step(recipe: Recipe) -> tuple[Callable[[], float], int | None]:
    """The compiled training step of a recipe with a state and images of noise, and its memory in bytes."""
    import jax
    import jax.numpy as jnp

    from nfnet_flax.parallel.mesh import batch_sharding, make_mesh
    from nfnet_flax.programs.step_plan import lower_step
    from nfnet_flax.training.build import build_optimizer, build_structure
    from nfnet_flax.training.state import create_state

    mesh = make_mesh(jax.devices())
    compiled = lower_step(recipe, mesh)[1].compile()
    structure = build_structure(recipe, mesh)
    optimizer = build_optimizer(recipe, structure, NUM_IMAGES)
    held = [create_state(structure, recipe.seed, optimizer, mesh)]
    shape = (recipe.data.batch_size, recipe.data.image_size, recipe.data.image_size, 3)
    pixels = jax.random.randint(jax.random.key(0), shape, 0, 256).astype(jnp.uint8)
    batch = {
        "image": jax.device_put(pixels, batch_sharding(mesh, 4)),
        "label": jax.device_put(jnp.arange(shape[0]) % recipe.num_classes, batch_sharding(mesh)),
    }

    def run() -> float:
        started = time.perf_counter()
        held[0], metrics = compiled(held[0], batch, {})
        jax.block_until_ready(metrics)
        return time.perf_counter() - started

    memory = compiled.memory_analysis()
    if memory is None:
        return run, None
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return run, memory.argument_size_in_bytes + kept + memory.temp_size_in_bytes


if __name__ == "__main__":
    collect_rarely()
    sys.exit(main(Path(sys.argv[1])))
