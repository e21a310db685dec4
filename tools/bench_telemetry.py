"""Times training steps with all that a run records about itself, and without, in turns in one process.

    python tools/bench_telemetry.py [--model nfnet_f0 --batch 8 --size 128]

With it, a step is compiled so that it can measure its update, and every `--log-every-steps`th does; its metrics, the
clipping of each layer and the record of times are written into a temporary folder, with TensorBoard's histograms each
time, which a run writes only about 200 times. Without it, the loss of these steps is fetched, and nothing is written.
Printed are the medians over the rounds of the time for a step, and of the ratio of the two.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax

from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.pipeline import train_batches
from nfnet_flax.data.synthetic import SyntheticSource
from nfnet_flax.models import ExecutionConfig, model_config
from nfnet_flax.optim import OptimConfig
from nfnet_flax.parallel.mesh import to_global
from nfnet_flax.recipe import Recipe
from nfnet_flax.runtime import prepare
from nfnet_flax.telemetry.config import TelemetryConfig
from nfnet_flax.telemetry.ledger import Ledger
from nfnet_flax.training.log_step import LogStep
from nfnet_flax.training.metrics import MetricsLog
from nfnet_flax.training.progress import Progress
from nfnet_flax.training.setup import Setup, assemble
from nfnet_flax.training.step import make_train_step
from nfnet_flax.training.window import Window

_NUM_CLASSES = 1000


def recipe_of(options: argparse.Namespace) -> Recipe:
    """A recipe that trains the network on noise."""
    data = DataConfig(
        source=SyntheticSource(num_train_examples=10_000, num_eval_examples=options.batch, num_classes=_NUM_CLASSES),
        batch_size=options.batch,
        eval_batch_size=options.batch,
        image_size=options.size,
        eval_image_size=options.size,
    )
    return Recipe(
        name="bench",
        model=model_config(options.model),
        num_classes=_NUM_CLASSES,
        data=data,
        optim=OptimConfig(),
        execution=ExecutionConfig(reproducible=False),
        num_steps=10_000,
        log_every_steps=options.log_every_steps,
        telemetry=TelemetryConfig(layers_every_steps=options.log_every_steps),
    )


def contestants(setup: Setup, folder: Path, opened: contextlib.ExitStack) -> dict[str, Callable[[], None]]:
    """By name, a function that makes as many steps as there are from one log step to the next."""
    recipe, every = setup.recipe, setup.recipe.log_every_steps
    batches = opened.enter_context(
        train_batches(
            recipe.data,
            setup.train_source,
            seed=0,
            start_step=0,
            num_steps=setup.num_steps,
            process_index=0,
            num_processes=1,
        )
    )
    batch = to_global(next(batches), setup.mesh)
    log = opened.enter_context(contextlib.closing(MetricsLog(folder, resume_step=0, evaluated=False, tensorboard=True)))
    ledger = Ledger(time.perf_counter())
    opened.enter_context(ledger.recording(folder / "events.jsonl", KeyboardInterrupt))
    progress = Progress(num_steps=setup.num_steps, batch_size=recipe.data.batch_size, start_step=0, is_shown=False)
    log_step = LogStep(setup, log, ledger, progress, folder, 0)
    window = Window(setup, log, progress, log_step, 0)
    plain_step = make_train_step(setup.structure, setup.optimizer, recipe.objective, setup.mesh, seed=recipe.seed)
    states = {"with": setup.create_state({}), "without": setup.create_state({})}
    step = 0

    def recorded() -> None:
        nonlocal step
        for _ in range(every):
            step += 1
            ledger.enter("input")
            ledger.enter("step")
            states["with"], metrics = setup.train_step(states["with"], batch, {}, setup.measures(step))
            window.push(step, metrics)
        log_step.flush()

    def plain() -> None:
        pending = []
        for _ in range(every):
            states["without"], metrics = plain_step(states["without"], batch, {})
            pending.append(metrics["train/loss"])
        jax.device_get(pending)

    return {"with": recorded, "without": plain}


def main() -> None:
    """Prints the times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nfnet_f0", help="one of `nfnet models`")
    parser.add_argument("--batch", type=int, default=8, help="number of images of a step")
    parser.add_argument("--size", type=int, default=128, help="height and width of the images, in pixels")
    parser.add_argument("--rounds", type=int, default=7, help="number of timed turns of each kind")
    parser.add_argument("--log-every-steps", type=int, default=10, help="number of steps of a turn")
    options = parser.parse_args()
    prepare(reproducible=False)
    times: dict[str, list[float]] = {"with": [], "without": []}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as opened:
        turns = contestants(assemble(recipe_of(options), None), Path(folder), opened)
        for round_number in range(options.rounds + 1):
            for name in ("with", "without") if round_number % 2 else ("without", "with"):
                started = time.perf_counter()
                turns[name]()
                if round_number > 0:  # the first turn compiles
                    times[name].append((time.perf_counter() - started) / options.log_every_steps)
    medians = {name: statistics.median(found) for name, found in times.items()}
    ratios = [own / other for own, other in zip(times["with"], times["without"], strict=True)]
    print(
        f"{options.model}, {options.batch} images of {options.size} px, {options.log_every_steps} steps a turn: "
        f"{medians['with']:.3f} s a step with all records, {medians['without']:.3f} s without; ratio "
        f"{statistics.median(ratios):.3f} in the median of {options.rounds}, "
        f"{min(times['with']) / min(times['without']):.3f} of the shortest"
    )


if __name__ == "__main__":
    main()
