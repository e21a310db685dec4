"""The input: a pure function of (seed, N), and every evaluation example exactly once."""

import dataclasses
import itertools
import time

import numpy as np
import pytest

from nfnet_flax.config import ConfigError
from nfnet_flax.data import pipeline, sources, transforms
from nfnet_flax.data.config import DataConfig

CONFIG = DataConfig(image_size=8, batch_size=24, eval_batch_size=8)


@pytest.fixture(scope="module")
def source() -> sources.ArraySource:
    return sources.digits("train", CONFIG.image_size)


def batches(
    source: sources.ArraySource,
    start: int,
    count: int,
    *,
    seed: int = 0,
    part: tuple[int, int] = (0, 1),
    threads: int = 2,
) -> list[pipeline.Rows]:
    iterator = pipeline.train_batches(
        dataclasses.replace(CONFIG, num_threads=threads),
        source,
        seed=seed,
        start_step=start,
        num_steps=start + count,
        process_index=part[0],
        num_processes=part[1],
    )
    return list(iterator)


def same(a: list[pipeline.Rows], b: list[pipeline.Rows]) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True)
    )


def test_digits_are_split_into_a_fixed_fifth() -> None:
    train, held_out = sources.digits("train", 8), sources.digits("eval", 8)
    assert (len(train), len(held_out)) == (1437, 360)
    assert train.images.shape == (1437, 8, 8, 3)
    assert train.images.dtype == np.uint8
    assert train.images.max() == 255
    assert set(held_out.labels) == set(range(10))


def test_a_batch_depends_on_seed_and_step_only(source: sources.ArraySource) -> None:
    first = batches(source, 0, 6)
    assert same(first, batches(source, 0, 6, threads=1))
    assert same(first[4:], batches(source, 4, 2))
    assert not same(first, batches(source, 0, 6, seed=1))


@pytest.mark.parametrize("num_processes", [2, 4])
@pytest.mark.parametrize("start", [0, 59, 1_000_000])
def test_processes_hold_consecutive_rows_of_the_same_batch(
    source: sources.ArraySource, num_processes: int, start: int
) -> None:
    whole = batches(source, start, 3)
    parts = [batches(source, start, 3, part=(index, num_processes)) for index in range(num_processes)]
    joined = [{name: np.concatenate([part[step][name] for part in parts]) for name in whole[step]} for step in range(3)]
    assert same(whole, joined)


def test_every_epoch_is_complete_and_shuffled_anew(source: sources.ArraySource) -> None:
    # 1437 examples are not a multiple of 24: epochs run on into one another.
    steps = 2 * len(source) // CONFIG.batch_size
    labels = np.concatenate([rows["label"] for rows in batches(source, 0, steps)])
    first, second = labels[: len(source)], labels[len(source) :]
    assert np.array_equal(np.bincount(first), np.bincount(source.labels))
    assert not np.array_equal(first[: len(second)], second)


def test_starting_late_costs_nothing(source: sources.ArraySource) -> None:
    def seconds(start: int) -> float:
        began = time.perf_counter()
        batches(source, start, 1)
        return time.perf_counter() - began

    assert seconds(3_000_000) < seconds(0) + 1.0


@pytest.mark.parametrize("num_examples", [1, 8, 37])
@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_evaluation_sees_each_example_once(source: sources.ArraySource, num_examples: int, num_processes: int) -> None:
    images = np.zeros((num_examples, 8, 8, 3), np.uint8)
    few = sources.ArraySource(images=images, labels=np.arange(num_examples, dtype=np.int32))
    parts = [
        list(pipeline.eval_batches(CONFIG, few, process_index=index, num_processes=num_processes))
        for index in range(num_processes)
    ]
    assert len({len(part) for part in parts}) == 1
    rows = list(itertools.chain.from_iterable(parts))
    labels = np.concatenate([row["label"] for row in rows])
    mask = np.concatenate([row["mask"] for row in rows])
    assert sorted(labels[mask == 1]) == list(range(num_examples))


def test_a_process_needs_whole_rows(source: sources.ArraySource) -> None:
    with pytest.raises(ConfigError, match="24: must be divisible by 5 processes"):
        batches(source, 0, 1, part=(0, 5))


def test_affine_moves_by_what_was_drawn() -> None:
    image = np.zeros((9, 9, 3), np.uint8)
    image[4, 4] = 200
    record = {"image": image}
    still = transforms.random_affine(record, np.random.default_rng(0), max_degrees=0, max_scale=0, max_shift=0)
    assert np.array_equal(still["image"], image)
    turned = transforms.random_affine(record, np.random.default_rng(0), max_degrees=45, max_scale=0, max_shift=0)
    assert np.unravel_index(np.argmax(turned["image"][..., 0]), (9, 9)) == (4, 4)  # the centre stays
    moved = transforms.random_affine(record, np.random.default_rng(0), max_degrees=0, max_scale=0, max_shift=0.3)
    assert np.unravel_index(np.argmax(moved["image"][..., 0]), (9, 9)) != (4, 4)
    assert np.array_equal(image[4, 4], [200, 200, 200])
