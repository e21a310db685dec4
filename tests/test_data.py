"""The input: a pure function of (seed, N), and every evaluation example exactly once."""

import dataclasses
import itertools
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nfnet_flax.config import ConfigError
from nfnet_flax.config_json import differences
from nfnet_flax.data import pipeline
from nfnet_flax.data.augment_config import AffineAugment, CropAugment
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.decode import CorruptImageError
from nfnet_flax.data.digits import digits
from nfnet_flax.data.mixing_config import MixingConfig, RandAugmentConfig
from nfnet_flax.data.prefetch import InputFailed, Rows
from nfnet_flax.data.random_access import ArraySource, Source
from nfnet_flax.data.source_config import DigitsSource, FolderSource

DIGITS = DataConfig(source=DigitsSource(), image_size=8, eval_image_size=8, batch_size=24, eval_batch_size=8)
NUM_FILES = 60
WHOLE = CropAugment(min_area=1.0, min_aspect=1.0, max_aspect=1.0, flip=False)
"""No augmentation: the largest square, as it is."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty JPEGs of three classes to train on, seven to evaluate."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", NUM_FILES), ("val", 7)):
        for index in range(count):
            path = root / split / f"class_{index % 3}" / f"{index:03}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8))
            coarse.resize((40 + index % 9, 36 + index % 7)).save(path, quality=90)
    return root


def everything_on(root: Path) -> DataConfig:
    """Files, decoding and all augmentations."""
    return DataConfig(
        source=FolderSource(root=str(root)),
        image_size=16,
        eval_image_size=16,
        batch_size=32,
        eval_batch_size=8,
        augment=CropAugment(),
        randaugment=RandAugmentConfig(num_layers=2, magnitude=10.0),
        mixing=MixingConfig(group_size=8),
        on_corrupt="skip",
    )


def batches(
    config: DataConfig,
    start: int,
    count: int,
    *,
    source: Source | None = None,
    seed: int = 0,
    part: tuple[int, int] = (0, 1),
    **changes: Any,
) -> list[Rows]:
    config = dataclasses.replace(config, **changes)
    with pipeline.train_batches(
        config,
        source or pipeline.open_split(config, "train"),
        seed=seed,
        start_step=start,
        num_steps=start + count,
        process_index=part[0],
        num_processes=part[1],
    ) as iterator:
        return list(iterator)


def of_all_processes(config: DataConfig, start: int, count: int, num_processes: int, num_workers: int) -> list[Rows]:
    parts = [
        batches(config, start, count, part=(index, num_processes), num_workers=num_workers)
        for index in range(num_processes)
    ]
    steps = zip(*parts, strict=True)
    return [{name: np.concatenate([rows[name] for rows in step]) for name in step[0]} for step in steps]


def as_bytes(of_steps: list[Rows]) -> list[dict[str, tuple[str, tuple[int, ...], bytes]]]:
    return [{name: (a.dtype.str, a.shape, a.tobytes()) for name, a in rows.items()} for rows in of_steps]


@pytest.mark.parametrize(
    ("num_processes", "num_workers", "start", "count"),
    [
        *((num_processes, 0, start, count) for num_processes in (2, 4) for start, count in ((0, 6), (1_000_000, 3))),
        (1, 1, 1_000_000, 3),
        (1, 4, 0, 6),
        (2, 2, 0, 6),  # tools/soak_input.py goes through all combinations
    ],
)
def test_batches_do_not_depend_on_processes_or_workers(
    folder: Path, num_processes: int, num_workers: int, start: int, count: int
) -> None:
    config = everything_on(folder)
    whole = batches(config, start, count)
    shapes = {name: (array.shape, array.dtype) for name, array in whole[0].items()}
    assert shapes == {
        "image": ((32, 16, 16, 3), np.uint8),
        "label": ((32,), np.int32),
        "mix_label": ((32,), np.int32),
        "label_weight": ((32,), np.float32),
        "is_corrupt": ((32,), np.float32),
    }
    assert as_bytes(whole) == as_bytes(of_all_processes(config, start, count, num_processes, num_workers))


def test_a_batch_depends_on_seed_and_step_only(folder: Path) -> None:
    config = everything_on(folder)
    first = as_bytes(batches(config, 0, 6))
    assert first == as_bytes(batches(config, 0, 6, num_threads=1, prefetch_batches=1))
    assert first[4:] == as_bytes(batches(config, 4, 2))
    assert first[0] != as_bytes(batches(config, 0, 1, seed=1))[0]
    assert len({rows["image"] for rows in first}) == 6


@pytest.mark.parametrize("stage", ["augment", "randaugment", "mixing"])
def test_an_example_is_augmented_anew_in_each_epoch(folder: Path, stage: str) -> None:
    config = everything_on(folder)
    on: dict[str, Any] = {"augment": config.augment, "randaugment": config.randaugment, "mixing": config.mixing}
    off: dict[str, Any] = {"augment": WHOLE, "randaugment": None, "mixing": None}
    eight = pipeline.split_off(pipeline.open_split(config, "train"), 0, 8)
    still = batches(config, 0, 1, source=eight, batch_size=16, **off)[0]
    assert len(np.unique(still["image"], axis=0)) == 8  # two epochs of eight examples: the same images twice
    changed = batches(config, 0, 1, source=eight, batch_size=16, **{**off, stage: on[stage]})[0]
    assert len(np.unique(changed["image"], axis=0)) > 8


def test_randaugment_comes_after_or_before_mixing(folder: Path) -> None:
    after, before = (
        batches(everything_on(folder), 0, 1, randaugment=RandAugmentConfig(order=order))[0]
        for order in ("after_mixing", "before_mixing")
    )
    plain = batches(everything_on(folder), 0, 1, randaugment=None)[0]
    assert as_bytes([after])[0]["label_weight"] == as_bytes([plain])[0]["label_weight"]
    assert not np.array_equal(after["image"], before["image"])
    assert not np.array_equal(after["image"], plain["image"])


def test_digits_are_split_into_a_fixed_fifth() -> None:
    train, held_out = digits("train", 8), digits("eval", 8)
    assert (len(train), len(held_out)) == (1437, 360)
    assert train.images.shape == (1437, 8, 8, 3)
    assert train.images.dtype == np.uint8
    assert train.images.max() == 255
    assert set(held_out.labels) == set(range(10))


def test_every_epoch_is_complete_and_shuffled_anew() -> None:
    # 1437 examples are not a multiple of 24: epochs run on into one another.
    source = digits("train", 8)
    steps = 2 * len(source) // DIGITS.batch_size
    labels = np.concatenate([rows["label"] for rows in batches(DIGITS, 0, steps)])
    first, second = labels[: len(source)], labels[len(source) :]
    assert np.array_equal(np.bincount(first), np.bincount(source.labels))
    assert not np.array_equal(first[: len(second)], second)


def test_starting_late_costs_nothing(folder: Path) -> None:
    def seconds(start: int) -> float:
        began = time.perf_counter()
        batches(everything_on(folder), start, 1)
        return time.perf_counter() - began

    assert seconds(3_000_000) < seconds(0) + 1.0


def test_the_first_examples_are_held_out() -> None:
    whole = digits("train", 8)
    config = dataclasses.replace(DIGITS, num_held_out=100)
    train, held_out = pipeline.open_split(config, "train"), pipeline.open_split(config, "eval")
    assert (len(train), len(held_out)) == (1337, 100)
    assert np.array_equal(held_out[0]["image"], whole.images[0])
    assert np.array_equal(held_out[99]["image"], whole.images[99])
    assert np.array_equal(train[0]["image"], whole.images[100])
    with pytest.raises(ConfigError, match="num_held_out = 1437: must be below the 1437 training examples"):
        pipeline.open_split(dataclasses.replace(DIGITS, num_held_out=1437), "train")


@pytest.mark.parametrize("num_examples", [1, 8, 37, 100])
@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_evaluation_sees_each_example_once(num_examples: int, num_processes: int) -> None:
    check_evaluation(num_examples, num_processes, num_workers=0)


def test_evaluation_with_workers_sees_each_example_once() -> None:
    check_evaluation(37, 1, num_workers=2)


def check_evaluation(num_examples: int, num_processes: int, num_workers: int) -> None:
    images = np.arange(num_examples, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    source = ArraySource(images=images, labels=np.arange(num_examples, dtype=np.int32))
    config = dataclasses.replace(DIGITS, num_workers=num_workers)
    parts = []
    for index in range(num_processes):
        with pipeline.eval_batches(config, source, process_index=index, num_processes=num_processes) as iterator:
            parts.append(list(iterator))
    assert len({len(part) for part in parts}) == 1
    rows = list(itertools.chain.from_iterable(parts))
    seen = np.concatenate([row["mask"] for row in rows]) == 1
    assert sorted(np.concatenate([row["label"] for row in rows])[seen]) == list(range(num_examples))
    assert sorted(np.concatenate([row["image"] for row in rows])[seen][:, 0, 0, 0]) == list(range(num_examples))


def corrupted(folder: Path, to: Path, *, keep: int = 0) -> tuple[DataConfig, list[str]]:
    """A copy of the images in which half of the training files are cut short, and the names of those."""
    shutil.copytree(folder, to)
    paths = sorted((to / "train").rglob("*.jpg"))[keep::2]
    for path in paths:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    plain: dict[str, Any] = {"randaugment": None, "mixing": None}
    return dataclasses.replace(everything_on(to), **plain), [path.name for path in paths]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_corrupt_image_is_named(folder: Path, tmp_path: Path, num_workers: int) -> None:
    config, names = corrupted(folder, tmp_path / "images")
    with pytest.raises(CorruptImageError) as caught:
        batches(config, 0, 1, on_corrupt="raise", num_workers=num_workers)
    assert any(name in str(caught.value) for name in names)
    assert "(example " in str(caught.value)


def test_a_corrupt_image_is_replaced_by_the_next_and_counted(folder: Path, tmp_path: Path) -> None:
    config, names = corrupted(folder, tmp_path / "images")
    source = pipeline.open_split(config, "train")
    is_bad = [any(name in source.describe(index) for name in names) for index in range(len(source))]
    assert sum(is_bad) == NUM_FILES // 2
    # One epoch holds every index once: of all rows, as many as there are bad files are marked.
    rows = batches(config, 0, 1, batch_size=NUM_FILES, augment=WHOLE)[0]
    assert rows["is_corrupt"].sum() == sum(is_bad)
    # What stands in for index i is the first good one after it.
    wanted = []
    for index in range(len(source)):
        while is_bad[index % len(source)]:
            index += 1
        wanted.append(source[index % len(source)]["label"])
    assert np.array_equal(np.bincount(rows["label"]), np.bincount(wanted))
    assert as_bytes([rows]) == as_bytes(batches(config, 0, 1, batch_size=NUM_FILES, num_threads=1, augment=WHOLE))


def test_an_evaluation_leaves_corrupt_images_out_only_if_told_to(folder: Path, tmp_path: Path) -> None:
    config, names = corrupted(folder, tmp_path / "images")
    config = dataclasses.replace(config, source=FolderSource(root=str(tmp_path / "images"), eval="train"))
    source = pipeline.open_split(config, "eval")
    with pipeline.eval_batches(config, source, process_index=0, num_processes=1) as iterator:
        assert sum(rows["mask"].sum() for rows in iterator) == NUM_FILES - len(names)
    strict = dataclasses.replace(config, on_corrupt="raise")
    with (
        pipeline.eval_batches(strict, source, process_index=0, num_processes=1) as iterator,
        pytest.raises(CorruptImageError, match=r"\.jpg"),
    ):
        list(iterator)


def test_where_no_image_can_be_decoded_the_run_ends(folder: Path, tmp_path: Path) -> None:
    corrupted(folder, tmp_path / "images")
    for path in (tmp_path / "images").rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(CorruptImageError, match="none of the 60 training images can be decoded"):
        batches(everything_on(tmp_path / "images"), 0, 1)


def test_a_file_that_vanishes_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "images")
    config = everything_on(tmp_path / "images")
    source = pipeline.open_split(config, "train")
    shutil.rmtree(tmp_path / "images" / "train")
    with pytest.raises(InputFailed, match=r"step 0: FileNotFoundError: .*\.jpg.*in .*\.jpg \(example \d+\)"):
        batches(config, 0, 1, source=source, num_threads=1)


def test_what_does_not_fit_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="24: must be divisible by 5 processes"):
        batches(DIGITS, 0, 1, part=(0, 5))
    with pytest.raises(ConfigError, match="group_size = 8: must divide the 4 rows of each of the 8 processes"):
        batches(everything_on(folder), 0, 1, part=(0, 8))
    with pytest.raises(ConfigError, match=r"data.batch_size = 20: must be divisible by data.mixing.group_size = 8"):
        dataclasses.replace(everything_on(folder), batch_size=20)
    with pytest.raises(ConfigError, match=r"data.prefetch_batches = 2: must be at least data.num_workers = 3"):
        dataclasses.replace(DIGITS, prefetch_batches=2, num_workers=3)


def test_the_identity_of_an_input_names_what_decides_its_bytes(folder: Path, tmp_path: Path) -> None:
    def identity(config: DataConfig, seed: int = 0) -> dict[str, Any]:
        sources = {f"{split}_source": pipeline.open_split(config, split) for split in ("train", "eval")}
        return pipeline.input_identity(config, seed=seed, **sources)

    config = everything_on(folder)
    first = identity(config)
    other_speed = dataclasses.replace(config, num_workers=2, num_threads=1, prefetch_batches=7, stall_timeout_s=9.0)
    assert differences(first, identity(other_speed)) == []
    assert differences(first, identity(config, seed=3)) == ["seed: 0 -> 3"]
    changed = dataclasses.replace(config, randaugment=RandAugmentConfig(num_layers=2, magnitude=5.0))
    assert differences(first, identity(changed)) == ["data.randaugment.magnitude: 10.0 -> 5.0"]
    shutil.copytree(folder, tmp_path / "images")
    (tmp_path / "images" / "train" / "class_0" / "000.jpg").unlink()
    lines = differences(first, identity(everything_on(tmp_path / "images")))
    assert "source.num_examples: 60 -> 59" in lines
    assert any(line.startswith("source.fingerprint: ") for line in lines)
    assert not any(line.startswith("eval_source") for line in lines)


def test_photos_are_not_augmented_as_digits_are(folder: Path) -> None:
    digits_config = DataConfig(source=DigitsSource())
    photos = dataclasses.replace(digits_config, source=FolderSource(root=str(folder)))
    assert digits_config.chosen_augment() == AffineAugment()
    assert photos.chosen_augment() == CropAugment()
    chosen = dataclasses.replace(photos, augment=AffineAugment())
    assert chosen.chosen_augment() == AffineAugment()
    plain: dict[str, Any] = {"batch_size": 8, "image_size": 16}
    by_source = as_bytes(batches(photos, 0, 1, **plain))
    assert by_source == as_bytes(batches(photos, 0, 1, augment=CropAugment(), **plain))
    assert by_source != as_bytes(batches(chosen, 0, 1, **plain))
    train, held_out = pipeline.open_split(photos, "train"), pipeline.open_split(photos, "eval")

    def identity(config: DataConfig) -> dict[str, Any]:
        return pipeline.input_identity(config, seed=0, train_source=train, eval_source=held_out)

    assert identity(photos) == identity(dataclasses.replace(photos, augment=CropAugment()))
    assert identity(photos) == identity(dataclasses.replace(photos, on_corrupt="skip"))
    assert "data.augment" in str(differences(identity(photos), identity(chosen)))
