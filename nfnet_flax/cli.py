"""The `nfnet` command."""

import dataclasses
import fnmatch
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from absl import logging

from nfnet_flax.config import ConfigError, unknown_name
from nfnet_flax.data.prefetch import InputFailed
from nfnet_flax.exit_codes import (
    EXIT_BAD_INPUT,
    EXIT_DIVERGED,
    EXIT_DONE,
    EXIT_INPUT_FAILED,
    EXIT_STOPPED,
    EXIT_STORAGE_FAILED,
    EXIT_WRONG,
)
from nfnet_flax.training.storage import StorageFailed

if TYPE_CHECKING:
    from nfnet_flax.recipe import Recipe
    from nfnet_flax.training.loop import TrainResult

_USAGE = """usage: nfnet COMMAND ...

  nfnet train RECIPE.py --workdir DIR [--FIELD VALUE ...]   train, or continue the run in DIR
  nfnet train RECIPE.py:variant=f3 --workdir DIR            the same, with an argument of the recipe
  nfnet train RECIPE.py --debug --workdir DIR               four steps of it on a laptop: small network, no data needed
  nfnet train RECIPE.py --help                              every field of the recipe
  nfnet eval --workdir DIR                                  evaluate the newest checkpoint of a run
  nfnet plan RECIPE.py --topology v5e:2x4 [--search]        compile the step for a TPU: memory, cost; needs no TPU
  nfnet doctor [--workdir DIR] [--recipe FILE]              what is wrong with machine, data, run? (code 1: something)
  nfnet models [PATTERN]                                    the named networks, such as 'nf_*'
  nfnet convert haiku FILE --model NAME --out DIR           a published pickle -> NAME.safetensors
  nfnet convert timm FILE --model NAME --out DIR            timm's .safetensors -> NAME.safetensors
  nfnet convert run DIR --out DIR                           the newest checkpoint of a run -> weights.safetensors

exit codes: 0 done, 2 bad input, 3 diverged, 4 the input failed, 5 a process died, hung or did not come,
            6 the run's folder cannot be written,
            75 stopped and saved (run the same command again)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "eval": _eval,
        "models": _models,
        "convert": _convert,
        "plan": _plan,
        "doctor": _doctor,
    }
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return EXIT_DONE if argv else EXIT_BAD_INPUT
    if argv[0] not in commands:
        print(f"nfnet: unknown command {argv[0]!r}\n{_USAGE}", end="", file=sys.stderr)
        return EXIT_BAD_INPUT
    logging.set_verbosity(logging.ERROR)  # Orbax's notices would break the progress line
    # It logs its errors with tracebacks and raises them, too; they are told once.
    logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
    try:
        return commands[argv[0]](argv[1:])
    except Exception as error:
        known = _explain(error)
        if known is None:
            raise
        code, message = known
        print(f"nfnet: {message}", file=sys.stderr)
        if code == EXIT_STORAGE_FAILED:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # threads that still write would be waited for, some of them for minutes
        return code


def _explain(error: BaseException) -> tuple[int, str] | None:
    """Exit code and message of an error that is the user's or the world's; None for a bug."""
    match error:
        case ConfigError():
            return EXIT_BAD_INPUT, f"error: {error}"
        case InputFailed():
            return EXIT_INPUT_FAILED, f"the input failed: {error}"
        case StorageFailed():
            return EXIT_STORAGE_FAILED, f"the run's folder failed: {error}; run again once that is mended"
    return None


def _train(argv: list[str]) -> int:
    if not argv or argv[0].startswith("-"):
        print(_USAGE, end="", file=sys.stdout if "--help" in argv else sys.stderr)
        return EXIT_DONE if "--help" in argv else EXIT_BAD_INPUT
    from nfnet_flax.parallel.processes import DistributedConfig
    from nfnet_flax.recipe import Recipe
    from nfnet_flax.training.watchdog import WatchdogConfig

    recipe_path, *options = argv
    loaded = _load(recipe_path, options)

    @dataclasses.dataclass(frozen=True)
    class TrainOptions:
        workdir: Path
        """Folder of the run: made, or continued."""
        debug: bool = "--debug" in options
        """Four steps of a small network of the family on noise; other options then change this smaller recipe."""
        distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
        """The processes of the run."""
        watchdog: WatchdogConfig = dataclasses.field(default_factory=WatchdogConfig)
        """How long nothing may move."""
        recipe: Annotated[tyro.conf.AvoidSubcommands[Recipe], tyro.conf.arg(name="")] = loaded

    chosen = tyro.cli(TrainOptions, args=options, prog=f"nfnet train {recipe_path}", description="Train a network.")

    from nfnet_flax.parallel.processes import current
    from nfnet_flax.training.compilation import fix_thread_pool, keep_freed_memory, use_compilation_cache
    from nfnet_flax.training.launch import run_together
    from nfnet_flax.training.loop import TrainingDiverged, train
    from nfnet_flax.training.run import check_same_run
    from nfnet_flax.training.watchdog import Watchdog

    fix_thread_pool()
    keep_freed_memory()
    use_compilation_cache()

    def run(watchdog: Watchdog) -> int:
        check_same_run(current(), chosen.recipe, chosen.workdir, chosen.distributed.start_timeout_s)
        try:
            result = train(chosen.recipe, chosen.workdir, watchdog)
        except TrainingDiverged as error:  # in all processes, as the loss is that of the whole batch
            if current().is_first:
                print(f"nfnet: diverged: {error}", file=sys.stderr)
            return EXIT_DIVERGED
        if current().is_first:
            _print_result(result, chosen.workdir)
        return EXIT_DONE if result.finished else EXIT_STOPPED

    return run_together(chosen.distributed, chosen.watchdog, run, _explain)


def _print_result(result: "TrainResult", workdir: Path) -> None:
    if not result.finished:
        print(f"stopped at step {result.step} of {result.num_steps}; run the same command again to continue")
        return
    print(f"finished: {result.num_steps} steps")
    _print_accuracy(result.metrics)
    print(f"checkpoints: {workdir / 'checkpoints'} (newest), {workdir / 'best'} (best)")
    if (workdir / "tensorboard").is_dir():
        print(f"curves: tensorboard --logdir {workdir / 'tensorboard'}")


def _load(recipe_path: str, options: list[str]) -> "Recipe":
    """The recipe that the options change; read before them, so that its own errors come first."""
    from nfnet_flax.debug import debug_recipe
    from nfnet_flax.recipe import load_recipe

    recipe = load_recipe(recipe_path)
    return debug_recipe(recipe) if "--debug" in options else recipe


def _eval(argv: list[str]) -> int:
    @dataclasses.dataclass(frozen=True)
    class EvalOptions:
        workdir: Path
        """Folder of the run."""

    options = tyro.cli(
        EvalOptions, args=argv, prog="nfnet eval", description="Evaluate the newest checkpoint of a run."
    )
    from nfnet_flax.training.compilation import keep_freed_memory, use_compilation_cache
    from nfnet_flax.training.reading import evaluate

    keep_freed_memory()
    use_compilation_cache()
    metrics = evaluate(options.workdir)
    print(f"step {metrics['step']:.0f}")
    _print_accuracy(metrics)
    return EXIT_DONE


def _print_accuracy(metrics: dict[str, float]) -> None:
    print(f"{'parameters':<12}{'top-1':>8}{'top-5':>9}{'loss':>9}   on {metrics['eval/num_examples']:.0f} examples")
    for label, prefix in (("raw", "eval"), ("EMA", "eval_ema")):
        top1, top5, loss = (metrics[f"{prefix}/{name}"] for name in ("top1", "top5", "loss"))
        print(f"{label:<12}{top1:>8.2%}{top5:>9.2%}{loss:>9.4f}")


def _models(argv: list[str]) -> int:
    @dataclasses.dataclass(frozen=True)
    class ModelsOptions:
        pattern: tyro.conf.Positional[str] = "*"
        """Shell-style pattern of names."""

    options = tyro.cli(ModelsOptions, args=argv, prog="nfnet models", description="List the named networks.")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # shapes only: leave the accelerators to whoever uses them
    from flax import nnx

    from nfnet_flax.models import build_model, list_models, model_config
    from nfnet_flax.models.flops import forward_flops
    from nfnet_flax.models.params import split
    from nfnet_flax.models.registry import PUBLISHED_TOP1_PERCENT

    names = fnmatch.filter(list_models(), options.pattern)
    if not names:
        raise unknown_name("model", options.pattern, list_models())
    print("GFLOPs: multiply-adds of one image at train px, forward. Top-1: published, ImageNet, at test px.")
    print(f"{'name':<16}{'parameters':>14}{'GFLOPs':>9}{'train px':>10}{'test px':>9}{'top-1':>8}")
    for name in names:
        config = model_config(name)
        model = nnx.eval_shape(lambda config=config: build_model(config, num_classes=1000, rngs=nnx.Rngs(0)))
        count = sum(leaf.size for leaf in split(model)[1].values())
        gflops = forward_flops(model, config.train_image_size) / 1e9
        top1 = f"{PUBLISHED_TOP1_PERCENT[name]:.1f}%" if name in PUBLISHED_TOP1_PERCENT else "-"
        print(
            f"{name:<16}{count:>14,}{gflops:>9.2f}{config.train_image_size:>10}{config.test_image_size:>9}{top1:>8}",
            flush=True,
        )
    return EXIT_DONE


def _plan(argv: list[str]) -> int:
    if not argv or argv[0].startswith("-"):
        print(_USAGE, end="", file=sys.stdout if "--help" in argv else sys.stderr)
        return EXIT_DONE if "--help" in argv else EXIT_BAD_INPUT
    from nfnet_flax.plan import describe, plan, search, set_environment

    set_environment()  # before JAX looks for devices
    from nfnet_flax.recipe import Recipe

    recipe_path, *options = argv
    loaded = _load(recipe_path, options)

    @dataclasses.dataclass(frozen=True)
    class PlanOptions:
        topology: str
        """Such as v3:2x2, v4:2x2x1, v5e:2x4, v5p:2x2x1 or v6e:2x4."""
        search: bool = False
        """Find the largest batch per device that fits, and the cheapest rematerialization for it."""
        debug: bool = "--debug" in options
        """Plan the small network of `nfnet train --debug`."""
        recipe: Annotated[tyro.conf.AvoidSubcommands[Recipe], tyro.conf.arg(name="")] = loaded

    chosen = tyro.cli(PlanOptions, args=options, prog=f"nfnet plan {recipe_path}", description="Plan a run on TPUs.")
    result = search(chosen.recipe, chosen.topology)[-1] if chosen.search else plan(chosen.recipe, chosen.topology)
    print(describe(result))
    return EXIT_DONE


def _doctor(argv: list[str]) -> int:
    @dataclasses.dataclass(frozen=True)
    class DoctorOptions:
        workdir: Path | None = None
        """Folder of a run, begun or not."""
        recipe: str | None = None
        """Recipe file, with its arguments; by default the recipe that is stored in the workdir."""
        timeout_s: float = 60.0
        """Longest wait for a disk or a device that does not answer."""

    options = tyro.cli(DoctorOptions, args=argv, prog="nfnet doctor", description="Say what is wrong. Changes nothing.")
    from nfnet_flax.doctor import describe, examine

    num_wrong = 0
    for topic, findings in examine(options.workdir, options.recipe, timeout_s=options.timeout_s):
        print(describe(topic, findings), flush=True)
        num_wrong += sum(finding.is_wrong for finding in findings)
    print(f"{num_wrong} wrong, as marked above" if num_wrong else "nothing is wrong")
    return EXIT_WRONG if num_wrong else EXIT_DONE


def _convert(argv: list[str]) -> int:
    @dataclasses.dataclass(frozen=True)
    class Haiku:
        file: tyro.conf.Positional[Path]
        """A published file, such as F0_haiku.npz. Nothing in it is executed."""
        model: str
        """Name of the network (`nfnet models`)."""
        out: Path
        """Folder of the result."""
        parameters: Literal["raw", "ema", "unknown"] = "unknown"
        """What the file holds; recorded."""

    @dataclasses.dataclass(frozen=True)
    class Timm:
        file: tyro.conf.Positional[Path]
        """A .safetensors file of timm's dm_nfnet_f0 ... dm_nfnet_f6."""
        model: str
        """Name of the network (`nfnet models`)."""
        out: Path
        """Folder of the result."""
        parameters: Literal["raw", "ema", "unknown"] = "unknown"
        """What the file holds; recorded."""
        timm_form: bool = False
        """The weights were trained with timm: record its exact gelu and its standardization."""

    @dataclasses.dataclass(frozen=True)
    class Run:
        workdir: tyro.conf.Positional[Path]
        """Folder of a run; its newest checkpoint is read."""
        out: Path
        """Folder of the result."""
        parameters: Literal["raw", "ema"] = "ema"
        """Which of the two to write."""

    kinds: dict[str, type[Haiku | Timm | Run]] = {"haiku": Haiku, "timm": Timm, "run": Run}
    if not argv or argv[0] not in kinds:
        helped = bool(argv) and argv[0] in ("-h", "--help")
        print(_USAGE, end="", file=sys.stdout if helped else sys.stderr)
        return EXIT_DONE if helped else EXIT_BAD_INPUT
    options = tyro.cli(kinds[argv[0]], args=argv[1:], prog=f"nfnet convert {argv[0]}", description="Convert weights.")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed
    from nfnet_flax.weights.convert import convert_haiku, convert_timm

    match options:
        case Haiku():
            path = convert_haiku(options.file, options.model, options.out, parameters=options.parameters)
        case Timm():
            path = convert_timm(
                options.file,
                options.model,
                options.out,
                parameters=options.parameters,
                timm_form=options.timm_form,
            )
        case Run():
            from nfnet_flax.training.reading import export_weights

            path = export_weights(options.workdir, options.out, parameters=options.parameters)
    print(f"weights: {path}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
