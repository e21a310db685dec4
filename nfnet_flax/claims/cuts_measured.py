"""What is measured of the runs that differ in the cut of the batch; its values are the data of the evidence."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nfnet_flax.claims.cell import RUN, Outcome, Result
from nfnet_flax.claims.child import removal
from nfnet_flax.claims.cuts import BATCH_SIZE, NUM_CLASSES, Cell, Study, model_of
from nfnet_flax.config import ConfigError
from nfnet_flax.data.digits import digits
from nfnet_flax.models import ModelConfig, convolution
from nfnet_flax.models.params import merge
from nfnet_flax.objectives import SoftmaxCrossEntropy
from nfnet_flax.progress import tracking
from nfnet_flax.training.gradient import normalise
from nfnet_flax.training.reading import NoCheckpoint, Run
from nfnet_flax.training.state import IMAGENET, model_structure

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRow:
    """One run. Numbers are None if it diverged."""

    network: str
    images_per_part: int
    num_devices: int
    seed: int
    outcome: Outcome
    top1: float | None
    """Share of held-out images, 0 to 1."""
    loss: float | None
    """Of held-out images."""
    training_mode_loss: float | None
    """Loss on training images, not augmented, in parts of `images_per_part`, with the network in training mode:
    BatchNorm normalises with the statistics of the part."""
    evaluation_mode_loss: float | None
    """Loss on the same images in evaluation mode: BatchNorm normalises with the running statistics."""
    bits: str | None
    """SHA-256 of the final parameters and running statistics."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """How far the parameters of runs are apart that differ only in the cut."""

    network: str
    seed: int
    step: int
    """Number of updates."""
    parameters: float
    """Largest absolute difference of any parameter between any two cuts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """The data of the evidence."""

    study: Study
    runs: tuple[RunRow, ...]
    differences: tuple[Difference, ...]


def from_data(data: Mapping[str, Any]) -> Measured:
    """The value of which `dataclasses.asdict` made the data of the evidence, also if it was read from JSON.

    Raises:
      ConfigError: it is something else.
    """
    try:
        study: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in data["study"].items()
        }
        return Measured(
            study=Study(**study),
            runs=tuple(RunRow(**row) for row in data["runs"]),
            differences=tuple(Difference(**row) for row in data["differences"]),
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"evidence of another form ({error}): run nfnet claim cuts again") from error


def measure(study: Study, results: Mapping[Cell, Result], folder: Path) -> Measured:
    """Measures runs from their checkpoints, on the CPU.

    Args:
      study: the study.
      results: how its runs ended.
      folder: folder of the study.

    Raises:
      ConfigError: a run has no good checkpoint.
      StorageFailed: the folder cannot be read.
    """
    rows: list[RunRow] = []
    differences: list[Difference] = []
    with tracking("measuring the runs", len(results), "runs") as task, _on_cpu():
        for cell, result in sorted(results.items()):
            rows.append(_row(cell, study, result, folder))
            task.advance()
    for (seed, network), group in itertools.groupby(sorted(results), lambda cell: (cell.seed, cell.network)):
        compared = [cell for cell in group if is_cut(cell, study) and results[cell].outcome == "finished"]
        if len(compared) > 1:
            differences += [
                Difference(network=network, seed=seed, step=step, parameters=_furthest(compared, study, step, folder))
                for step in study.compared_steps
            ]
    return Measured(study=study, runs=tuple(rows), differences=tuple(differences))


def is_cut(run: Cell | RunRow, study: Study) -> bool:
    """Whether a run is one of those that differ in the cut; the others only show the number of devices."""
    return run.num_devices == 1 and run.images_per_part in study.images_per_part


def _row(cell: Cell, study: Study, result: Result, folder: Path) -> RunRow:
    of_modes: dict[bool, float] = {}
    bits = None
    if result.outcome == "finished":
        weights = _weights(cell, study.steps, folder)
        bits = _bits(weights)
        images, labels = _training_images(study.image_size, cell.images_per_part)
        model = model_of(cell.network, study)
        of_modes = {trains: float(_loss_of(model, trains)(weights, images, labels)) for trains in (True, False)}
    return RunRow(
        network=cell.network,
        images_per_part=cell.images_per_part,
        num_devices=cell.num_devices,
        seed=cell.seed,
        outcome=result.outcome,
        top1=result.metrics.get("eval/top1"),
        loss=result.metrics.get("eval/loss"),
        training_mode_loss=of_modes.get(True),
        evaluation_mode_loss=of_modes.get(False),
        bits=bits,
    )


@contextlib.contextmanager
def _on_cpu() -> Iterator[None]:
    with jax.default_device(jax.local_devices(backend="cpu")[0]), convolution.for_platform("cpu"):
        yield


def _weights(cell: Cell, step: int, folder: Path) -> Arrays:
    try:
        return Run(folder / cell.name / RUN).weights("raw", checkpoint=step)
    except NoCheckpoint as error:
        place = folder / cell.name
        raise ConfigError(f"{place} has no good checkpoint of step {step}: {removal(place)}") from error


def _bits(arrays: Arrays) -> str:
    found = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


@functools.cache
def _training_images(image_size: int, images_per_part: int) -> tuple[np.ndarray, np.ndarray]:
    """(parts, images, H, W, 3) grey levels and (parts, images) labels, the same images for all cuts of the batch."""
    source = digits("train", image_size)
    count = len(source) // BATCH_SIZE * BATCH_SIZE
    images, labels = source.images[:count], source.labels[:count]
    return images.reshape(-1, images_per_part, *images.shape[1:]), labels.reshape(-1, images_per_part)


@functools.cache
def _loss_of(model: ModelConfig, trains: bool) -> Callable[[Arrays, np.ndarray, np.ndarray], jax.Array]:
    """The mean loss over images that are cut into parts, with the network in training mode or not."""
    structure = model_structure(model, NUM_CLASSES, normalization=IMAGENET)

    def loss(arrays: dict[str, jax.Array], images: jax.Array, labels: jax.Array) -> jax.Array:
        def of_part(rows: tuple[jax.Array, jax.Array]) -> jax.Array:
            network = merge(structure.graphdef, arrays, {})
            if not trains:
                network.eval()
            logits = network(normalise(rows[0], IMAGENET.mean, IMAGENET.std))
            return jnp.mean(SoftmaxCrossEntropy().evaluate(logits, {"label": rows[1]})["loss"])

        return jnp.mean(lax.map(of_part, (images, labels)))

    return jax.jit(loss)


def _furthest(compared: Sequence[Cell], study: Study, step: int, folder: Path) -> float:
    """Largest absolute difference of any parameter between any two runs of the same network."""
    names = model_structure(model_of(compared[0].network, study), NUM_CLASSES).shapes  # without running statistics
    weights = [_weights(cell, step, folder) for cell in compared]
    return max(float(np.max(np.ptp(np.stack([arrays[name] for arrays in weights]), axis=0))) for name in names)
