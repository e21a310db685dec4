"""Fine-tunes small networks on handwritten digits, to choose the defaults of `recipes/finetune.py`.

A network is trained on the digits 0 to 4 and fine-tuned on 5 to 9, each in a folder of image files, by the recipe
itself.

    python tools/bench_finetune.py optimizers    # methods and batch sizes
    python tools/bench_finetune.py transfer      # with these weights against random ones

Each line is a setting: top-1 on the held-out digits (of the moving average) as mean, standard deviation and lowest
value over the seeds, and how many runs diverged, that is, had a loss or a gradient that is not finite. A seed
determines the network that is fine-tuned, the order of the images and their augmentation.
"""

import dataclasses
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import numpy as np
import tyro
from PIL import Image

from nfnet_flax.data.augment_config import AffineAugment
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.digits import digits
from nfnet_flax.data.pipeline import train_batches
from nfnet_flax.data.random_access import Split
from nfnet_flax.data.source_config import FolderSource
from nfnet_flax.models import ExecutionConfig, NFNetConfig
from nfnet_flax.optim import AGC, SGD, AdamW, OptimConfig
from nfnet_flax.parallel.mesh import to_global
from nfnet_flax.recipe import Recipe
from nfnet_flax.recipe_file import load_recipe
from nfnet_flax.runtime import prepare
from nfnet_flax.training.evaluation import run_evaluation, weights_to_evaluate
from nfnet_flax.training.initial import initial_weights
from nfnet_flax.training.setup import Setup, assemble
from nfnet_flax.training.state import TrainState, with_weights
from nfnet_flax.weights.portable import Preprocessing, WeightsInfo, write_weights

_FINETUNE = Path(__file__).parent.parent / "recipes" / "finetune.py"
_MODEL = NFNetConfig(widths=(16, 32, 64), depths=(1, 1, 1), group_width=8, stochdepth_rate=0.0)
_MEAN, _STD = (128.0, 128.0, 128.0), (64.0, 64.0, 64.0)
_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compare, and at what length."""

    table: tyro.conf.Positional[Literal["optimizers", "transfer"]]
    """`optimizers`: methods and batch sizes. `transfer`: with weights of other digits against random weights."""
    seeds: int = 3
    """Number of runs of each setting."""
    num_epochs: float = 10.0
    """Length of each run."""
    pretraining_epochs: float = 20.0
    """Length of the training on the digits 0 to 4."""
    per_class: int | None = None
    """Number of training images of each class; None: all, about 144."""
    batch_sizes: tuple[int, ...] = (32, 64, 256)
    """Batch sizes of the table `optimizers`."""
    rates: tuple[float, ...] = (1.0, 5.0)
    """Factors on the learning rates of the table `optimizers`."""
    layer_decay: float = 1.0
    """Layer decay of the table `optimizers`."""
    image_size: int = 16
    """Height and width of the images."""


def _write_digits(folder: Path, image_size: int, per_class: int | None) -> None:
    """Writes `folder/0-4` and `folder/5-9`, with `train` and `val` and a folder for each digit."""
    splits: dict[Split, str] = {"train": "train", "eval": "val"}
    for split, name in splits.items():
        source = digits(split, image_size)
        for index, (image, digit) in enumerate(zip(source.images, source.labels, strict=True)):
            part = folder / ("0-4" if digit < 5 else "5-9") / name / str(digit)
            part.mkdir(parents=True, exist_ok=True)
            is_few = split == "train" and digit >= 5 and per_class is not None
            if not is_few or len(list(part.iterdir())) < (per_class or 0):
                Image.fromarray(image).save(part / f"{index}.png")


def _pretraining(options: Options, folder: Path) -> Recipe:
    size = options.image_size
    data = DataConfig(
        source=FolderSource(root=str(folder / "0-4")),
        augment=AffineAugment(),
        image_size=size,
        eval_image_size=size,
        mean=_MEAN,
        std=_STD,
        batch_size=_BATCH,
        eval_batch_size=_BATCH,
    )
    optim = OptimConfig(learning_rate_per_256=0.4, warmup_epochs=2.0, clipping=AGC(ratio=0.05), ema_decay=0.99)
    return Recipe(
        name="digits_0-4",
        model=_MODEL,
        num_classes=5,
        data=data,
        optim=optim,
        execution=ExecutionConfig(num_microbatches=1),
        num_epochs=options.pretraining_epochs,
    )


def _train(setup: Setup, state: TrainState, seed: int) -> tuple[TrainState, bool]:
    """The state after the run, and whether the run diverged."""
    metrics = []
    source, data = setup.train_source, setup.recipe.data
    with train_batches(
        data, source, seed=seed, start_step=0, num_steps=setup.num_steps, process_index=0, num_processes=1
    ) as batches:
        for rows in batches:
            state, found = setup.train_step(state, to_global(rows, setup.mesh), {}, setup.measures(1))
            metrics.append((found["train/loss"], found["train/grad_norm"]))
            jax.block_until_ready(found["train/loss"])
    return state, not all(math.isfinite(value) for pair in jax.device_get(metrics) for value in pair)


def _top1(setup: Setup, state: TrainState) -> float:
    with setup.eval_batches() as batches:
        found = run_evaluation(setup.eval_step, weights_to_evaluate(state), batches, setup.mesh)
    assert found is not None
    return found["eval_ema/top1"]


def _pretrained(options: Options, folder: Path) -> Iterator[Path]:
    """Trains on the digits 0 to 4, and yields a weight file for each seed."""
    setup = assemble(_pretraining(options, folder), None)
    data = setup.recipe.data
    seen_as = Preprocessing(
        image_size=data.eval_image_size, crop_margin=0, resampler=data.resampler, mean=data.mean, std=data.std
    )
    for seed in range(options.seeds):
        recipe = dataclasses.replace(setup.recipe, seed=seed)
        state, _ = _train(setup, dataclasses.replace(setup, recipe=recipe).create_state({}), seed)
        info = WeightsInfo(
            model=_MODEL,
            num_classes=5,
            source=f"digits 0 to 4, seed {seed}",
            parameters="ema",
            class_names=setup.train_source.class_names,
            preprocessing=seen_as,
        )
        path = folder / f"{seed}.safetensors"
        arrays = {name: np.asarray(value) for name, value in state.ema_params.items()}
        write_weights(path, info, arrays)
        print(f"seed {seed}: top-1 on the digits 0 to 4: {_top1(setup, state):.2%}", flush=True)
        yield path


def _compare(heading: str, recipe: Recipe, weights: list[Path]) -> None:
    """Trains a recipe once for each seed, and prints a line; each run starts from its own weights, if it has any."""
    started_s = time.perf_counter()
    setup = assemble(recipe, None)
    names = setup.train_source.class_names
    top1s, num_diverged = [], 0
    for seed, path in enumerate(weights):
        own = dataclasses.replace(recipe, seed=seed, init_from=recipe.init_from and str(path))
        state = dataclasses.replace(setup, recipe=own).create_state({})
        state = with_weights(state, initial_weights(own, names).arrays)
        state, diverged = _train(setup, state, seed)
        num_diverged += diverged
        top1s.append(_top1(setup, state))
    spread = statistics.stdev(top1s) if len(top1s) > 1 else 0.0
    seconds = time.perf_counter() - started_s
    print(
        f"| {heading} | {setup.num_steps} | {statistics.mean(top1s):.2%} | {spread:.2%} | {min(top1s):.2%} | "
        f"{num_diverged} of {len(top1s)} | {seconds:.0f} |",
        flush=True,
    )


def _optimizers(options: Options, weights: list[Path], folder: Path) -> None:
    print("| optimizer | batch | learning rate | steps | top-1 | deviation | lowest | diverged | s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for batch_size in options.batch_sizes:
        for factor in options.rates:
            base = _finetune(options, weights, folder, batch_size, f",layer_decay={options.layer_decay}")
            sgd = dataclasses.replace(
                base.optim,
                method=SGD(),
                clipping=AGC(ratio=0.05),
                learning_rate=None,
                learning_rate_per_256=0.4 * factor,
                weight_decay=2e-5,
            )
            adamw = dataclasses.replace(
                base.optim,
                method=AdamW(),
                clipping=None,
                learning_rate=1e-3 * factor,
                learning_rate_per_256=None,
                weight_decay=0.05,
            )
            both = dataclasses.replace(adamw, clipping=AGC(ratio=0.05))
            for name, optim in (("SGD + AGC", sgd), ("AdamW", adamw), ("AdamW + AGC", both)):
                rate = optim.peak_learning_rate(batch_size)
                _compare(f"{name} | {batch_size} | {rate:.3g}", dataclasses.replace(base, optim=optim), weights)


def _finetune(options: Options, weights: list[Path], folder: Path, batch_size: int, more: str = "") -> Recipe:
    arguments = f"weights={weights[0]},data={folder / '5-9'},flip=false"
    arguments += f",batch_size={batch_size},num_epochs={options.num_epochs}{more}"
    return dataclasses.replace(load_recipe(f"{_FINETUNE}:{arguments}"), tensorboard=False)


def _transfer(options: Options, weights: list[Path], folder: Path) -> None:
    tuned = _finetune(options, weights, folder, _BATCH)
    at_once = dataclasses.replace(tuned.optim, trained_from_epoch=())
    random = dataclasses.replace(tuned, init_from=None, init_to_zero=(), optim=at_once)
    decayed = {
        decay: dataclasses.replace(tuned, optim=dataclasses.replace(tuned.optim, layer_decay=decay))
        for decay in (0.9, 0.75)
    }
    print("| start | steps | top-1 | deviation | lowest | diverged | s |")
    print("|---|---|---|---|---|---|---|")
    for heading, recipe in (
        ("fine-tuned, as the recipe does", tuned),
        ("fine-tuned, all layers from the start", dataclasses.replace(tuned, optim=at_once)),
        ("fine-tuned, layer decay 0.9", decayed[0.9]),
        ("fine-tuned, layer decay 0.75", decayed[0.75]),
        ("random parameters, all layers from the start", random),
    ):
        _compare(heading, recipe, weights)


def main() -> None:
    """Runs the comparison that the command line names."""
    options = tyro.cli(Options, description=__doc__)
    prepare(reproducible=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_digits(folder, options.image_size, options.per_class)
        weights = list(_pretrained(options, folder))
        (_optimizers if options.table == "optimizers" else _transfer)(options, weights, folder)


if __name__ == "__main__":
    main()
