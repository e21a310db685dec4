"""The input pipeline: one stream of global batches, of which each process computes its own rows.

Checkpoints do not store any state of it: the batch of step N, augmentations included, is a pure function of (seed, N),
whatever the number of processes, worker processes, threads or restarts. Grain composes that function; `prefetch`
computes it ahead of the step.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from nfnet_flax.config import require
from nfnet_flax.config_json import differences, to_json
from nfnet_flax.data.buckets import asking_once
from nfnet_flax.data.config import RESUMABLE_FIELDS, DataConfig
from nfnet_flax.data.examples import eval_example, rand_augment_example, rand_augment_rows, train_example
from nfnet_flax.data.mixing import mix
from nfnet_flax.data.prefetch import Batches, InputFailed, Lane, Rows, ThreadLane
from nfnet_flax.data.random_access import Source, Split, begin_copying, check_memory, read_ahead, split_off
from nfnet_flax.data.sources import open_source
from nfnet_flax.data.workers import BatchTable, WorkerProcess
from nfnet_flax.messages import warn

INPUT_FORMAT = 2
"""Version of the input; it is increased when the same settings and images give other batches than before."""

# Each random stage has a seed of its own, so that adding one changes no other.
_SHUFFLE, _AUGMENT, _RANDAUGMENT, _MIX = 1, 2, 3, 4


def open_split(config: DataConfig, split: Split, class_names: Sequence[str] | None = None) -> Source:
    """The examples of a split. With `num_held_out`, the first training examples belong to the held-out split instead.

    Args:
      config: the set, and how much of it is held out.
      split: which part of the set.
      class_names: class names of the run, in the order of its labels. The labels of the split follow these names; it
        may lack some of them. None: the training split's own names.

    Raises:
      ConfigError: the set is missing, empty or incomplete; it has a class that is not in `class_names`; nothing is left
        to train on; or the training split, when it is opened, shares examples with the held-out split.
      InputFailed: the disk or the network failed.
    """
    with reading(split):
        return _open_split(config, split, class_names)


@contextlib.contextmanager
def reading(split: Split) -> Iterator[None]:
    """Turns a failure of the disk or the network, while a split is opened, into `InputFailed`; a bucket is asked for
    nothing twice.

    Raises:
      InputFailed: the disk or the network failed.
    """
    try:
        with asking_once():
            yield
    except OSError as error:
        raise InputFailed(f"the {split} split cannot be read: {error}") from error


def _open_split(config: DataConfig, split: Split, class_names: Sequence[str] | None) -> Source:
    image_size = config.image_size if split == "train" else config.eval_image_size
    if config.num_held_out is None:
        if split == "train":
            config.source.check_splits()
        return open_source(config.source, split, image_size, class_names)
    whole = open_source(config.source, "train", image_size, class_names)
    remedy = f"must be below the {len(whole)} training examples"
    require(config.num_held_out < len(whole), "data.num_held_out", config.num_held_out, remedy)
    start, stop = (0, config.num_held_out) if split == "eval" else (config.num_held_out, len(whole))
    return split_off(whole, start, stop)


def check_batches_fit(config: DataConfig, splits: Sequence[Split], num_processes: int) -> None:
    """Raises `ConfigError` if the prefetched batches would take more than all memory of this machine."""
    for split in splits:
        field, batch_size, size = "data.batch_size", config.batch_size, config.image_size
        if split == "eval":
            field, batch_size, size = "data.eval_batch_size", config.eval_batch_size, config.eval_image_size
        num_bytes = -(-batch_size // num_processes) * size * size * 3 * config.prefetch_batches
        of_each = "" if num_processes == 1 else f" in each of {num_processes} processes"
        what = f"data.prefetch_batches = {config.prefetch_batches} of such batches of {size} px{of_each}"
        check_memory(field, batch_size, num_bytes, what)


def say_unused(*sources: Source) -> None:
    """Reports, once, the files in the sets that are not used."""
    for found in dict.fromkeys(found for source in sources for found in source.unused):
        warn(found.text)


def train_batches(
    config: DataConfig,
    source: Source,
    *,
    seed: int,
    start_step: int,
    num_steps: int,
    process_index: int,
    num_processes: int,
) -> Batches:
    """This process's rows of the global batches of steps `start_step` to `num_steps - 1`. To be closed by the caller.

    Every epoch is shuffled anew. A batch may contain the end of one epoch and the beginning of the next, so no example
    is dropped. Starting at a late step costs nothing: positions are computed, not replayed.

    Args:
      config: sizes, augmentation, and the number of threads or processes.
      source: the training split.
      seed: random seed of the order and of the augmentation.
      start_step: first step whose batch is wanted.
      num_steps: number of steps of the whole run.
      process_index: process h of H gets rows `[h * B / H, (h + 1) * B / H)` of each batch of B rows.
      num_processes: H; divides `config.batch_size` into parts that hold whole groups of `config.mixing`.

    Returns:
      Iterator of `image` (rows, size, size, 3) uint8 and `label` (rows,) int32; with mixing also `mix_label` (rows,)
      int32 and `label_weight` (rows,) float32; with `on_corrupt="skip"` also `is_corrupt` (rows,) float32. It raises
      the errors of `Batches`.

    Raises:
      ConfigError: the batch cannot be divided that way.
    """
    rows = _process_rows("data.batch_size", config.batch_size, process_index, num_processes)
    if config.mixing is not None:
        remedy = f"must divide the {rows} rows of each of the {num_processes} processes"
        require(rows % config.mixing.group_size == 0, "data.mixing.group_size", config.mixing.group_size, remedy)
    share = _Share(rows, process_index, num_processes)
    make = functools.partial(_train_table, config, source, share, seed=seed)
    order = _train_order(source, share, seed)
    return _prefetch(make, config, source, order, range(start_step, num_steps))


def eval_batches(config: DataConfig, source: Source, *, process_index: int, num_processes: int) -> Batches:
    """This process's rows of the evaluation batches: each example exactly once, the last batch filled up with padding.

    Returns:
      Iterator, to be closed, of `image` (rows, size, size, 3) uint8, `label` (rows,) int32 and `mask` (rows,) float32,
      which is 0 for padding. It raises the errors of `Batches`.

    Raises:
      ConfigError: the batch cannot be divided by the number of processes.
    """
    rows = _process_rows("data.eval_batch_size", config.eval_batch_size, process_index, num_processes)
    num_batches = -(-len(source) // config.eval_batch_size)
    share = _Share(rows, process_index, num_processes)
    make = functools.partial(_eval_table, config, source, share, num_batches)
    return _prefetch(make, config, source, _eval_order(source, share), range(num_batches))


def input_identity(config: DataConfig, *, seed: int, train_source: Source, eval_source: Source) -> dict[str, Any]:
    """Everything on which the contents of the batches depend, as JSON, for comparison with that of another run.

    The paths of the images are left out: the images are identified by their fingerprints.
    """
    described = to_json(config, places=False)
    settings = {name: value for name, value in described.items() if name not in RESUMABLE_FIELDS}
    settings["augment"] = to_json(config.chosen_augment())
    sources = {"source": source_record(train_source), "eval_source": source_record(eval_source)}
    return {"format": INPUT_FORMAT, "seed": seed, **sources, "data": settings}


def source_record(source: Source) -> dict[str, Any]:
    """Description of a set of examples, independent of its path, as JSON."""
    return {"num_examples": len(source), "fingerprint": source.fingerprint(), "contents": source.contents()}


def input_changes(recorded: dict[str, Any], now: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The differences between two identities, one line each: those with which a run cannot continue, and the others.

    The others, which are only reported, are the held-out images, on which no update depends, and the contents of
    training images under the same names: a run that ended at a damaged image continues when the image is repaired.
    """
    lines = differences(recorded, now)
    said = [line for line in lines if line.startswith(("eval_source.", "source.contents:"))]
    return [line for line in lines if line not in said], said


def _process_rows(field: str, batch_size: int, process_index: int, num_processes: int) -> int:
    require(batch_size % num_processes == 0, field, batch_size, f"must be divisible by {num_processes} processes")
    require(0 <= process_index < num_processes, "process index", process_index, f"must be below {num_processes}")
    return batch_size // num_processes


class _Share(NamedTuple):
    """The rows that a process computes of each batch."""

    rows: int
    """Their number."""
    process_index: int
    num_processes: int

    def positions(self, step: int) -> range:
        """Their positions in the stream of examples."""
        start = (step * self.num_processes + self.process_index) * self.rows
        return range(start, start + self.rows)


_Order = Callable[[int], Iterable[int]]
"""Step -> indexes of the examples of this process's rows, in the order in which they are read."""


@dataclasses.dataclass(frozen=True)
class _Announced:
    """A table of batches. Before a batch is read, its source gets the list of the examples in it, to read ahead."""

    batches: BatchTable
    source: Source
    order: _Order

    def __getitem__(self, step: int) -> Rows:
        read_ahead(self.source, self.order(step))
        return self.batches[step]


def _prefetch(
    make_batches: Callable[[], BatchTable], config: DataConfig, source: Source, order: _Order, steps: range
) -> Batches:
    lanes: list[Lane] = []
    if config.num_workers == 0:
        batches = make_batches()
        lanes += [ThreadLane(index, batches.__getitem__) for index in range(config.num_threads)]
    stop_copying = begin_copying(source, itertools.chain.from_iterable(map(order, steps)))
    try:
        for index in range(min(config.num_workers, len(steps))):
            lanes.append(WorkerProcess(index, make_batches))
    except BaseException:
        stop_copying()
        for lane in lanes:
            lane.close()
        raise
    return Batches(
        lanes,
        steps,
        prefetch_batches=config.prefetch_batches,
        stall_timeout_s=config.stall_timeout_s,
        on_close=stop_copying,
    )


def _stage_seed(seed: int, stage: int) -> int:
    return int(np.random.SeedSequence([seed, stage]).generate_state(1)[0])


def _shuffled(source: Source, seed: int) -> grain.MapDataset:
    """Element N is the index of the example at position N of the stream."""
    return grain.MapDataset.range(len(source)).shuffle(seed=_stage_seed(seed, _SHUFFLE)).repeat()


def _train_order(source: Source, share: _Share, seed: int) -> _Order:
    stream = _shuffled(source, seed)
    return lambda step: (int(stream[position]) for position in share.positions(step))


def _train_table(config: DataConfig, source: Source, share: _Share, *, seed: int) -> BatchTable:
    """Element N is this process's rows of the batch of step N."""
    mixing, randaugment = config.mixing, config.randaugment
    augment_mixed = randaugment is not None and randaugment.order == "after_mixing" and mixing is not None
    dataset = _shuffled(source, seed).random_map(
        functools.partial(train_example, config=config, source=source), seed=_stage_seed(seed, _AUGMENT)
    )
    if randaugment is not None and not augment_mixed:
        dataset = dataset.random_map(
            functools.partial(rand_augment_example, config=config), seed=_stage_seed(seed, _RANDAUGMENT)
        )
    if mixing is None:
        dataset = dataset.batch(share.rows, drop_remainder=True)
    else:
        # Images are mixed within a group, and each group lies in the rows of one process, whatever their number.
        dataset = dataset.batch(mixing.group_size, drop_remainder=True)
        dataset = dataset.random_map(functools.partial(mix, config=mixing), seed=_stage_seed(seed, _MIX))
        if augment_mixed:
            dataset = dataset.random_map(
                functools.partial(rand_augment_rows, config=config), seed=_stage_seed(seed, _RANDAUGMENT)
            )
        dataset = dataset.batch(share.rows // mixing.group_size, drop_remainder=True, batch_fn=_concatenate)
    dataset = dataset[share.process_index :: share.num_processes]
    return _Announced(dataset, source, _train_order(source, share, seed))


def _concatenate(groups: Sequence[Rows]) -> Rows:
    return {name: np.concatenate([group[name] for group in groups]) for name in groups[0]}


def _eval_order(source: Source, share: _Share) -> _Order:
    return lambda step: (position for position in share.positions(step) if position < len(source))


def _eval_table(config: DataConfig, source: Source, share: _Share, num_batches: int) -> BatchTable:
    """Element N is this process's rows of the evaluation batch N."""
    dataset = (
        grain.MapDataset.range(num_batches * config.eval_batch_size)
        .map(functools.partial(eval_example, config=config, source=source))
        .batch(share.rows, drop_remainder=True)
    )
    return _Announced(dataset[share.process_index :: share.num_processes], source, _eval_order(source, share))
