"""The input pipeline on Grain: one stream of global batches, of which each process computes its own rows.

Nothing about it is saved in a checkpoint: the batch of step N, augmentations included, is a pure function of (seed, N),
whatever the number of processes, threads or restarts.
"""

import functools
from collections.abc import Iterator

import grain
import numpy as np

from nfnet_flax.config import require
from nfnet_flax.data import sources, transforms
from nfnet_flax.data.config import DataConfig

Rows = dict[str, np.ndarray]
# Each random stage has a seed of its own, so that adding one changes no other.
_SHUFFLE, _AUGMENT = 1, 2


def _stage_seed(seed: int, stage: int) -> int:
    return int(np.random.SeedSequence([seed, stage]).generate_state(1)[0])


def open_source(config: DataConfig, split: sources.Split) -> sources.ArraySource:
    """The images of a split."""
    return sources.digits(split, config.image_size)


def _process_rows(batch_size: int, process_index: int, num_processes: int) -> int:
    require(
        batch_size % num_processes == 0, "batch size", batch_size, f"must be divisible by {num_processes} processes"
    )
    require(0 <= process_index < num_processes, "process index", process_index, f"must be below {num_processes}")
    return batch_size // num_processes


def _iterate(dataset: grain.MapDataset, config: DataConfig) -> Iterator[Rows]:
    options = grain.ReadOptions(num_threads=config.num_threads, prefetch_buffer_size=config.prefetch_batches)
    return iter(dataset.to_iter_dataset(options))


def train_batches(
    config: DataConfig,
    source: sources.ArraySource,
    *,
    seed: int,
    start_step: int,
    num_steps: int,
    process_index: int,
    num_processes: int,
) -> Iterator[Rows]:
    """This process's rows of the global batches of steps `start_step` to `num_steps - 1`.

    Every epoch is shuffled anew; epochs run on into one another, so no example is dropped. Starting late costs nothing:
    positions are computed, not replayed.

    Args:
      config: sizes and augmentation.
      source: of the training split.
      seed: of the order and of the augmentation.
      start_step: first step whose batch is wanted.
      num_steps: of the whole run.
      process_index: process h of H holds rows `[h * B / H, (h + 1) * B / H)` of each batch.
      num_processes: H; divides `config.batch_size`.

    Yields:
      `image` (rows, size, size, 3) uint8 and `label` (rows,) int32.
    """
    rows = _process_rows(config.batch_size, process_index, num_processes)
    augment = functools.partial(
        _augment, max_degrees=config.max_degrees, max_scale=config.max_scale, max_shift=config.max_shift
    )
    dataset = (
        grain.MapDataset.source(source)
        .shuffle(seed=_stage_seed(seed, _SHUFFLE))
        .repeat()
        .random_map(augment, seed=_stage_seed(seed, _AUGMENT))
        .batch(rows, drop_remainder=True)
    )
    return _iterate(dataset[process_index::num_processes][start_step:num_steps], config)


def _augment(record: Rows, rng: np.random.Generator, *, max_degrees: float, max_scale: float, max_shift: float) -> Rows:
    return transforms.random_affine(record, rng, max_degrees=max_degrees, max_scale=max_scale, max_shift=max_shift)


def eval_batches(
    config: DataConfig, source: sources.ArraySource, *, process_index: int, num_processes: int
) -> Iterator[Rows]:
    """This process's rows of the evaluation batches: each example exactly once, the last batch filled up with padding.

    Yields:
      `image`, `label` and `mask` (rows,) float32, which is 0 for padding.
    """
    rows = _process_rows(config.eval_batch_size, process_index, num_processes)
    num_batches = -(-len(source) // config.eval_batch_size)

    def load(position: int) -> Rows:
        inside = position < len(source)
        return {**source[position if inside else 0], "mask": np.asarray(inside, np.float32)}

    dataset = grain.MapDataset.range(num_batches * config.eval_batch_size).map(load).batch(rows)
    return _iterate(dataset[process_index::num_processes], config)
